"""linear_ibot_loss: chunks against all logits at once in float64, their memory, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.counters import peak_bytes
from fastdino_kernels.losses import ibot_loss as rows
from fastdino_kernels.losses import linear_ibot_loss as module
from fastdino_kernels.losses.linear_ibot_loss import linear_ibot_loss, linear_ibot_loss_reference
from fastdino_kernels.losses.sinkhorn import sinkhorn
from fastdino_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.07}
UPSTREAM = -3.0  # what the loss is multiplied by before backward; neither 1 nor positive
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# (M, K, D), in chunks of at most 8 rows: no patch, less than a chunk, one, several, and 17 = 6 + 6 + 5.
SHAPES = [(0, 64, 16), (3, 130, 8), (8, 64, 16), (24, 70, 24), (17, 200, 16)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "launch_config", lambda num_prototypes: {"BLOCK_K": 64, "num_warps": 2})
    monkeypatch.setattr(module, "MAX_ROWS", 8)


def random_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normalised features, prototypes of length 1, an fp32 center, and fp32 weights of which one is 0."""
    M, K, D = shape
    generator = torch.Generator(DEVICE).manual_seed(M * K)
    made = [torch.randn(size, generator=generator, device=DEVICE) for size in [(M, D), (K, D), (M, D), (K, D), (K,)]]
    vectors = [torch.nn.functional.normalize(x, dim=1).to(dtype) for x in made[:4]]
    weight = torch.rand(M, generator=generator, device=DEVICE)
    weight[2:3] = 0
    return [*vectors, made[4] * 0.3, weight]


def loss_and_grads(implementation: Callable[..., Tensor], *inputs: Tensor, upstream: float = UPSTREAM) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    value = implementation(*leaves, *inputs[2:], **TEMPS)
    return [value.detach(), *torch.autograd.grad(value * upstream, leaves)]


def check(inputs: list[Tensor]) -> None:
    """Judges the loss and both gradients, which plain torch too makes before it scales them."""
    exact = loss_and_grads(linear_ibot_loss_reference, *(x.double() for x in inputs))
    loss, *grads = loss_and_grads(linear_ibot_loss_reference, *inputs, upstream=1)
    plain = [loss, *(grad * UPSTREAM for grad in grads)]
    for got, ref, want in zip(loss_and_grads(linear_ibot_loss, *inputs), plain, exact, strict=True):
        assert got.dtype == ref.dtype
        if want.numel():
            assert_no_worse(got, ref, want, inputs[0].dtype)


@pytest.mark.usefixtures("small_chunks")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(random_inputs(shape, dtype))


@pytest.mark.usefixtures("small_chunks")
def test_weight_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of chunks: a bf16 sum would stand still after some."""
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    inputs = random_inputs((800, 16, 8), torch.bfloat16)
    inputs[5] = torch.ones_like(inputs[5])
    exact = loss_and_grads(linear_ibot_loss_reference, *(x.double() for x in inputs))[2]
    got = loss_and_grads(linear_ibot_loss, *inputs)[2].double()
    assert (got - exact).norm() / exact.norm() < 4e-3


@pytest.mark.usefixtures("small_chunks")
def test_one_gradient_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frozen costs no product; nothing does when nothing is wanted; the inputs stay as they are."""
    inputs = random_inputs((17, 100, 16))
    kept = [x.clone() for x in inputs]
    value, *both = loss_and_grads(linear_ibot_loss, *inputs)
    for i in (0, 1):
        leaf = inputs[i].clone().requires_grad_()
        again = linear_ibot_loss(*inputs[:i], leaf, *inputs[i + 1 :], **TEMPS)
        assert torch.equal(torch.autograd.grad(again * UPSTREAM, leaf)[0], both[i])
    assert torch.equal(linear_ibot_loss(*inputs, **TEMPS), value)
    monkeypatch.delattr(module, "_add_product_")  # nothing may need it
    with torch.no_grad():
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        assert torch.equal(linear_ibot_loss(*leaves, *inputs[2:], **TEMPS), value)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))


def test_backward_once() -> None:
    inputs = random_inputs((4, 64, 16))
    leaf = inputs[0].requires_grad_()
    value = linear_ibot_loss(*inputs, **TEMPS)
    torch.autograd.grad(value, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        torch.autograd.grad(value, leaf)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("implementation", [linear_ibot_loss, linear_ibot_loss_reference], ids=["kernel", "reference"])
def test_autocast_changes_nothing(implementation: Callable[..., Tensor]) -> None:
    inputs = random_inputs((9, 64, 16))
    leaves = [x.requires_grad_() for x in inputs[:2]]
    values = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            values.append(implementation(*inputs, **TEMPS))
    assert torch.equal(*values)
    grads = (torch.autograd.grad(value, leaves) for value in values)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.usefixtures("small_chunks")
def test_targets_from_sinkhorn() -> None:
    """The caller makes all the teacher's logits for it, without gradient, before the loss."""
    inputs = random_inputs((17, 100, 16))
    teacher_logits = inputs[2] @ inputs[3].T
    row, column = sinkhorn(teacher_logits, temp=0.07)
    q = torch.exp(teacher_logits.double() / 0.07 + row[:, None] + column)
    log_p = torch.log_softmax((inputs[0] @ inputs[1].T).double() / 0.1, 1)
    inputs[4] = -0.07 * column
    got = linear_ibot_loss(*inputs, **TEMPS)
    torch.testing.assert_close(got.double(), -(inputs[5] * (q * log_p).sum(1)).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wanted", [True, False], ids=["with gradient", "without"])
@DTYPES
def test_memory_of_one_chunk(dtype: torch.dtype, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student's and teacher's logits of a chunk, the two gradients, on a CPU a bf16 chunk in fp32; not M x K."""
    M, K, D, rows = 128, 4096, 4, 8
    monkeypatch.setattr(module, "MAX_ROWS", rows)
    inputs = random_inputs((M, K, D), dtype)
    for x in inputs[:2]:
        x.requires_grad_(wanted)

    def work() -> None:
        value = linear_ibot_loss(*inputs, **TEMPS)
        if wanted:
            torch.autograd.grad(value, inputs[:2])

    chunk = rows * K * (dtype.itemsize * 2 + (4 if dtype == torch.bfloat16 and wanted else 0))
    grads = (M * D * dtype.itemsize + K * D * (4 + dtype.itemsize)) * wanted
    allowed = chunk + grads + 8 * (M + K)  # numbers of the rows, converted vectors
    assert allowed < M * K * dtype.itemsize / 2
    work()  # the first product on a GPU takes a workspace for good
    assert peak_bytes(work, torch.device(DEVICE)) <= allowed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"student": torch.zeros(1, 4, 8)}, r"student \(M, D\) and student_weight \(K, D\), not empty"),
    "no prototype": ({"student_weight": torch.zeros(0, 8)}, "not empty"),
    "other patches": ({"teacher": torch.zeros(3, 8)}, r"expected student.*\(3, 8\)"),
    "other prototypes": ({"teacher_weight": torch.zeros(6, 8)}, r"\(6, 8\)"),
    "center": ({"center": torch.zeros(4)}, r"\(4,\)"),
    "temperature": ({"teacher_temp": 0.0}, "teacher_temp=0.0"),
    "device": ({"center": torch.zeros(5, device="meta")}, "expected one device"),
    "two dtypes": ({"student_weight": torch.zeros(5, 8).bfloat16()}, "of one dtype"),
    "half": ({"student": torch.zeros(4, 8).half(), "student_weight": torch.zeros(5, 8).half()}, "bf16 or fp64"),
    "half weight": ({"weight": torch.zeros(4).half()}, "an fp32 center and weight"),
    "teacher's gradient": ({"teacher_weight": torch.zeros(5, 8, requires_grad=True)}, "detach them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    good: dict[str, Any] = {"student": torch.zeros(4, 8), "student_weight": torch.zeros(5, 8), "weight": torch.zeros(4)}
    good |= {"teacher": torch.zeros(4, 8), "teacher_weight": torch.zeros(5, 8), "center": torch.zeros(5), **TEMPS}
    bad, message = REFUSED[case]
    linear_ibot_loss(**good)
    with pytest.raises(ValueError, match=message):
        linear_ibot_loss(**{**good, **bad})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@DTYPES
def test_real_sizes(dtype: torch.dtype) -> None:
    check(random_inputs((3763, 8192, 256), dtype))

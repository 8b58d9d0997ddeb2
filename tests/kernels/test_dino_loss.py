"""dino_loss: the kernels and the reference against float64 and the published formula, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.losses import dino_loss as module
from fastdino_kernels.losses.dino_loss import dino_loss, dino_loss_reference
from fastdino_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.04}
UPSTREAM = -3.0  # what the loss is multiplied by before backward; neither 1 nor positive
BOTH = pytest.mark.parametrize("implementation", [dino_loss, dino_loss_reference], ids=["kernel", "reference"])

# (S, T, B, K), in blocks of 64: whole blocks, ragged rows of several blocks, every number of views, part of a block.
SHAPES = [
    (2, 2, 3, 192),
    (10, 2, 2, 257),
    (4, 2, 3, 200),
    (3, 1, 2, 150),
    (2, 1, 4, 7),
    (12, 2, 1, 129),
    (5, 1, 1, 256),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 and 32, so that a short row has several, and the two passes differ in them."""
    blocks = {"slice": {"BLOCK_K": 64, "num_warps": 1}, "gradient": {"BLOCK_K": 32, "num_warps": 2}}
    monkeypatch.setattr(module, "launch_config", lambda num_prototypes: blocks)


def random_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits of a dtype, and an fp32 center as large as they are."""
    S, T, B, K = shape
    generator = torch.Generator(DEVICE).manual_seed(S * B * K)
    made = [torch.randn(size, generator=generator, device=DEVICE) * scale for size in [(S, B, K), (T, B, K), (K,)]]
    return made[0].to(dtype), made[1].to(dtype), made[2]


def loss_and_grad(implementation: Callable[..., Tensor], student: Tensor, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    """The loss, and the gradient of UPSTREAM times the loss; the logits are not a leaf, as in a network."""
    leaf = student.detach().requires_grad_()
    value = implementation(leaf * 1, *args, **{**TEMPS, **kwargs})
    (value * UPSTREAM).backward()
    assert leaf.grad is not None
    return [value.detach(), leaf.grad]


def check(
    student: Tensor, teacher: Tensor, center: Tensor, implementation: Callable[..., Tensor] = dino_loss, **kwargs: Any
) -> None:
    """Judges loss and gradient of the kernel."""
    dtype = student.dtype
    exact = loss_and_grad(dino_loss_reference, student.double(), teacher.double(), center.double())
    plain = loss_and_grad(dino_loss_reference, student, teacher, center)
    fused = loss_and_grad(implementation, student, teacher, center, **kwargs)
    assert [x.dtype for x in fused] == [torch.float32, dtype]
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert_no_worse(got, ref, want)


def published_formula(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """Algorithm 1 of Caron et al. 2021, as printed there: H(t, s) = -(t * log s).sum(-1).mean(), over t != s."""
    pairs = []
    for t, teacher_view in enumerate(teacher):
        for s, student_view in enumerate(student):
            if t == s:
                continue  # "for all views but the same"
            target = torch.softmax((teacher_view - center) / TEMPS["teacher_temp"], dim=-1)
            predicted = torch.softmax(student_view / TEMPS["student_temp"], dim=-1)
            pairs.append(-(target * torch.log(predicted)).sum(dim=-1).mean())
    return sum(pairs[1:], pairs[0]) / len(pairs)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BOTH
def test_published_formula(implementation: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> None:
    inputs = random_inputs(shape)
    student, teacher, center = (x.double() for x in inputs)
    student.requires_grad_()
    want = published_formula(student, teacher, center)
    (want * UPSTREAM).backward()
    got, grad = loss_and_grad(implementation, *inputs)
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=0)
    assert student.grad is not None
    torch.testing.assert_close(grad.double(), student.grad, rtol=2e-5, atol=2e-6 * student.grad.abs().max().item())


@BOTH
def test_published_formula_in_float64(implementation: Callable[..., Tensor]) -> None:
    inputs = [x.double() for x in random_inputs((4, 2, 2, 30))]
    leaf = inputs[0].clone().requires_grad_()
    want = published_formula(leaf, *inputs[1:])
    (want * UPSTREAM).backward()
    for got, expected in zip(loss_and_grad(implementation, *inputs), [want.detach(), leaf.grad], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, int, int, int], dtype: torch.dtype, scale: float) -> None:
    check(*random_inputs(shape, dtype, scale))


@pytest.mark.parametrize("shape", [(3, 2, 2, 513), (2, 1, 2, 1024)], ids=str)
def test_kernel_with_its_own_blocks(shape: tuple[int, int, int, int]) -> None:
    check(*random_inputs(shape))


@pytest.mark.usefixtures("small_blocks")
def test_mixed_dtypes() -> None:
    student, teacher, center = random_inputs((3, 2, 2, 100))
    check(student, teacher.bfloat16(), center)
    check(student.bfloat16(), teacher, center)


@pytest.mark.usefixtures("small_blocks")
@BOTH
@pytest.mark.parametrize("offset", [1000, -1000])
def test_a_common_offset_costs_no_accuracy(implementation: Callable[..., Tensor], offset: int) -> None:
    """Softmax ignores it; sums of exponentials and products that are not taken about the maximum do not.

    Beside the formula, whose quotients are rounded; the interpreter rounds the products of the kernel's FMA.
    """
    student, teacher, center = random_inputs((3, 2, 2, 200))
    inputs = student + offset, teacher - offset, center
    exact = loss_and_grad(dino_loss_reference, *(x.double() for x in inputs))
    plain = loss_and_grad(lambda *x, **temps: published_formula(*x), *inputs)
    for got, ref, want in zip(loss_and_grad(implementation, *inputs), plain, exact, strict=True):
        assert_no_worse(got, ref, want)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strides(offset: int) -> None:
    """Image-major logits, and logits cut out of wider rows, aligned and not."""
    S, T, B, K = 4, 2, 3, 200
    student, teacher, center = random_inputs((S, T, B, K + 8))
    check(student.transpose(0, 1).contiguous().transpose(0, 1), teacher, center)
    cut = slice(offset, offset + K)
    check(student[..., cut], teacher[..., cut], center[cut])
    check(student.mT.contiguous().mT, teacher.mT.contiguous().mT, center)  # rows that are not contiguous
    check(student[:, :1].expand(S, B, -1), teacher[:1].expand(T, B, -1), center)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_inplace(dtype: torch.dtype) -> None:
    check(*random_inputs((4, 2, 3, 200), dtype), inplace_grad=True)
    student, teacher, center = random_inputs((5, 1, 2, 200), dtype)
    check(student.transpose(0, 1).contiguous().transpose(0, 1), teacher, center, inplace_grad=True)


@pytest.mark.usefixtures("small_blocks")
def test_inplace_consumes_the_logits() -> None:
    student, teacher, center = random_inputs((4, 2, 2, 100))
    want = loss_and_grad(dino_loss, student, teacher, center)[1]
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    other = logits.square().sum()  # saves the logits too
    value = dino_loss(logits, teacher, center, **TEMPS, inplace_grad=True)
    address = logits.data_ptr()
    (grad,) = torch.autograd.grad(value * UPSTREAM, logits, retain_graph=True)
    assert grad.data_ptr() == address
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=0)  # where it is taken in the forward pass, scaled later
    assert torch.equal(logits.detach(), grad)
    with pytest.raises(RuntimeError, match="already overwritten the student's logits"):
        torch.autograd.grad(value, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@BOTH
def test_autocast_changes_nothing(implementation: Callable[..., Tensor]) -> None:
    inputs = random_inputs((4, 2, 2, 100))
    leaf = inputs[0].requires_grad_()
    values = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            values.append(implementation(leaf, *inputs[1:], **TEMPS))
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value, leaf)[0] for value in values))


@pytest.mark.usefixtures("small_blocks")
@BOTH
def test_backward_twice_without_inplace(implementation: Callable[..., Tensor]) -> None:
    student, teacher, center = random_inputs((3, 2, 2, 100))
    kept = student.clone()
    value = implementation(student.requires_grad_(), teacher, center, **TEMPS)
    (scaled,) = torch.autograd.grad(value * UPSTREAM, student, retain_graph=True)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    # Not relative to an element alone: it is a difference of probabilities, each rounded after it is scaled.
    torch.testing.assert_close(scaled, first * UPSTREAM, rtol=1e-6, atol=1e-12)
    assert torch.equal(student.detach(), kept)
    assert value.shape == ()


def test_upstream_gradient_enters_before_rounding() -> None:
    """A fp16 gradient of 1 / K flushes to zero unless the loss scale is there first."""
    student, teacher, center = (x * 0.01 for x in random_inputs((3, 1, 2, 300), torch.float16))
    leaf = student.requires_grad_()
    value = dino_loss(leaf, teacher, center * 0, student_temp=100.0, teacher_temp=0.1)
    (small,) = torch.autograd.grad(value * 1e-3, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(value * 2.0**16, leaf)
    assert (small == 0).float().mean() > 0.9
    assert (scaled[1:] == 0).float().mean() < 0.01


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["student", "teacher", "center"])
@BOTH
def test_what_is_not_finite_shows(implementation: Callable[..., Tensor], where: str, value: float) -> None:
    student, teacher, center = random_inputs((3, 2, 2, 200))
    {"student": student[2, 1], "teacher": teacher[1, 1], "center": center}[where][130] = value
    with torch.no_grad():
        got = implementation(student, teacher, center, **TEMPS)
    masked = (where, value) in [("teacher", float("-inf")), ("center", float("inf"))]  # probability 0, which is finite
    assert torch.isfinite(got).item() is masked


@pytest.mark.usefixtures("small_blocks")
def test_a_block_of_impossible_prototypes() -> None:
    """A teacher's -inf is probability 0, also where a whole block holds nothing else."""
    student, teacher, center = random_inputs((3, 2, 2, 200))
    teacher[0, :, 60:140] = float("-inf")
    center[-1] = float("inf")
    check(student, teacher, center)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("grad_mode", [True, False])
def test_no_gradient_asked_for(grad_mode: bool) -> None:
    """Neither by the logits nor under no_grad: they stay as they are."""
    kept, teacher, center = random_inputs((3, 2, 2, 100))
    student = kept.clone() if grad_mode else kept.clone().requires_grad_() * 1
    with torch.set_grad_enabled(grad_mode):
        value = dino_loss(student, teacher, center, **TEMPS, inplace_grad=True)
    assert not value.requires_grad
    assert torch.equal(student.detach(), kept)


def test_bitwise_repeatable() -> None:
    inputs = random_inputs((4, 2, 2, 300))
    first, second = (loss_and_grad(dino_loss, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two dimensions": ({"student": torch.zeros(4, 8)}, r"student \(S, B, K\).*got student \(4, 8\)"),
    "other images": ({"teacher": torch.zeros(2, 3, 8)}, r"same B and K; got .*teacher \(2, 3, 8\)"),
    "other prototypes": ({"teacher": torch.zeros(2, 2, 9)}, "same B and K"),
    "center": ({"center": torch.zeros(9)}, r"one entry for each prototype; got .*center \(9,\)"),
    "three teacher views": ({"teacher": torch.zeros(3, 2, 8)}, "1 or 2 teacher views"),
    "no teacher view": ({"teacher": torch.zeros(0, 2, 8)}, "1 or 2 teacher views"),
    "33 views": ({"student": torch.zeros(33, 2, 8)}, "first of 2 to 32 student views"),
    "fewer views than the teacher": ({"student": torch.zeros(1, 2, 8)}, "first of 2 to 32"),
    "no pair": ({"student": torch.zeros(1, 2, 8), "teacher": torch.zeros(1, 2, 8)}, "first of 2 to 32"),
    "no image": ({"student": torch.zeros(4, 0, 8), "teacher": torch.zeros(2, 0, 8)}, "at least one image"),
    "student_temp": ({"student_temp": 0.0}, "must be positive; got student_temp=0.0"),
    "teacher_temp": ({"teacher_temp": -1.0}, "teacher_temp=-1.0"),
    "NaN temperature": ({"teacher_temp": float("nan")}, "teacher_temp=nan"),
    "integers": ({"student": torch.zeros(4, 2, 8, dtype=torch.int32)}, "got student torch.int32"),
    "half center": ({"center": torch.zeros(8, dtype=torch.float16)}, "an fp32 center"),
    "device": ({"center": torch.zeros(8, device="meta")}, "expected one device; got .*meta"),
    "teacher's gradient": ({"teacher": torch.zeros(2, 2, 8, requires_grad=True)}, "detach them"),
    "leaf": ({"student": torch.zeros(4, 2, 8, requires_grad=True), "inplace_grad": True}, "which is a leaf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    good = {"student": torch.zeros(4, 2, 8), "teacher": torch.zeros(2, 2, 8), "center": torch.zeros(8), **TEMPS}
    bad, message = REFUSED[case]
    dino_loss(**good)
    with pytest.raises(ValueError, match=message):
        dino_loss(**{**good, **bad})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(10, 2, 8, 65536), (12, 2, 3, 65537), (4, 1, 2, 262144), (32, 2, 2, 4096)], ids=str)
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_real_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype, inplace_grad: bool) -> None:
    check(*random_inputs(shape, dtype), inplace_grad=inplace_grad)


@pytest.mark.large
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
def test_offsets_past_32_bits() -> None:
    """2^31 elements and more: the last image of the last view, judged by itself."""
    S, T, B, K = 3, 1, 1025, 2**20
    student = torch.randn(S, B, K, device=DEVICE, dtype=torch.bfloat16)
    teacher = torch.randn(T, B, K, device=DEVICE, dtype=torch.bfloat16)
    center = torch.zeros(K, device=DEVICE)
    last = [student[:, -1:].clone(), teacher[:, -1:].clone(), center]
    value = dino_loss((student.requires_grad_() * 1), teacher, center, **TEMPS, inplace_grad=True)
    (grad,) = torch.autograd.grad(value, student)
    assert torch.isfinite(value)
    want = loss_and_grad(dino_loss_reference, *(x.double() for x in last))[1] / (UPSTREAM * B)
    plain = loss_and_grad(dino_loss_reference, *last)[1] / (UPSTREAM * B)
    assert_no_worse(grad[:, -1:], plain, want)

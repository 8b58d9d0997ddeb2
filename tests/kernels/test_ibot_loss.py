"""ibot_loss: the kernels against float64 and the published formula, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.losses import ibot_loss as module
from fastdino_kernels.losses.ibot_loss import ibot_loss, ibot_loss_reference
from fastdino_kernels.losses.sinkhorn import sinkhorn
from fastdino_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.07}
UPSTREAM = -3.0  # what the loss is multiplied by before backward; neither 1 nor positive
INPLACE = pytest.mark.parametrize("inplace_grad", [False, True])
SHAPES = [(5, 192), (9, 257), (4, 7), (1, 200)]  # (M, K), in blocks of 64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64, so that a short row has several."""
    monkeypatch.setattr(module, "launch_config", lambda num_prototypes: {"BLOCK_K": 64, "num_warps": 2})


def random_inputs(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """Logits of a dtype, an fp32 center as large as they are, and fp32 weights of which one is 0."""
    M, K = shape
    generator = torch.Generator(DEVICE).manual_seed(M * K)
    student, teacher, center = (
        torch.randn(size, generator=generator, device=DEVICE) * scale for size in [(M, K), (M, K), (K,)]
    )
    weight = torch.rand(M, generator=generator, device=DEVICE)
    weight[2:3] = 0
    return [student.to(dtype), teacher.to(dtype), center, weight]


def loss_and_grad(
    implementation: Callable[..., Tensor], student: Tensor, *args: Tensor, upstream: float = UPSTREAM, **kwargs: Any
) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    value = implementation(leaf * 1, *args, **TEMPS, **kwargs)
    (value * upstream).backward()
    assert leaf.grad is not None
    return [value.detach(), leaf.grad]


def check(inputs: list[Tensor], inplace_grad: bool = False) -> None:
    """Judges loss and gradient of the kernel. In place, plain torch too rounds the gradient, scales it and rounds."""
    exact = loss_and_grad(ibot_loss_reference, *(x.double() for x in inputs))
    if inplace_grad:
        loss, grad = loss_and_grad(ibot_loss_reference, *inputs, upstream=1)
        plain = [loss, grad * UPSTREAM]
    else:
        plain = loss_and_grad(ibot_loss_reference, *inputs)
    fused = loss_and_grad(ibot_loss, *inputs, inplace_grad=inplace_grad)
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert got.dtype == ref.dtype
        assert_no_worse(got, ref, want)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", [ibot_loss, ibot_loss_reference], ids=["kernel", "reference"])
def test_published_formula(implementation: Callable[..., Tensor]) -> None:
    """The mean over images of the mean over their masked patches of -P_t log P_s, patch by patch in float64."""
    masked_patches = [3, 1, 4]  # of each image
    student, teacher, center, _ = random_inputs((8, 200))
    leaf = student.double().requires_grad_()
    of_image = torch.split(torch.arange(8), masked_patches)
    want = torch.stack(
        [
            torch.stack(
                [
                    -(
                        torch.softmax((teacher[patch].double() - center) / 0.07, 0)
                        * torch.log(torch.softmax(leaf[patch] / 0.1, 0))
                    ).sum()
                    for patch in patches
                ]
            ).mean()
            for patches in of_image
        ]
    ).mean()
    (want * UPSTREAM).backward()
    weight = torch.cat([torch.full((n,), 1 / (3 * n)) for n in masked_patches]).to(DEVICE)
    got, grad = loss_and_grad(implementation, student, teacher, center, weight)
    assert leaf.grad is not None
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-5, atol=2e-6 * leaf.grad.abs().max().item())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@INPLACE
def test_kernel(shape: tuple[int, int], dtype: torch.dtype, scale: float, inplace_grad: bool) -> None:
    check(random_inputs(shape, dtype, scale), inplace_grad=inplace_grad)


@INPLACE
def test_kernel_with_its_own_blocks(inplace_grad: bool) -> None:
    check(random_inputs((2, 8300)), inplace_grad=inplace_grad)


@pytest.mark.usefixtures("small_blocks")
def test_backward_twice_without_inplace() -> None:
    student, *others = random_inputs((5, 200))
    kept = student.clone()
    value = ibot_loss(student.requires_grad_(), *others, **TEMPS)
    (scaled,) = torch.autograd.grad(value * UPSTREAM, student, retain_graph=True)
    (grad,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(scaled, grad * UPSTREAM, rtol=1e-6, atol=1e-12)
    assert torch.equal(student.detach(), kept)


def test_upstream_gradient_enters_before_rounding() -> None:
    """A fp16 gradient of 1 / K flushes to zero unless the loss scale is there first."""
    student, teacher, center, weight = random_inputs((4, 300), torch.float16, 0.01)
    leaf = student.requires_grad_()
    value = ibot_loss(leaf, teacher, center, weight, student_temp=100.0, teacher_temp=0.1) * 1e-3
    (scaled,) = torch.autograd.grad(value * 2.0**16, leaf)
    assert (scaled[[0, 1, 3]] == 0).float().mean() < 0.01


@pytest.mark.usefixtures("small_blocks")
def test_strides_and_inplace() -> None:
    student, teacher, center, weight = random_inputs((6, 208))
    weight[2] = 1
    check([student[::2], teacher[::2], center, weight[::2]])
    check([student[:, 3:203], teacher[:, 3:203], center[3:203], weight], inplace_grad=True)
    check([student.mT.contiguous().mT, teacher.mT.contiguous().mT, center, weight])
    logits = student.clone().requires_grad_() * 1
    value = ibot_loss(logits, teacher, center, weight, **TEMPS, inplace_grad=True)
    (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="already overwritten"):
        torch.autograd.grad(value, logits)


@pytest.mark.usefixtures("small_blocks")
def test_no_grad_leaves_the_logits() -> None:
    kept, *others = random_inputs((5, 100))
    student = kept.clone().requires_grad_() * 1
    with torch.no_grad():
        ibot_loss(student, *others, **TEMPS, inplace_grad=True)
    assert torch.equal(student.detach(), kept)


@pytest.mark.usefixtures("small_blocks")
def test_targets_from_sinkhorn() -> None:
    """The column scaling is all that the loss needs: softmax supplies the row's."""
    student, teacher, _, weight = random_inputs((9, 150))
    row, column = sinkhorn(teacher.double(), temp=0.07)
    q = torch.exp(teacher.double() / 0.07 + row[:, None] + column)
    want = -(weight * (q * torch.log_softmax(student.double() / 0.1, 1)).sum(1)).sum()
    got = ibot_loss(student, teacher, (-0.07 * column).float(), weight, **TEMPS)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_what_is_not_finite_shows(which: int, value: float) -> None:
    inputs = random_inputs((4, 200))
    inputs[which][3, 130] = value
    assert not torch.isfinite(ibot_loss(*inputs, **TEMPS))


@pytest.mark.usefixtures("small_blocks")
def test_a_gradient_of_one_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward of the plain loss writes nothing: the gradient of the forward pass stays, bit for bit."""
    student, *others = random_inputs((4, 200))
    logits = student.requires_grad_() * 1
    value = ibot_loss(logits, *others, **TEMPS, inplace_grad=True)
    made = logits.detach().clone()
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.equal(grad, made)
    exact = loss_and_grad(ibot_loss_reference, *(x.detach().double() for x in (student, *others)))[1] / UPSTREAM
    torch.testing.assert_close(made.double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@INPLACE
def test_a_teachers_minus_infinity_is_a_probability_of_zero(inplace_grad: bool) -> None:
    """Also where it fills the first block, so that nothing has a maximum yet."""
    student, teacher, center, weight = random_inputs((4, 200))
    teacher[1, :70] = -torch.inf
    check([student, teacher, center, weight], inplace_grad=inplace_grad)


def test_no_masked_patch() -> None:
    """A rank may have none: the loss is 0, and so is its gradient."""
    value, grad = loss_and_grad(ibot_loss, *random_inputs((0, 64)))
    assert value == 0
    assert grad.shape == (0, 64)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"student": torch.zeros(1, 4, 8)}, r"expected student \(M, K\).*got student \(1, 4, 8\)"),
    "other patches": ({"teacher": torch.zeros(3, 8)}, r"teacher \(3, 8\)"),
    "center": ({"center": torch.zeros(4)}, r"center \(4,\)"),
    "weight": ({"weight": torch.zeros(8)}, r"weight \(8,\)"),
    "no prototype": ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0), "center": torch.zeros(0)}, "got"),
    "temperature": ({"teacher_temp": 0.0}, "teacher_temp=0.0"),
    "device": ({"center": torch.zeros(8, device="meta")}, "expected one device"),
    "integers": ({"teacher": torch.zeros(4, 8, dtype=torch.int32)}, "floating-point logits"),
    "half weight": ({"weight": torch.zeros(4, dtype=torch.float16)}, "an fp32 center and weight"),
    "teacher's gradient": ({"teacher": torch.zeros(4, 8, requires_grad=True)}, "detach them"),
    "leaf": ({"student": torch.zeros(4, 8, requires_grad=True), "inplace_grad": True}, "a leaf tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    zeros = {"student": torch.zeros(4, 8), "teacher": torch.zeros(4, 8), "center": torch.zeros(8)}
    good = {**zeros, "weight": torch.zeros(4), **TEMPS}
    bad, message = REFUSED[case]
    ibot_loss(**good)
    with pytest.raises(ValueError, match=message):
        ibot_loss(**{**good, **bad})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(500, 65536), (65, 65537), (70000, 1000)], ids=str)
@INPLACE
def test_real_sizes(shape: tuple[int, int], dtype: torch.dtype, inplace_grad: bool) -> None:
    check(random_inputs(shape, dtype), inplace_grad=inplace_grad)

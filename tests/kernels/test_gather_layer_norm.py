"""gather_layer_norm: the kernels against float64 and the formula, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm, gather_layer_norm_reference
from tests.kernels.sample_drop import (
    DEVICE,
    DTYPES,
    OWN_BLOCKS,
    REAL,
    SHAPES,
    Inputs,
    Shape,
    check,
    strided_inputs,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOTH = pytest.mark.parametrize(
    "implementation", [gather_layer_norm, gather_layer_norm_reference], ids=["kernel", "reference"]
)


def gathered(implementation: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The result and the gradients of x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    y = implementation(leaves[0], inputs.rows, *leaves[1:], eps=1e-3)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad_y.to(y.dtype))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    inputs = Inputs(shape, dtype, vectors)
    check(gathered, gather_layer_norm, gather_layer_norm_reference, inputs)


@pytest.mark.parametrize("shape", OWN_BLOCKS, ids=str)
def test_kernel_with_its_own_blocks(shape: Shape) -> None:
    check(gathered, gather_layer_norm, gather_layer_norm_reference, Inputs(shape, torch.float32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_formula(implementation: Callable[..., Tensor]) -> None:
    inputs = Inputs((5, 3, 7, 40), torch.float32)
    leaf = inputs.x.double().requires_grad_()
    kept = leaf[inputs.rows]
    mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, correction=0)
    want = (kept - mean) / (variance + 1e-3).sqrt() * inputs.weight + inputs.bias
    (want * inputs.grad_y).sum().backward()
    y, grad_x, *_ = (tensor.cpu() for tensor in gathered(implementation, inputs.to(DEVICE)))
    assert leaf.grad is not None
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    dropped = [b for b in range(5) if b not in inputs.rows]
    assert not grad_x[dropped].any()


@pytest.mark.usefixtures("small_tiles")
def test_strides() -> None:
    dense, strided = (gathered(gather_layer_norm, inputs.to(DEVICE)) for inputs in strided_inputs())
    for got, want in zip(strided, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_image_kept() -> None:
    assert gathered(gather_layer_norm, Inputs((3, 0, 5, 8), torch.float32).to(DEVICE))[0].shape == (0, 5, 8)


@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_image() -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    kept, dropped = int(inputs.rows[1]), next(b for b in range(4) if b not in inputs.rows)
    inputs.x[dropped] = float("nan")
    assert all(torch.isfinite(result).all() for result in gathered(gather_layer_norm, inputs))
    inputs.x[kept, 3, 2] = float("nan")
    y, grad_x, *_ = gathered(gather_layer_norm, inputs)
    assert y[1, 3].isnan().all()
    assert grad_x[kept, 3].isnan().all()
    assert y.isnan().sum() == grad_x.isnan().sum() == 20


def test_gradients_of_the_reference() -> None:
    inputs = Inputs((3, 2, 2, 5), torch.float32).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    assert torch.autograd.gradcheck(lambda x, *vectors: gather_layer_norm(x, inputs.rows, *vectors), leaves)


X, ROWS, VECTOR = torch.zeros(4, 3, 8), torch.tensor([2, 0]), torch.zeros(8)
REFUSED: dict[str, tuple[Any, ...]] = {
    "tokens": (X[0], ROWS, VECTOR, VECTOR, r"x \(B, N, D\), not empty; got \(3, 8\)"),
    "nothing": (X[:0], ROWS[:0], VECTOR, VECTOR, r"not empty; got \(0, 3, 8\)"),
    "integers": (X.int(), ROWS, VECTOR, VECTOR, "floating-point x"),
    "int32 rows": (X, ROWS.int(), VECTOR, VECTOR, "int64 indices of the 4 images"),
    "more rows than images": (X, torch.arange(5), VECTOR, VECTOR, r"got \(5,\)"),
    "rows elsewhere": (X, ROWS.to("meta"), VECTOR, VECTOR, "on meta"),
    "weight": (X, ROWS, VECTOR[:7], VECTOR, r"weight \(8,\) on cpu; got \(7,\)"),
    "bias": (X, ROWS, VECTOR, VECTOR.int(), r"bias .* torch.int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    *arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        gather_layer_norm(*arguments)


def test_refuses_no_eps() -> None:
    with pytest.raises(ValueError, match="eps > 0"):
        gather_layer_norm(X, ROWS, VECTOR, VECTOR, eps=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape: Shape, dtype: torch.dtype) -> None:
    check(gathered, gather_layer_norm, gather_layer_norm_reference, Inputs(shape, dtype))

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
    LENGTHS,
    OWN_BLOCKS,
    REAL,
    REFUSED,
    ROWS,
    SHAPES,
    VECTOR,
    Inputs,
    Shape,
    X,
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
    y = implementation(leaves[0], inputs.lengths, inputs.rows, *leaves[1:], eps=1e-3)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad_y.to(y.dtype))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_kernel(shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    inputs = Inputs(shape, dtype, vectors)
    check(gathered, gather_layer_norm, gather_layer_norm_reference, inputs)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_feature(dtype: torch.dtype) -> None:
    """It is its own mean: the bias comes out, and the gradient is g - g, of which an FMA rounds but one."""
    inputs = Inputs(SHAPES[-1], dtype, torch.float32)
    y, grad_x, grad_weight, _ = gathered(gather_layer_norm, inputs.to(DEVICE))
    assert torch.equal(y.cpu(), inputs.bias[None].to(dtype))
    assert grad_weight == 0
    cancels = inputs.grad_y.float() * inputs.weight / 1e-3**0.5
    assert grad_x.abs().max().cpu() <= 2.0**-23 * cancels.abs().max()


@pytest.mark.parametrize("shape", OWN_BLOCKS, ids=str)
def test_kernel_with_its_own_blocks(shape: Shape) -> None:
    check(gathered, gather_layer_norm, gather_layer_norm_reference, Inputs(shape, torch.float32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_formula(implementation: Callable[..., Tensor]) -> None:
    """Sequence by sequence, in the order of the rows; nothing comes back to what is dropped."""
    inputs = Inputs((((5, 3, 7), (4, 2, 3)), 40), torch.float32)
    leaf = inputs.x.double().requires_grad_()
    want = torch.zeros(len(inputs.grad_y), 40, dtype=torch.float64)
    for tokens, kept, _ in inputs.sequences():
        if kept is not None:
            x = leaf[tokens]
            mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
            want[kept] = (x - mean) / (variance + 1e-3).sqrt() * inputs.weight + inputs.bias
    (want * inputs.grad_y).sum().backward()
    y, grad_x, *_ = (tensor.cpu() for tensor in gathered(implementation, inputs.to(DEVICE)))
    assert leaf.grad is not None
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    assert not any(grad_x[tokens].any() for tokens, kept, _ in inputs.sequences() if kept is None)


@pytest.mark.usefixtures("small_tiles")
def test_strides() -> None:
    dense, strided = (gathered(gather_layer_norm, inputs.to(DEVICE)) for inputs in strided_inputs())
    for got, want in zip(strided, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_sequence() -> None:
    inputs = Inputs((((4, 2, 9), (3, 1, 5)), 20), torch.float32).to(DEVICE)
    (kept, place), dropped = (
        next((x, y) for x, y, _ in inputs.sequences() if y),
        [x for x, y, _ in inputs.sequences() if not y],
    )
    for tokens in dropped:
        inputs.x[tokens] = float("nan")
    assert all(torch.isfinite(result).all() for result in gathered(gather_layer_norm, inputs))
    inputs.x[kept.start + 3, 2] = float("nan")
    y, grad_x, *_ = gathered(gather_layer_norm, inputs)
    assert y[place.start + 3].isnan().all()
    assert grad_x[kept.start + 3].isnan().all()
    assert y.isnan().sum() == grad_x.isnan().sum() == 20


def test_gradients_of_the_reference() -> None:
    inputs = Inputs((((3, 2, 2), (2, 1, 1)), 5), torch.float32).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    assert torch.autograd.gradcheck(
        lambda x, *vectors: gather_layer_norm(x, inputs.lengths, inputs.rows, *vectors), leaves
    )


OF_ITS_OWN: dict[str, tuple[Any, ...]] = {
    "weight": (VECTOR[:7], VECTOR, r"weight \(8,\) on cpu; got \(7,\)"),
    "bias": (VECTOR, VECTOR.int(), r"bias .* torch.int32"),
}


@pytest.mark.parametrize("case", [*REFUSED, *OF_ITS_OWN])
def test_refusals(case: str) -> None:
    x, lengths, rows, message = REFUSED.get(case, (X, LENGTHS, ROWS, None))
    weight, bias, message = OF_ITS_OWN.get(case, (VECTOR, VECTOR, message))
    with pytest.raises(ValueError, match=message):
        gather_layer_norm(x, lengths, rows, weight, bias)


def test_refuses_no_eps() -> None:
    with pytest.raises(ValueError, match="eps > 0"):
        gather_layer_norm(X, LENGTHS, ROWS, VECTOR, VECTOR, eps=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape: Shape, dtype: torch.dtype) -> None:
    check(gathered, gather_layer_norm, gather_layer_norm_reference, Inputs(shape, dtype))

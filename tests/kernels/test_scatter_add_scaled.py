"""scatter_add_scaled: the kernels against float64 and the formula, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm, gather_layer_norm_reference
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled, scatter_add_scaled_reference
from fastdino_kernels.testing import assert_no_worse
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
    "implementation", [scatter_add_scaled, scatter_add_scaled_reference], ids=["kernel", "reference"]
)


def scattered(implementation: Callable[..., Tensor], inputs: Inputs, **kwargs: Any) -> list[Tensor]:
    """The result and the gradients of x, branch and layer_scale."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    out = implementation(leaves[0] * 1, inputs.rows, *leaves[1:], scale=-1.7, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    inputs = Inputs(shape, dtype, vectors)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs, inplace=True)


@pytest.mark.parametrize("shape", OWN_BLOCKS, ids=str)
def test_kernel_with_its_own_blocks(shape: Shape) -> None:
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, Inputs(shape, torch.float32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_formula(implementation: Callable[..., Tensor]) -> None:
    """Image by image; the gradients of what is dropped; what is dropped stays to the bit, -0 included."""
    inputs = Inputs((5, 3, 7, 40), torch.float32)
    inputs.x[inputs.x.abs() < 0.1] = -0.0
    want, grad_branch = inputs.x.double().clone(), torch.empty(3, 7, 40, dtype=torch.float64)
    grad_layer_scale = torch.zeros(40, dtype=torch.float64)
    for m, image in enumerate(inputs.rows):
        want[image] += -1.7 * inputs.layer_scale.double() * inputs.branch[m]
        grad_branch[m] = -1.7 * inputs.layer_scale.double() * inputs.grad[image]
        grad_layer_scale += (-1.7 * inputs.branch[m].double() * inputs.grad[image]).sum(0)
    out, *grads = (tensor.cpu() for tensor in scattered(implementation, inputs.to(DEVICE)))
    for got, expected in zip([out, *grads], [want, inputs.grad.double(), grad_branch, grad_layer_scale], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    dropped = [b for b in range(5) if b not in inputs.rows]
    assert torch.equal(out[dropped].view(torch.int32), inputs.x[dropped].view(torch.int32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_without_layer_scale(implementation: Callable[..., Tensor]) -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32)
    ones = torch.ones(20)
    branch = inputs.branch.to(DEVICE).requires_grad_()
    x, rows, grad = (tensor.to(DEVICE) for tensor in (inputs.x, inputs.rows, inputs.grad))
    out = implementation(x, rows, branch, scale=2.0)
    (grad_branch,) = torch.autograd.grad(out, branch, grad)
    inputs.layer_scale = ones
    want = scatter_add_scaled_reference(inputs.x, inputs.rows, inputs.branch, ones, 2.0)
    torch.testing.assert_close(out.detach().cpu(), want)
    torch.testing.assert_close(grad_branch.cpu(), 2 * inputs.grad[inputs.rows])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_mixed_dtypes(implementation: Callable[..., Tensor], x_dtype: torch.dtype) -> None:
    """A branch of another dtype than the residual stream, whose gradient comes back in its own."""
    inputs = Inputs((4, 2, 9, 20), torch.float32)
    branch = inputs.branch.to(DEVICE, torch.bfloat16).requires_grad_()
    moved = inputs.to(DEVICE)
    out = implementation(moved.x.to(x_dtype), moved.rows, branch, moved.layer_scale, 2.0)
    (grad_branch,) = torch.autograd.grad(out, branch, moved.grad.to(x_dtype))
    assert (out.dtype, grad_branch.dtype) == (x_dtype, torch.bfloat16)
    want = scatter_add_scaled_reference(inputs.x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0)
    torch.testing.assert_close(out.detach().cpu().float(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.usefixtures("small_tiles")
def test_strides() -> None:
    dense, strided = (scattered(scatter_add_scaled, inputs.to(DEVICE)) for inputs in strided_inputs())
    for got, want in zip(strided, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_in_place(implementation: Callable[..., Tensor]) -> None:
    """The same tensor comes back, carries the gradient of what was added, and autograd refuses its old values."""
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    x, want = inputs.x.clone(), implementation(inputs.x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0)
    out = implementation(x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0, inplace=True)
    assert out is x
    assert torch.equal(x, want)
    leaf = inputs.x.clone().requires_grad_()
    x = leaf * 1
    square = (x * x).sum()
    branch = inputs.branch.clone().requires_grad_()
    implementation(x, inputs.rows, branch, None, 2.0, inplace=True)
    (grad_branch,) = torch.autograd.grad(x, branch, inputs.grad, retain_graph=True)
    torch.testing.assert_close(grad_branch, 2 * inputs.grad[inputs.rows])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.usefixtures("small_tiles")
def test_frozen_layer_scale_keeps_no_branch() -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    branch = inputs.branch.requires_grad_()
    out = scatter_add_scaled(inputs.x, inputs.rows, branch, inputs.layer_scale)
    assert branch.shape not in [tensor.shape for tensor in out.grad_fn.saved_tensors if tensor is not None]
    out.sum().backward()
    assert branch.grad is not None


@pytest.mark.usefixtures("small_tiles")
def test_a_residual_block() -> None:
    """Both ends of a branch, and x's gradient from both, against the whole block in float64."""
    inputs = Inputs((6, 4, 9, 24), torch.float32)

    def block(gather: Any, scatter: Any, inputs: Inputs) -> list[Tensor]:
        leaf = inputs.x.detach().requires_grad_()
        branch = torch.tanh(gather(leaf, inputs.rows, inputs.weight, inputs.bias))
        out = scatter(leaf, inputs.rows, branch, inputs.layer_scale, 1.5)
        return [out.detach(), *torch.autograd.grad(out, leaf, inputs.grad)]

    references = gather_layer_norm_reference, scatter_add_scaled_reference
    exact, plain = block(*references, inputs.to(torch.float64)), block(*references, inputs)
    fused = block(gather_layer_norm, scatter_add_scaled, inputs.to(DEVICE))
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert_no_worse(got.cpu(), ref, want)


def test_no_image_kept() -> None:
    inputs = Inputs((3, 0, 5, 8), torch.float32).to(DEVICE)
    assert torch.equal(scattered(scatter_add_scaled, inputs)[0], inputs.x)


def test_gradients_of_the_reference() -> None:
    inputs = Inputs((3, 2, 2, 5), torch.float32).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    assert torch.autograd.gradcheck(lambda x, *rest: scatter_add_scaled(x, inputs.rows, *rest, 1.5), leaves)


X, ROWS, BRANCH, VECTOR = torch.zeros(4, 3, 8), torch.tensor([2, 0]), torch.zeros(2, 3, 8), torch.zeros(8)
REFUSED: dict[str, tuple[Any, ...]] = {
    "branch": (X, ROWS, X, VECTOR, r"branch \(M, N, D\) for 2 rows of x \(4, 3, 8\)"),
    "layer_scale": (X, ROWS, BRANCH, VECTOR[:1], r"layer_scale \(8,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    *arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        scatter_add_scaled(*arguments)


@pytest.mark.parametrize("x", [X.clone().requires_grad_(), X.mT.contiguous().mT], ids=["leaf", "strided"])
def test_refuses_to_write_in_place(x: Tensor) -> None:
    with pytest.raises(ValueError, match="inplace=True needs a contiguous x"):
        scatter_add_scaled(x, ROWS, BRANCH, inplace=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape: Shape, dtype: torch.dtype) -> None:
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, Inputs(shape, dtype))

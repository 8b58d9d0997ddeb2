"""scatter_add_scaled: the kernels against float64 and the formula, and what it refuses."""

import itertools
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
    "implementation", [scatter_add_scaled, scatter_add_scaled_reference], ids=["kernel", "reference"]
)


def scattered(implementation: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The result and the gradients of x, branch and layer_scale."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    out = implementation(leaves[0], inputs.lengths, inputs.rows, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    inputs = Inputs(shape, dtype, vectors)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs)


@pytest.mark.parametrize("shape", OWN_BLOCKS, ids=str)
def test_kernel_with_its_own_blocks(shape: Shape) -> None:
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, Inputs(shape, torch.float32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_formula(implementation: Callable[..., Tensor]) -> None:
    """Sequence by sequence, scaled by its own group's n / M; what is dropped stays to the bit, -0 included."""
    inputs = Inputs((((5, 3, 7), (4, 1, 3)), 40), torch.float32)
    inputs.x[inputs.x.abs() < 0.1] = -0.0
    want, grad_branch = inputs.x.double().clone(), torch.empty(len(inputs.branch), 40, dtype=torch.float64)
    grad_layer_scale = torch.zeros(40, dtype=torch.float64)
    for tokens, kept, scale in inputs.sequences():
        if kept is not None:
            want[tokens] += scale * inputs.layer_scale.double() * inputs.branch[kept]
            grad_branch[kept] = scale * inputs.layer_scale.double() * inputs.grad[tokens]
            grad_layer_scale += (scale * inputs.branch[kept].double() * inputs.grad[tokens]).sum(0)
    out, *grads = (tensor.cpu() for tensor in scattered(implementation, inputs.to(DEVICE)))
    for got, expected in zip([out, *grads], [want, inputs.grad.double(), grad_branch, grad_layer_scale], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for tokens, kept, _ in inputs.sequences():
        assert kept is not None or torch.equal(out[tokens].view(torch.int32), inputs.x[tokens].view(torch.int32))


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_the_branch_is_whole_on_average(implementation: Callable[..., Tensor]) -> None:
    """Every subset of a group as often as every other one: on average each sequence gets its branch once."""
    n, M = 4, 3
    whole = torch.randn(n * 2, 5)
    subsets = [torch.tensor(rows) for rows in itertools.combinations(range(n), M)]
    total = torch.zeros(n * 2, 5)
    for rows in subsets:
        branch = whole.view(n, 2, 5)[rows].flatten(0, 1)
        total += implementation(
            torch.zeros(n * 2, 5, device=DEVICE), [(n, 2)], [rows.to(DEVICE)], branch.to(DEVICE)
        ).cpu()
    torch.testing.assert_close(total / len(subsets), whole)


@pytest.mark.usefixtures("small_tiles")
@BOTH
def test_without_layer_scale(implementation: Callable[..., Tensor]) -> None:
    inputs = Inputs((((4, 2, 9), (3, 2, 1)), 20), torch.float32)
    inputs.layer_scale = torch.ones(20)
    want, _, want_grad, _ = scattered(scatter_add_scaled_reference, inputs)
    moved = inputs.to(DEVICE)
    branch = moved.branch.requires_grad_()
    out = implementation(moved.x, moved.lengths, moved.rows, branch)
    (grad_branch,) = torch.autograd.grad(out, branch, moved.grad)
    torch.testing.assert_close(out.detach().cpu(), want)
    torch.testing.assert_close(grad_branch.cpu(), want_grad)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_mixed_dtypes(implementation: Callable[..., Tensor], x_dtype: torch.dtype) -> None:
    """A branch of another dtype than the residual stream, whose gradient comes back in its own."""
    inputs = Inputs((((4, 2, 9), (3, 2, 1)), 20), torch.float32)
    branch = inputs.branch.to(DEVICE, torch.bfloat16).requires_grad_()
    moved = inputs.to(DEVICE)
    out = implementation(moved.x.to(x_dtype), moved.lengths, moved.rows, branch, moved.layer_scale)
    (grad_branch,) = torch.autograd.grad(out, branch, moved.grad.to(x_dtype))
    assert (out.dtype, grad_branch.dtype) == (x_dtype, torch.bfloat16)
    want, *_ = scattered(scatter_add_scaled_reference, inputs)
    torch.testing.assert_close(out.detach().cpu().float(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.usefixtures("small_tiles")
def test_strides() -> None:
    dense, strided = (scattered(scatter_add_scaled, inputs.to(DEVICE)) for inputs in strided_inputs())
    for got, want in zip(strided, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_frozen_layer_scale_keeps_no_branch() -> None:
    inputs = Inputs((((4, 2, 9), (3, 2, 1)), 20), torch.float32).to(DEVICE)
    branch = inputs.branch.requires_grad_()
    out = scatter_add_scaled(inputs.x, inputs.lengths, inputs.rows, branch, inputs.layer_scale)
    assert branch.shape not in [tensor.shape for tensor in out.grad_fn.saved_tensors if tensor is not None]
    out.sum().backward()
    assert branch.grad is not None


@pytest.mark.usefixtures("small_tiles")
def test_a_residual_block() -> None:
    """Both ends of a branch, and x's gradient from both, against the whole block in float64."""
    inputs = Inputs((((6, 4, 9), (5, 2, 3)), 24), torch.float32)

    def block(gather: Any, scatter: Any, inputs: Inputs) -> list[Tensor]:
        leaf, kept = inputs.x.detach().requires_grad_(), (inputs.lengths, inputs.rows)
        branch = torch.tanh(gather(leaf, *kept, inputs.weight, inputs.bias))
        out = scatter(leaf, *kept, branch, inputs.layer_scale)
        return [out.detach(), *torch.autograd.grad(out, leaf, inputs.grad)]

    references = gather_layer_norm_reference, scatter_add_scaled_reference
    exact, plain = block(*references, inputs.to(torch.float64)), block(*references, inputs)
    fused = block(gather_layer_norm, scatter_add_scaled, inputs.to(DEVICE))
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert_no_worse(got.cpu(), ref, want)


def test_gradients_of_the_reference() -> None:
    inputs = Inputs((((3, 2, 2), (2, 1, 1)), 5), torch.float32).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    assert torch.autograd.gradcheck(lambda x, *rest: scatter_add_scaled(x, inputs.lengths, inputs.rows, *rest), leaves)


BRANCH = torch.zeros(7, 8)
OF_ITS_OWN: dict[str, tuple[Any, ...]] = {
    "branch": (X, VECTOR, r"branch \(7, 8\), the tokens of the kept sequences, on cpu; got \(14, 8\)"),
    "branch of integers": (BRANCH.int(), VECTOR, r"branch .* torch.int32"),
    "layer_scale": (BRANCH, VECTOR[:1], r"layer_scale \(8,\)"),
}


@pytest.mark.parametrize("case", [*REFUSED, *OF_ITS_OWN])
def test_refusals(case: str) -> None:
    x, lengths, rows, message = REFUSED.get(case, (X, LENGTHS, ROWS, None))
    branch, layer_scale, message = OF_ITS_OWN.get(case, (BRANCH, VECTOR, message))
    with pytest.raises(ValueError, match=message):
        scatter_add_scaled(x, lengths, rows, branch, layer_scale)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape: Shape, dtype: torch.dtype) -> None:
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, Inputs(shape, dtype))

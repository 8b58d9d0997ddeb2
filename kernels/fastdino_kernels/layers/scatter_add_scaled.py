"""The end of a residual branch that ran on some images of the batch: LayerScale, scale and sum in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype, operator
from fastdino_kernels.layers._sample_drop import (
    check,
    find_row,
    launch_config,
    load_vector,
    partial_sums,
    search_block,
    takes_kernel,
    tile,
)


def scatter_add_scaled(
    x: Tensor,
    rows: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None = None,
    scale: float = 1.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """x with x[rows] += scale * layer_scale * branch: LayerScale and the residual sum of the kept images, in one pass.

    Args:
        x: (B, N, D) residual stream of B images; fp32, bf16, fp16 or fp64.
        rows: (M,) int64 images that are kept, each at most once, from 0 to B - 1. Neither is checked.
        branch: (M, N, D) the branch's output for them, of any floating dtype.
        layer_scale: (D,) factor of each feature, or None for 1.
        scale: B / M keeps the expectation over the dropped images.
        inplace: write into x (contiguous), touching the kept images alone. Autograd then refuses the backward pass of
            whatever saved x before, :func:`gather_layer_norm` among others: meant for where no gradient is due.

    Returns (B, N, D) in x's dtype (x itself if inplace) with gradients for ``x`` (the incoming one, not copied),
    ``branch`` and ``layer_scale``; the sum is fp32 (fp64 for fp64) and rounds once.
    Raises ValueError when shapes, dtypes or devices do not fit, or x cannot be written in place.
    Source: Touvron et al. 2021 (CaiT), equation 6; Huang et al. 2016, equation 5, on a subset of the batch (DINOv2).
    """
    check(x, rows, {} if layer_scale is None else {"layer_scale": layer_scale})
    if branch.shape != (len(rows), *x.shape[1:]) or not branch.is_floating_point() or branch.device != x.device:
        raise ValueError(
            f"expected branch (M, N, D) for {len(rows)} rows of x {tuple(x.shape)} on {x.device}; "
            f"got {tuple(branch.shape)} {branch.dtype} on {branch.device}"
        )
    if inplace and (not x.is_contiguous() or (x.is_leaf and x.requires_grad)):
        raise ValueError("inplace=True needs a contiguous x that is no leaf requiring gradient: pass inplace=False")
    if takes_kernel(x, rows, branch, layer_scale):
        return _ScatterAddScaled.apply(x, rows, branch, layer_scale, scale, inplace)
    return scatter_add_scaled_reference(x, rows, branch, layer_scale, scale, inplace=inplace)


def scatter_add_scaled_reference(
    x: Tensor,
    rows: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None = None,
    scale: float = 1.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """:func:`scatter_add_scaled` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    factor = scale if layer_scale is None else layer_scale.to(compute_dtype(x)) * scale
    added = (branch.to(compute_dtype(x)) * factor).to(x.dtype)
    return x.index_add_(0, rows, added) if inplace else x.index_add(0, rows, added)


class _ScatterAddScaled(torch.autograd.Function):
    """Saves the branch only where LayerScale learns; the gradient for x is the incoming one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, branch: Tensor, layer_scale: Tensor | None, scale: float, inplace: bool
    ) -> Tensor:
        rows, branch = rows.contiguous(), branch.contiguous()
        layer_scale = None if layer_scale is None else layer_scale.contiguous()
        ctx.save_for_backward(rows, branch if ctx.needs_input_grad[3] else None, layer_scale)
        ctx.scale, ctx.branch_dtype = scale, branch.dtype
        if inplace:
            ctx.mark_dirty(x)
            scatter_add_scaled_(x, None, rows, branch, layer_scale, scale)
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        scatter_add_scaled_(out, x, rows, branch, layer_scale, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, branch, layer_scale = ctx.saved_tensors
        grad_branch = grad.new_empty((len(rows), *grad.shape[1:]), dtype=ctx.branch_dtype)
        parts = None if branch is None else partial_sums(grad_branch, 1)
        scatter_add_scaled_gradient_(grad_branch, parts, grad.contiguous(), rows, branch, layer_scale, ctx.scale)
        grad_layer_scale = None if parts is None else parts.sum((0, 1, 2)).to(layer_scale.dtype)
        return grad, None, grad_branch, grad_layer_scale, None, None


@operator("out")
def scatter_add_scaled_(
    out: Tensor, x: Tensor | None, rows: Tensor, branch: Tensor, layer_scale: Tensor | None, scale: float
) -> None:
    """Writes the sum into out, which holds x if that is None; all contiguous, at least one row."""
    (B, N, D), M = out.shape, len(rows)
    config = launch_config(D)["each"]
    tensors = (out, x, rows, branch, layer_scale)
    grid = (M if x is None else B, triton.cdiv(N, config["TOKENS"]))
    with torch.cuda.device_of(out):
        _scatter_add_kernel[grid](*tensors, M, N, scale, D=D, BLOCK_M=search_block(M), **config)


@operator("grad_branch", "parts")
def scatter_add_scaled_gradient_(
    grad_branch: Tensor,
    parts: Tensor | None,
    grad: Tensor,
    rows: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    scale: float,
) -> None:
    """Writes the gradient for branch and, given it, (1, M, P, D) parts of that for layer_scale, summed over M and P."""
    M, N, D = grad_branch.shape
    tensors = (grad_branch, parts, grad, rows, branch, layer_scale)
    config = launch_config(D)["sum"]
    with torch.cuda.device_of(grad):
        _gradient_scatter_kernel[(M, triton.cdiv(N, config["TOKENS"]))](*tensors, N, scale, D=D, **config)


@triton.jit(do_not_specialize=["M", "N"])
def _scatter_add_kernel(
    out_ptr,
    x_ptr,
    rows_ptr,
    branch_ptr,
    layer_scale_ptr,
    M,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # out[b] = x[b] + scale * layer_scale * branch[m] where rows[m] = b, else x[b]. One program: TOKENS tokens of one
    # image; of a kept one only, where out holds x.
    if x_ptr is None:
        x_ptr = out_ptr
        m = tl.program_id(0).to(tl.int64)
        image = tl.load(rows_ptr + m)
    else:
        image = tl.program_id(0).to(tl.int64)
        m = find_row(rows_ptr, image, M, BLOCK_M).to(tl.int64)
    kept = m >= 0
    first = tl.program_id(1) * TOKENS
    factor = scale
    if layer_scale_ptr is not None:
        factor *= load_vector(layer_scale_ptr, D, BLOCK_D)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + image * N * D + i, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + m * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        out = tl.where(kept, x + factor * branch, x)  # a dropped image stays as it is, to the bit
        tl.store(out_ptr + image * N * D + i, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gradient_scatter_kernel(
    grad_branch_ptr,
    parts_ptr,
    grad_ptr,
    rows_ptr,
    branch_ptr,
    layer_scale_ptr,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # grad_branch[m] = scale * layer_scale * grad[rows[m]]. One program: TOKENS tokens of one kept image, and, given the
    # branch, their sum of scale * branch * grad.
    m = tl.program_id(0).to(tl.int64)
    image = tl.load(rows_ptr + m)
    first = tl.program_id(1) * TOKENS
    factor = scale
    if layer_scale_ptr is not None:
        factor *= load_vector(layer_scale_ptr, D, BLOCK_D)
    grad_layer_scale = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        grad = tl.load(grad_ptr + image * N * D + i, mask=inside, other=0.0).to(tl.float32)
        grad_branch = grad * factor
        tl.store(grad_branch_ptr + m * N * D + i, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + m * N * D + i, mask=inside, other=0.0).to(tl.float32)
            grad_layer_scale += branch * grad
    if branch_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        parts_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * D + d
        tl.store(parts_ptr, scale * tl.sum(grad_layer_scale, 0), mask=d < D)

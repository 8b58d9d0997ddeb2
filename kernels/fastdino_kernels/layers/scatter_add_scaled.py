"""The end of a residual branch that ran on some sequences of the batch: LayerScale, scale and sum in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype, operator
from fastdino_kernels.layers._sample_drop import (
    Lengths,
    check,
    find_row,
    kept_lengths,
    kept_tokens,
    launch_config,
    load_vector,
    num_tokens,
    part_lengths,
    partial_sums,
    search_block,
    split,
    takes_kernel,
    tile,
)


def scatter_add_scaled(
    x: Tensor, lengths: Lengths, rows: Sequence[Tensor], branch: Tensor, layer_scale: Tensor | None = None
) -> Tensor:
    """The residual sum of a branch that ran on the kept sequences of a packed batch, in one pass.

    To the M kept of a group's n sequences n / M * layer_scale * branch is added: the expectation over uniformly drawn
    rows is that of the whole branch. The others stay as they are, to the bit.

    Args:
        x: (tokens, D) residual stream, group after group of equally long sequences; fp32, bf16, fp16 or fp64.
        lengths: (sequences, tokens of each) per group.
        rows: per group (M,) int64, the sequences that are kept, each at most once, from 0 to sequences - 1. Neither is
            checked. M is at least 1.
        branch: (kept tokens, D) the branch's output for them, packed likewise, of any floating dtype.
        layer_scale: (D,) factor of each feature, or None for 1.

    Returns (tokens, D) in x's dtype with gradients for ``x`` (the incoming one, not copied), ``branch`` and
    ``layer_scale``; the sum is fp32 (fp64 for fp64) and rounds once.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: Touvron et al. 2021 (CaiT), equation 6; Huang et al. 2016, equation 5, on a subset of the batch (DINOv2).
    """
    check(x, lengths, rows, {} if layer_scale is None else {"layer_scale": layer_scale})
    kept = num_tokens(kept_lengths(lengths, rows))
    if branch.shape != (kept, x.shape[1]) or not branch.is_floating_point() or branch.device != x.device:
        raise ValueError(
            f"expected branch ({kept}, {x.shape[1]}), the tokens of the kept sequences, on {x.device}; "
            f"got {tuple(branch.shape)} {branch.dtype} on {branch.device}"
        )
    if takes_kernel(x, branch, layer_scale):
        return _ScatterAddScaled.apply(x, lengths, rows, branch, layer_scale)
    return scatter_add_scaled_reference(x, lengths, rows, branch, layer_scale)


def scatter_add_scaled_reference(
    x: Tensor, lengths: Lengths, rows: Sequence[Tensor], branch: Tensor, layer_scale: Tensor | None = None
) -> Tensor:
    """:func:`scatter_add_scaled` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    dtype = compute_dtype(x)
    groups = zip(split(branch, kept_lengths(lengths, rows)), lengths, rows, strict=True)
    scaled = torch.cat([part.flatten(0, 1).to(dtype) * (n / len(kept)) for part, (n, _), kept in groups])
    added = scaled if layer_scale is None else scaled * layer_scale.to(dtype)
    return x.index_add(0, kept_tokens(lengths, rows), added.to(x.dtype))


class _ScatterAddScaled(torch.autograd.Function):
    """Saves the branch only where LayerScale learns; the gradient for x is the incoming one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lengths: Lengths, rows: Sequence[Tensor], branch: Tensor, layer_scale: Tensor | None
    ) -> Tensor:
        x, rows, branch = x.contiguous(), [kept.contiguous() for kept in rows], branch.contiguous()
        layer_scale = None if layer_scale is None else layer_scale.contiguous()
        ctx.save_for_backward(branch if ctx.needs_input_grad[4] else None, layer_scale, *rows)
        ctx.lengths, ctx.branch_dtype = lengths, branch.dtype
        out = torch.empty_like(x)
        scatter_add_scaled_(out, x, rows, branch, layer_scale, *zip(*lengths, strict=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, layer_scale, *rows = ctx.saved_tensors
        kept = kept_lengths(ctx.lengths, rows)
        grad_branch = grad.new_empty((num_tokens(kept), grad.shape[1]), dtype=ctx.branch_dtype)
        parts = None if branch is None else partial_sums(grad, kept, 1)
        lengths = zip(*ctx.lengths, strict=True)
        scatter_add_scaled_gradient_(grad_branch, parts, grad.contiguous(), rows, branch, layer_scale, *lengths)
        grad_layer_scale = None if parts is None else parts.sum((0, 1)).to(layer_scale.dtype)
        return grad, None, None, grad_branch, grad_layer_scale


@operator("out")
def scatter_add_scaled_(
    out: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    branch: Tensor,
    layer_scale: Tensor | None,
    sequences: Sequence[int],
    tokens: Sequence[int],
) -> None:
    """Writes the sum into out, one launch per group; all contiguous."""
    lengths = list(zip(sequences, tokens, strict=True))
    config = launch_config(x.shape[1])["each"]
    blocks = {"BLOCK_M": search_block(rows), **config}
    groups = split(out, lengths), split(x, lengths), rows, split(branch, kept_lengths(lengths, rows))
    with torch.cuda.device_of(out):
        for of_group in zip(*groups, strict=True):
            (B, N, D), M = of_group[0].shape, len(of_group[2])
            grid = (B, triton.cdiv(N, config["TOKENS"]))
            _scatter_add_kernel[grid](*of_group, layer_scale, M, N, B / M, D=D, **blocks)


@operator("grad_branch", "parts")
def scatter_add_scaled_gradient_(
    grad_branch: Tensor,
    parts: Tensor | None,
    grad: Tensor,
    rows: Sequence[Tensor],
    branch: Tensor | None,
    layer_scale: Tensor | None,
    sequences: Sequence[int],
    tokens: Sequence[int],
) -> None:
    """Writes the gradient for branch and, given it, (programs, 1, D) parts whose sum is that for layer_scale."""
    lengths, config = list(zip(sequences, tokens, strict=True)), launch_config(grad.shape[1])["sum"]
    kept = kept_lengths(lengths, rows)
    sums: tuple[Sequence[Tensor | None], ...] = ([None] * len(rows),) * 2
    if parts is not None and branch is not None:
        sums = split(parts, part_lengths(kept, grad.shape[1])), split(branch, kept)
    groups = zip(split(grad_branch, kept), split(grad, lengths), rows, *sums, strict=True)
    with torch.cuda.device_of(grad):
        for of_group in groups:
            (M, N, D), B = of_group[0].shape, len(of_group[1])
            grid = (M, triton.cdiv(N, config["TOKENS"]))
            _gradient_scatter_kernel[grid](*of_group, layer_scale, N, B / M, D=D, **config)


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
    # Of one group: out[b] = x[b] + scale * layer_scale * branch[m] where rows[m] = b, else x[b]. One program: TOKENS
    # tokens of one sequence.
    sequence = tl.program_id(0).to(tl.int64)
    m = find_row(rows_ptr, sequence, M, BLOCK_M).to(tl.int64)
    kept = m >= 0
    first = tl.program_id(1) * TOKENS
    factor = scale
    if layer_scale_ptr is not None:
        factor *= load_vector(layer_scale_ptr, D, BLOCK_D)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + sequence * N * D + i, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + m * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        out = tl.where(kept, x + factor * branch, x)  # a dropped sequence stays as it is, to the bit
        tl.store(out_ptr + sequence * N * D + i, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gradient_scatter_kernel(
    grad_branch_ptr,
    grad_ptr,
    rows_ptr,
    parts_ptr,
    branch_ptr,
    layer_scale_ptr,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Of one group: grad_branch[m] = scale * layer_scale * grad[rows[m]]. One program: TOKENS tokens of one kept
    # sequence, and, given the branch, their sum of scale * branch * grad.
    m = tl.program_id(0).to(tl.int64)
    sequence = tl.load(rows_ptr + m)
    first = tl.program_id(1) * TOKENS
    factor = scale
    if layer_scale_ptr is not None:
        factor *= load_vector(layer_scale_ptr, D, BLOCK_D)
    grad_layer_scale = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        grad = tl.load(grad_ptr + sequence * N * D + i, mask=inside, other=0.0).to(tl.float32)
        grad_branch = grad * factor
        tl.store(grad_branch_ptr + m * N * D + i, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + m * N * D + i, mask=inside, other=0.0).to(tl.float32)
            grad_layer_scale += branch * grad
    if branch_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        parts_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * D + d
        tl.store(parts_ptr, scale * tl.sum(grad_layer_scale, 0), mask=d < D)

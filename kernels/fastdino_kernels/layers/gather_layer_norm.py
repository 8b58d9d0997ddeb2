"""The start of a residual branch that runs on some sequences of the batch: their LayerNorm, gathered in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


def gather_layer_norm(
    x: Tensor, lengths: Lengths, rows: Sequence[Tensor], weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """LayerNorm of the kept sequences of a packed batch: what the branch of a residual block reads, in one pass.

    Args:
        x: (tokens, D) group after group of equally long sequences; fp32, bf16, fp16 or fp64.
        lengths: (sequences, tokens of each) per group.
        rows: per group (M,) int64, the sequences that are kept, each at most once and in any order, from 0 to
            sequences - 1. Neither is checked: that would wait for the device. M is at least 1.
        weight: (D,) of any floating dtype.
        bias: (D,) likewise.
        eps: added to the variance, > 0.

    Returns (kept tokens, D) in x's dtype, packed likewise, the sequences of a group in the order of its rows; the
    arithmetic is fp32 (fp64 for fp64) and rounds once. With gradients for ``x`` (written once, zeros for the dropped
    sequences included), ``weight`` and ``bias``; saves x itself, no copy of its rows.
    Raises ValueError when shapes, dtypes, devices or eps do not fit.
    Source: Ba et al. 2016; Huang et al. 2016, on a subset of the batch as in DINOv2 (Oquab et al. 2024), section 5.
    """
    check(x, lengths, rows, {"weight": weight, "bias": bias})
    if not eps > 0:
        raise ValueError(f"expected eps > 0; got {eps}")
    if takes_kernel(x, weight, bias):
        return _GatherLayerNorm.apply(x, lengths, rows, weight, bias, eps)
    return gather_layer_norm_reference(x, lengths, rows, weight, bias, eps=eps)


def gather_layer_norm_reference(
    x: Tensor, lengths: Lengths, rows: Sequence[Tensor], weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """:func:`gather_layer_norm` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    dtype = compute_dtype(x)
    kept = x.index_select(0, kept_tokens(lengths, rows)).to(dtype)
    return F.layer_norm(kept, x.shape[1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


class _GatherLayerNorm(torch.autograd.Function):
    """Saves its inputs; mean and deviation are taken again, from the token that the gradient needs anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lengths: Lengths, rows: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        x, rows, weight = x.contiguous(), [kept.contiguous() for kept in rows], weight.contiguous()
        ctx.save_for_backward(x, weight, *rows)
        ctx.lengths, ctx.eps, ctx.bias_dtype = lengths, eps, bias.dtype
        y = x.new_empty((num_tokens(kept_lengths(lengths, rows)), x.shape[1]))
        gather_layer_norm_(y, x, rows, weight, bias.contiguous(), eps, *zip(*lengths, strict=True))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rows = ctx.saved_tensors
        grad_x, parts = torch.empty_like(x), partial_sums(grad, kept_lengths(ctx.lengths, rows), 2)
        lengths = zip(*ctx.lengths, strict=True)
        gather_layer_norm_gradient_(grad_x, parts, grad.contiguous(), x, rows, weight, ctx.eps, *lengths)
        grad_weight, grad_bias = parts.sum(0)
        return grad_x, None, None, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


@operator("y")
def gather_layer_norm_(
    y: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sequences: Sequence[int],
    tokens: Sequence[int],
) -> None:
    """Writes the kept sequences' LayerNorm into y, one launch per group; all contiguous."""
    lengths = list(zip(sequences, tokens, strict=True))
    config = launch_config(x.shape[1])["each"]
    groups = split(y, kept_lengths(lengths, rows)), split(x, lengths), rows
    with torch.cuda.device_of(x):
        for of_group in zip(*groups, strict=True):
            M, N, D = of_group[0].shape
            grid = (M, triton.cdiv(N, config["TOKENS"]))
            _gather_layer_norm_kernel[grid](*of_group, weight, bias, N, eps, D=D, **config)


@operator("grad_x", "parts")
def gather_layer_norm_gradient_(
    grad_x: Tensor,
    parts: Tensor,
    grad: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    weight: Tensor,
    eps: float,
    sequences: Sequence[int],
    tokens: Sequence[int],
) -> None:
    """Writes the gradient for x, and (programs, 2, D) parts whose sums are those for weight and bias."""
    lengths = list(zip(sequences, tokens, strict=True))
    kept, D = kept_lengths(lengths, rows), x.shape[1]
    blocks = {"BLOCK_M": search_block(rows), **launch_config(D)["sum"]}
    packed = split(grad_x, lengths), split(parts, part_lengths(kept, D)), split(grad, kept), split(x, lengths), rows
    with torch.cuda.device_of(x):
        for of_group in zip(*packed, strict=True):
            (B, N, _), (M, num_slices, *_) = of_group[0].shape, of_group[1].shape
            _gradient_gather_kernel[(B, num_slices)](*of_group, weight, M, N, eps, D=D, **blocks)


@triton.jit
def _normalised(x, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # (x - mean) / deviation of each row, 0 past D; and 1 / deviation.
    centered = tl.where(tl.arange(0, BLOCK_D)[None, :] < D, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1) / D + eps)
    return centered * rstd[:, None], rstd[:, None]


@triton.jit(do_not_specialize=["N"])
def _gather_layer_norm_kernel(
    y_ptr,
    x_ptr,
    rows_ptr,
    weight_ptr,
    bias_ptr,
    N,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Of one group: y[m] = LayerNorm(x[rows[m]]). One program: TOKENS tokens of one kept sequence.
    m = tl.program_id(0).to(tl.int64)
    sequence = tl.load(rows_ptr + m)
    first = tl.program_id(1) * TOKENS
    weight = load_vector(weight_ptr, D, BLOCK_D)
    bias = load_vector(bias_ptr, D, BLOCK_D)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + sequence * N * D + i, mask=inside, other=0.0).to(tl.float32)
        u, _ = _normalised(x, eps, D, BLOCK_D)
        tl.store(y_ptr + m * N * D + i, (u * weight + bias).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "N"])
def _gradient_gather_kernel(
    grad_x_ptr,
    parts_ptr,
    grad_ptr,
    x_ptr,
    rows_ptr,
    weight_ptr,
    M,
    N,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # With u the normalised token and g = grad * weight: grad_x = (g - mean(g) - u * mean(g * u)) / deviation. One
    # program: TOKENS tokens of one sequence, and their sums of grad * u and grad. A dropped sequence loads nothing, and
    # its gradient comes out as the 0 that is due.
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    m = find_row(rows_ptr, sequence, M, BLOCK_M).to(tl.int64)
    kept = m >= 0
    weight = load_vector(weight_ptr, D, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + sequence * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + m * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        u, rstd = _normalised(x, eps, D, BLOCK_D)
        grad_weight += grad * u
        grad_bias += grad
        g = grad * weight
        grad_x = rstd * (g - (tl.sum(g, 1) / D)[:, None] - u * (tl.sum(g * u, 1) / D)[:, None])
        tl.store(grad_x_ptr + sequence * N * D + i, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    d = tl.arange(0, BLOCK_D)
    parts_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * 2 * D + d
    tl.store(parts_ptr, tl.sum(grad_weight, 0), mask=(d < D) & kept)
    tl.store(parts_ptr + D, tl.sum(grad_bias, 0), mask=(d < D) & kept)

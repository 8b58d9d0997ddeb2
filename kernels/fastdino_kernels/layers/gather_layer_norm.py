"""The start of a residual branch that runs on some images of the batch: their LayerNorm, gathered in the same pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


def gather_layer_norm(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x[rows]) over the last dimension: what the branch of a residual block reads, in one pass.

    Args:
        x: (B, N, D) tokens of B images; fp32, bf16, fp16 or fp64.
        rows: (M,) int64 images that are kept, each at most once and in any order, from 0 to B - 1. Neither is checked:
            that would wait for the device.
        weight: (D,) of any floating dtype.
        bias: (D,) likewise.
        eps: added to the variance, > 0.

    Returns (M, N, D) in x's dtype; the arithmetic is fp32 (fp64 for fp64) and rounds once. With gradients for ``x``
    (written once, zeros for the dropped images included), ``weight`` and ``bias``; saves x itself, no copy of its rows.
    Raises ValueError when shapes, dtypes, devices or eps do not fit.
    Source: Ba et al. 2016; Huang et al. 2016, on a subset of the batch as in DINOv2 (Oquab et al. 2024), section 5.
    """
    check(x, rows, {"weight": weight, "bias": bias})
    if not eps > 0:
        raise ValueError(f"expected eps > 0; got {eps}")
    if takes_kernel(x, rows, weight, bias):
        return _GatherLayerNorm.apply(x, rows, weight, bias, eps)
    return gather_layer_norm_reference(x, rows, weight, bias, eps=eps)


def gather_layer_norm_reference(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """:func:`gather_layer_norm` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    dtype = compute_dtype(x)
    kept = x.index_select(0, rows).to(dtype)
    return F.layer_norm(kept, x.shape[2:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


class _GatherLayerNorm(torch.autograd.Function):
    """Saves its inputs; mean and deviation are taken again, from the token that the gradient needs anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, rows, weight = x.contiguous(), rows.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, rows, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        y = x.new_empty((len(rows), *x.shape[1:]))
        gather_layer_norm_(y, x, rows, weight, bias.contiguous(), eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, weight = ctx.saved_tensors
        grad_x, parts = torch.empty_like(x), partial_sums(grad, 2)
        gather_layer_norm_gradient_(grad_x, parts, grad.contiguous(), x, rows, weight, ctx.eps)
        grad_weight, grad_bias = parts.sum((1, 2))
        return grad_x, None, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


@operator("y")
def gather_layer_norm_(y: Tensor, x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Writes LayerNorm(x[rows]) into y; all contiguous, at least one row."""
    M, N, D = y.shape
    config = launch_config(D)["each"]
    grid = (M, triton.cdiv(N, config["TOKENS"]))
    with torch.cuda.device_of(x):
        _gather_layer_norm_kernel[grid](y, x, rows, weight, bias, N, eps, D=D, **config)


@operator("grad_x", "parts")
def gather_layer_norm_gradient_(
    grad_x: Tensor, parts: Tensor, grad: Tensor, x: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> None:
    """Writes the gradient for x, and (2, M, P, D) parts whose sums over M and P are those for weight and bias."""
    B, N, D = x.shape
    _, M, num_slices, _ = parts.shape
    tensors = (grad_x, parts, grad, x, rows, weight)
    blocks = {"BLOCK_M": search_block(M), **launch_config(D)["sum"]}
    with torch.cuda.device_of(x):
        _gradient_gather_kernel[(B, num_slices)](*tensors, M, N, eps, D=D, **blocks)


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
    # y[m] = LayerNorm(x[rows[m]]). One program: TOKENS tokens of one kept image.
    m = tl.program_id(0).to(tl.int64)
    image = tl.load(rows_ptr + m)
    first = tl.program_id(1) * TOKENS
    weight = load_vector(weight_ptr, D, BLOCK_D)
    bias = load_vector(bias_ptr, D, BLOCK_D)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + image * N * D + i, mask=inside, other=0.0).to(tl.float32)
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
    # program: TOKENS tokens of one image, and their sums of grad * u and grad. A dropped image loads nothing, and its
    # gradient comes out as the 0 that is due.
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    m = find_row(rows_ptr, image, M, BLOCK_M).to(tl.int64)
    kept = m >= 0
    weight = load_vector(weight_ptr, D, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + TOKENS, N), BLOCK_ROWS):
        i, inside = tile(start, N, D, BLOCK_ROWS, BLOCK_D)
        x = tl.load(x_ptr + image * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + m * N * D + i, mask=inside & kept, other=0.0).to(tl.float32)
        u, rstd = _normalised(x, eps, D, BLOCK_D)
        grad_weight += grad * u
        grad_bias += grad
        g = grad * weight
        grad_x = rstd * (g - (tl.sum(g, 1) / D)[:, None] - u * (tl.sum(g * u, 1) / D)[:, None])
        tl.store(grad_x_ptr + image * N * D + i, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    d = tl.arange(0, BLOCK_D)
    parts_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * D + d
    tl.store(parts_ptr, tl.sum(grad_weight, 0), mask=(d < D) & kept)
    tl.store(parts_ptr + M.to(tl.int64) * tl.num_programs(1) * D, tl.sum(grad_bias, 0), mask=(d < D) & kept)

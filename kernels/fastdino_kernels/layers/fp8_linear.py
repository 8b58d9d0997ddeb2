"""A linear layer in fp8, whose factors are rounded as they come: two of its three products at twice the rate of bf16.

No kernel is written here: the rounding is plain torch, which torch.compile fuses with what makes or reads a matrix, and
the products are torch's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastdino_kernels._backend import compute_dtype

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
TINIEST = 2.0**-100  # of a row's largest magnitude: below, its scale and what is divided by it would leave fp32
MULTIPLE = 16  # of either side of a weight, which fp8 products ask for


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with factors rounded to fp8, in the forward pass and in the gradient for x.

        r(a) = e4m3(a / s) * s,   s = max |a| / 448, one for each row of a
        y = r(x) @ r(weight).T + bias
        grad_x = r(grad) @ r(weight.T).T,   grad_weight = grad.T @ x,   grad_bias = sum of grad

    A row is what a product sums over, so that scales leave the sum; no value overflows, and none is clipped. The
    gradient is e4m3 as well: a scale per row gives it the range for which e5m2 would spend a bit of its mantissa. The
    gradient for the weight sums over all tokens, where the largest of them would set the scale, and is not rounded.

    Args:
        x: (.., K) fp32, bf16, fp16 or fp64.
        weight: (N, K) in x's dtype.
        bias: (N,) likewise, or None.

    Returns (.., N) in x's dtype. bf16 on a GPU has torch's scaled product, which rounds once more on store, and raises
    RuntimeError below compute capability 8.9; everything else has the reference. Where N or K is no multiple of 16
    nothing is rounded. Values that are not finite make all of their row NaN. Saves x and the weight as they are.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: Micikevicius et al. 2022 (FP8 Formats for Deep Learning); a scale per row and an exact weight gradient as in
    torchao's recipe rowwise_with_gw_hp and in DINOv3 (Simeoni et al. 2025).
    """
    _check(x, weight, bias)
    if any(side % MULTIPLE for side in weight.shape):
        return F.linear(x, weight, bias)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return _Fp8Linear.apply(x, weight, bias, True)
    return fp8_linear_reference(x, weight, bias)


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`fp8_linear` with products of the rounded matrices in fp32 (fp64 for fp64): the CPU path."""
    return _Fp8Linear.apply(x, weight, bias, False)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"expected x in fp32, bf16, fp16 or fp64; got {x.dtype}")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x (.., K) and weight (N, K); got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},); got {tuple(bias.shape)}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"expected {name} in {x.dtype} on {x.device}; got {tensor.dtype} on {tensor.device}")


class _Fp8Linear(torch.autograd.Function):
    """``scaled``: by torch's scaled product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaled: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaled, ctx.has_bias = scaled, bias is not None
        # The tensor cores' own sums have some 14 bits, enough beside factors of 4: a gradient takes slower, fp32 ones.
        return _product(x, weight, bias, scaled, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t(), None, ctx.scaled, fast=False)
        rows = grad.flatten(0, -2) if grad.ndim > 1 else grad.unsqueeze(0)
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, scaled: bool, fast: bool) -> Tensor:
    """r(x) @ r(weight).T + bias of (.., K) and (N, K) in any layout."""
    (rows, row_scales), (columns, column_scales) = _round(x.reshape(-1, x.shape[-1])), _round(weight)
    if scaled:
        scales = row_scales, column_scales.t()
        y = torch._scaled_mm(rows, columns.t(), *scales, bias=bias, out_dtype=x.dtype, use_fast_accum=fast)
    else:
        dtype = row_scales.dtype
        y = (rows.to(dtype) * row_scales) @ (columns.to(dtype) * column_scales).t()
        y = (y if bias is None else y + bias).to(x.dtype)
    return y.unflatten(0, x.shape[:-1]) if x.ndim > 1 else y.squeeze(0)


def _round(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> the same in fp8, contiguous, and (M, 1) what each row is to be multiplied with."""
    wide = rows.to(compute_dtype(rows))
    scales = wide.abs().amax(1, keepdim=True).clamp_min(TINIEST) / LARGEST
    return (wide / scales).to(FP8).contiguous(), scales

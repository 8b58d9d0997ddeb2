"""The weight of the prototype layer: directions brought to their norms and rounded, in one pass each way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype, operator, use_triton

MAX_WIDTH = 4096  # a row must fit in the registers of one program; wider ones go to plain torch


def prototype_weight(v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """w_k = g_k * v_k / |v_k|, weight normalisation of the prototypes, in ``dtype``.

    Args:
        v: (K, D) contiguous directions; fp32, bf16, fp16 or fp64. A row of zeros gives NaN.
        g: (K, 1) norms of the same or another floating dtype.
        dtype: of the result, v's by default; the arithmetic is fp32 (fp64 for fp64) and rounds once.

    Returns (K, D) with gradients for ``v`` and ``g``, each in its own dtype; saves nothing but the two.
    Raises ValueError when shapes, dtypes or devices do not fit, or ``v`` is not contiguous.
    Source: Salimans and Kingma 2016, equations 2 and 3; Caron et al. 2021 (DINO), appendix C.
    """
    dtype = v.dtype if dtype is None else dtype
    if v.ndim != 2 or not v.numel() or g.shape != (len(v), 1) or g.device != v.device or not v.is_contiguous():
        raise ValueError(
            "expected contiguous v (K, D), not empty, and g (K, 1) on its device; "
            f"got {tuple(v.shape)} with strides {v.stride()} on {v.device} and {tuple(g.shape)} on {g.device}"
        )
    if not all(x.is_floating_point for x in (v.dtype, g.dtype, dtype)):
        raise ValueError(f"expected floating-point dtypes; got v {v.dtype}, g {g.dtype}, dtype {dtype}")
    fp64 = torch.float64 in (v.dtype, g.dtype, dtype)
    if use_triton(v) and not fp64 and v.shape[1] <= MAX_WIDTH:
        return _PrototypeWeight.apply(v, g, dtype)
    return prototype_weight_reference(v, g, dtype)


def prototype_weight_reference(v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`prototype_weight` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    computing, dtype = compute_dtype(v), v.dtype if dtype is None else dtype
    if computing == torch.float64:  # whose norms torch's kernel for CUDA takes by a root in fp32
        return (g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)).to(dtype)
    return torch._weight_norm(v.to(computing), g.to(computing), 0).to(dtype)


class _PrototypeWeight(torch.autograd.Function):
    """Saves v and g; the norms are summed again, from the row that the gradient needs anyway."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(v, g)
        return prototype_weight_forward(v, g, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_w: Tensor) -> tuple[Tensor, Tensor | None, None]:
        trains_norms = ctx.needs_input_grad[1]
        grad_v, grad_g = prototype_weight_gradient(*ctx.saved_tensors, grad_w, trains_norms)
        return grad_v, grad_g if trains_norms else None, None


def launch_config(width: int) -> dict[str, int]:
    """Rows and columns of a tile, and warps: 1024 elements for each, so that a row's sum stays within one warp."""
    block_d = max(32, triton.next_power_of_2(width))
    return {"BLOCK_ROWS": max(1, 1024 // block_d), "BLOCK_D": block_d, "num_warps": max(1, block_d // 1024)}


@operator()
def prototype_weight_forward(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The launch behind :func:`prototype_weight`."""
    w = torch.empty_like(v, dtype=dtype)
    _launch(_weight_kernel, v, g, w)
    return w


@prototype_weight_forward.register_fake
def _(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(v, dtype=dtype)


@operator()
def prototype_weight_gradient(v: Tensor, g: Tensor, grad_w: Tensor, trains_norms: bool) -> tuple[Tensor, Tensor]:
    """The gradients for ``v`` and ``g``; the latter is empty where the norms are frozen."""
    grad_v, grad_g = torch.empty_like(v), g.new_empty(g.shape if trains_norms else 0)
    _launch(_gradient_weight_kernel, v, g, grad_w.contiguous(), grad_v, grad_g if trains_norms else None)
    return grad_v, grad_g


@prototype_weight_gradient.register_fake
def _(v: Tensor, g: Tensor, grad_w: Tensor, trains_norms: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), g.new_empty(g.shape if trains_norms else 0)


def _launch(kernel: Any, v: Tensor, *tensors: Tensor | None) -> None:
    num_rows, width = v.shape
    config = launch_config(width)
    with torch.cuda.device_of(v):
        kernel[(triton.cdiv(num_rows, config["BLOCK_ROWS"]),)](v, *tensors, num_rows, D=width, **config)


@triton.jit
def _tile(out_ptr, num_rows, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # Rows of this program, the elements' offsets and which are there. 128 bits of the output per thread, and as many
    # elements of the inputs: one layout, nothing exchanged through shared memory.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.max_contiguous(tl.arange(0, BLOCK_D), 128 // out_ptr.dtype.element_ty.primitive_bitwidth)
    inside = (row < num_rows)[:, None] & (d < D)[None, :] if D % BLOCK_D else (row < num_rows)[:, None]
    return row, row[:, None] * D + d[None, :], inside


@triton.jit
def _weight_kernel(v_ptr, g_ptr, w_ptr, num_rows, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # w = g * v / |v|, one tile of whole rows per program.
    row, i, inside = _tile(w_ptr, num_rows, D, BLOCK_ROWS, BLOCK_D)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)
    w = v * (g / tl.sqrt(tl.sum(v * v, 1)))[:, None]
    tl.store(w_ptr + i, w.to(w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_weight_kernel(
    v_ptr,
    g_ptr,
    grad_w_ptr,
    grad_v_ptr,
    grad_g_ptr,
    num_rows,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # With n = v / |v|: grad_g = <grad_w, n>, grad_v = g / |v| * (grad_w - grad_g * n).
    row, i, inside = _tile(grad_v_ptr, num_rows, D, BLOCK_ROWS, BLOCK_D)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(tl.float32)
    grad_w = tl.load(grad_w_ptr + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 1))
    grad_g = tl.sum(grad_w * v, 1) / norm
    grad_v = (g / norm)[:, None] * (grad_w - v * (grad_g / norm)[:, None])
    tl.store(grad_v_ptr + i, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)
    if grad_g_ptr is not None:
        tl.store(grad_g_ptr + row, grad_g.to(grad_g_ptr.dtype.element_ty), mask=row < num_rows)

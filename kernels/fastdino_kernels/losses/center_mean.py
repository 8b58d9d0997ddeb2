"""The mean of the teacher's logits over views and images, of which DINO's center is the running mean."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import compute_dtype, operator, use_triton


def center_mean(teacher: Tensor) -> Tensor:
    """Column mean of the teacher's logits; summed in fp32, always in the same order.

    Args:
        teacher: (T, B, K) logits of T views of B images over K prototypes; fp32, fp16, bf16 or fp64.

    Returns the (K,) fp32 mean over views and images (fp64 for fp64 logits); it carries no gradient.
    Raises ValueError when ``teacher`` has another shape or dtype, or no rows.
    Source: Caron et al. 2021 (DINO), equation 4, without the momentum; with more than one rank, its inner mean is the
    mean of this over the ranks.
    """
    if teacher.dim() != 3 or teacher.numel() == 0 or not teacher.is_floating_point():
        raise ValueError(f"expected floating-point logits (T, B, K), at least one row; got {_describe(teacher)}")
    if use_triton(teacher) and teacher.dtype != torch.float64:
        return center_mean_forward(teacher.detach())
    return center_mean_reference(teacher)


def center_mean_reference(teacher: Tensor) -> Tensor:
    """:func:`center_mean` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    return teacher.detach().mean(dim=(0, 1), dtype=compute_dtype(teacher))


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def launch_config(num_prototypes: int) -> dict[str, int]:
    """Rows and columns of a tile, and warps: narrow tiles, so that there are enough programs to fill a GPU."""
    block_k = 256 if num_prototypes >= 32768 else 64
    return {"BLOCK_ROWS": 4096 // block_k, "BLOCK_K": block_k, "num_warps": 4}


@operator()
def center_mean_forward(teacher: Tensor) -> Tensor:
    """The launch behind :func:`center_mean`."""
    teacher = teacher if teacher.stride(-1) == 1 else teacher.contiguous()
    T, B, K = teacher.shape
    mean = torch.empty(K, dtype=torch.float32, device=teacher.device)
    config = launch_config(K)
    with torch.cuda.device_of(teacher):
        _center_mean_kernel[(triton.cdiv(K, config["BLOCK_K"]),)](
            mean, teacher, T * B, B, teacher.stride()[:2], K=K, **config
        )
    return mean


@center_mean_forward.register_fake
def _(teacher: Tensor) -> Tensor:
    return teacher.new_empty(teacher.shape[2], dtype=torch.float32)


@triton.jit(do_not_specialize=["num_rows", "B"])
def _center_mean_kernel(
    mean_ptr,
    teacher_ptr,
    num_rows,
    B,
    teacher_strides,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # mean[k] = sum over rows of teacher[t, b, k] / num_rows. One program: all rows of BLOCK_K columns, row = t * B + b.
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
    total = tl.zeros([BLOCK_ROWS, BLOCK_K], tl.float32)
    for start in tl.range(0, num_rows, BLOCK_ROWS, num_stages=2):
        row = start + tl.arange(0, BLOCK_ROWS)
        offset = (row // B).to(tl.int64) * teacher_strides[0] + (row % B).to(tl.int64) * teacher_strides[1]
        mask = (row < num_rows)[:, None] & inside[None, :]
        total += tl.load(teacher_ptr + offset[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(mean_ptr + k, tl.sum(total, 0) / num_rows, mask=inside)

"""What gathering and scattering have in common in stochastic depth, where a branch runs on some images of the batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import use_triton

MAX_WIDTH = 4096  # a token must fit in the registers of one program; wider ones go to plain torch


def check(x: Tensor, rows: Tensor, vectors: dict[str, Tensor]) -> None:
    """Raises ValueError unless x is (B, N, D), rows are (M,) of it and the named vectors (D,)."""
    if x.dim() != 3 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"expected floating-point x (B, N, D), not empty; got {tuple(x.shape)} {x.dtype}")
    if rows.dim() != 1 or rows.dtype != torch.int64 or len(rows) > len(x) or rows.device != x.device:
        raise ValueError(
            f"expected rows (M,), distinct int64 indices of the {len(x)} images of x on {x.device}; "
            f"got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )
    for name, vector in vectors.items():
        if vector.shape != x.shape[2:] or not vector.is_floating_point() or vector.device != x.device:
            raise ValueError(
                f"expected floating-point {name} ({x.shape[2]},) on {x.device}; "
                f"got {tuple(vector.shape)} {vector.dtype} on {vector.device}"
            )


def takes_kernel(x: Tensor, rows: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can do it: not in fp64, not without any row, not with tokens too wide."""
    fp64 = torch.float64 in [tensor.dtype for tensor in (x, *others) if tensor is not None]
    return use_triton(x) and not fp64 and len(rows) > 0 and x.shape[2] <= MAX_WIDTH


def launch_config(width: int) -> dict[str, dict[str, int]]:
    """Tokens and features of a tile, warps, and the TOKENS of one program, which loads what all tokens share once.

    16 are enough for that. Where a program also sums over its tokens, its part of the sum is as large as one or two
    tokens: 32, so that the parts are a few per cent of the traffic.
    """
    block_d = max(32, triton.next_power_of_2(width))
    block = {"BLOCK_ROWS": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4 if block_d <= 2048 else 8}
    return {"each": {**block, "TOKENS": 16}, "sum": {**block, "TOKENS": 32}}


def partial_sums(tokens: Tensor, num_sums: int) -> Tensor:
    """For ``num_sums`` vectors (D,), each summed over the tokens (M, N, D): (num_sums, M, P, D), one part a program."""
    M, N, D = tokens.shape
    num_slices = triton.cdiv(N, launch_config(D)["sum"]["TOKENS"])
    return tokens.new_empty((num_sums, M, num_slices, D), dtype=torch.float32)


def search_block(num_rows: int) -> int:
    """How many of the kept rows a program looks at together for the place of its own."""
    return min(1024, triton.next_power_of_2(num_rows))


@triton.jit
def find_row(rows_ptr, image, M, BLOCK_M: tl.constexpr):
    # The m with rows[m] == image, or -1 where the image was dropped.
    found = -1
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = tl.load(rows_ptr + m, mask=m < M, other=-1)
        found = tl.maximum(found, tl.max(tl.where(row == image, m, -1), 0))
    return found


@triton.jit
def tile(start, N, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # Offsets within an image of BLOCK_ROWS tokens from ``start`` on, and which of them are there.
    n = start + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    return n[:, None] * D + d[None, :], (n < N)[:, None] & (d < D)[None, :]


@triton.jit
def load_vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # (1, BLOCK_D) in fp32.
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]

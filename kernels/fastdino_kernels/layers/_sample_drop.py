"""What gathering and scattering have in common in stochastic depth, where a branch runs on some sequences of a batch.

Equally long sequences are a group; a packed tensor (tokens, D) holds group after group, sequence after sequence.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import use_triton

Lengths = Sequence[tuple[int, int]]  # (sequences, tokens of each) per group

MAX_WIDTH = 4096  # a token must fit in the registers of one program; wider ones go to plain torch


def check(x: Tensor, lengths: Lengths, rows: Sequence[Tensor], vectors: dict[str, Tensor]) -> None:
    """Raises ValueError unless x is (tokens, D) of these groups, each has rows, and the named vectors are (D,)."""
    fits = x.dim() == 2 and len(x) == num_tokens(lengths) and x.numel() and min(map(min, lengths)) > 0
    if not fits or not x.is_floating_point():
        raise ValueError(
            f"expected floating-point x (tokens, D), not empty, of groups (sequences, tokens each) {tuple(lengths)}; "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if len(rows) != len(lengths):
        raise ValueError(f"expected rows of {len(lengths)} groups; got {len(rows)}")
    for (sequences, _), kept in zip(lengths, rows, strict=True):
        if kept.dim() != 1 or kept.dtype != torch.int64 or not 0 < len(kept) <= sequences or kept.device != x.device:
            raise ValueError(
                f"expected rows (M,), distinct int64 indices of a group's {sequences} sequences on {x.device}, at "
                f"least one; got {tuple(kept.shape)} {kept.dtype} on {kept.device}"
            )
    for name, vector in vectors.items():
        if vector.shape != x.shape[1:] or not vector.is_floating_point() or vector.device != x.device:
            raise ValueError(
                f"expected floating-point {name} ({x.shape[1]},) on {x.device}; "
                f"got {tuple(vector.shape)} {vector.dtype} on {vector.device}"
            )


def takes_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can do it: not in fp64, not with tokens too wide."""
    fp64 = torch.float64 in [tensor.dtype for tensor in (x, *others) if tensor is not None]
    return use_triton(x) and not fp64 and x.shape[1] <= MAX_WIDTH


def kept_lengths(lengths: Lengths, rows: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The groups that are left when each keeps its ``rows``."""
    return [(len(kept), tokens) for (_, tokens), kept in zip(lengths, rows, strict=True)]


def num_tokens(lengths: Lengths) -> int:
    """Of all groups."""
    return sum(sequences * tokens for sequences, tokens in lengths)


def kept_tokens(lengths: Lengths, rows: Sequence[Tensor]) -> Tensor:
    """Where in a packed tensor the tokens of the kept sequences lie, in the order in which they are packed."""
    groups = split(torch.arange(num_tokens(lengths), device=rows[0].device), lengths)
    return torch.cat([group.index_select(0, kept).flatten() for group, kept in zip(groups, rows, strict=True)])


def split(x: Tensor, lengths: Lengths) -> list[Tensor]:
    """A packed (tokens, ..) tensor -> (sequences, tokens of each, ..) per group."""
    parts = x.split([sequences * tokens for sequences, tokens in lengths])
    return [part.unflatten(0, shape) for part, shape in zip(parts, lengths, strict=True)]


def launch_config(width: int) -> dict[str, dict[str, int]]:
    """Tokens and features of a tile, warps, and the TOKENS of one program, which loads what all tokens share once.

    16 are enough for that. Where a program also sums over its tokens, its part of the sum is as large as one or two
    tokens: 32, so that the parts are a few per cent of the traffic.
    """
    block_d = max(32, triton.next_power_of_2(width))
    block = {"BLOCK_ROWS": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4 if block_d <= 2048 else 8}
    return {"each": {**block, "TOKENS": 16}, "sum": {**block, "TOKENS": 32}}


def part_lengths(lengths: Lengths, width: int) -> list[tuple[int, int]]:
    """(sequences, programs of each) of a launch that sums over the tokens of each group."""
    tokens_each = launch_config(width)["sum"]["TOKENS"]
    return [(sequences, triton.cdiv(tokens, tokens_each)) for sequences, tokens in lengths]


def partial_sums(grad: Tensor, lengths: Lengths, num_sums: int) -> Tensor:
    """For ``num_sums`` vectors (D,), each a sum over the tokens of these groups: (programs, num_sums, D) parts."""
    width = grad.shape[1]
    return grad.new_empty((num_tokens(part_lengths(lengths, width)), num_sums, width), dtype=torch.float32)


def search_block(rows: Sequence[Tensor]) -> int:
    """How many of a group's rows a program looks at together for the place of its own; one for all groups."""
    return min(1024, triton.next_power_of_2(max(map(len, rows))))


@triton.jit
def find_row(rows_ptr, sequence, M, BLOCK_M: tl.constexpr):
    # The m with rows[m] == sequence, or -1 where the sequence was dropped.
    found = -1
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = tl.load(rows_ptr + m, mask=m < M, other=-1)
        found = tl.maximum(found, tl.max(tl.where(row == sequence, m, -1), 0))
    return found


@triton.jit
def tile(start, N, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # Offsets within a sequence of BLOCK_ROWS tokens from ``start`` on, and which of them are there.
    n = start + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    return n[:, None] * D + d[None, :], (n < N)[:, None] & (d < D)[None, :]


@triton.jit
def load_vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # (1, BLOCK_D) in fp32.
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]

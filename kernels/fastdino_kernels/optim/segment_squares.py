"""Sums of squares over consecutive stretches of a flat tensor, such as the parameters in an optimizer's shard."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import compute_dtype, operator, use_triton

# A chunk lies in one block of this many elements, counted from the start of the flat tensor, and in one segment.
BLOCK = 2048


class Segments(NamedTuple):
    """A flat tensor's division, for :func:`segment_squares` and ``adamw_ema_``; :func:`make_segments` makes it once."""

    lengths: tuple[int, ...]
    chunks: Tensor  # (num_chunks, 3) int64: begin, end, segment; in order, none empty
    first_chunk: Tensor  # (num_segments + 1,) int64: where each segment's chunks start

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of the segments of ``flat``."""
        return list(flat.split(self.lengths))


def make_segments(lengths: Sequence[int], device: torch.device | str) -> Segments:
    """Divides a flat tensor of sum(lengths) elements into segments of these lengths (0 is allowed), in order.

    Raises ValueError for a negative length. Copies two small tables to the device: call it once per shard.
    """
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths must not be negative, got {min(lengths)}")
    stop = torch.tensor([0, *lengths]).cumsum(0)
    edges = torch.cat([stop, torch.arange(0, int(stop[-1]), BLOCK)]).unique()  # sorted
    segment = torch.searchsorted(stop, edges[:-1], right=True) - 1
    chunks = torch.stack([edges[:-1], edges[1:], segment], dim=1)
    first_chunk = torch.searchsorted(edges, stop)
    return Segments(tuple(lengths), chunks.to(device), first_chunk.to(device))


def segment_squares(flat: Tensor, segments: Segments) -> Tensor:
    """Sum of the squares of each segment, always added in the same order: a gradient's squared norm per parameter.

    Args:
        flat: (N,) contiguous; fp32, bf16, fp16 or fp64.
        segments: a division of N elements on the same device.

    Returns (num_segments,) fp32 (fp64 for fp64); not finite where a segment is not or where the sum overflows.
    Raises ValueError when ``flat`` is not 1-D and contiguous or is not what ``segments`` divides.
    """
    check_divides(segments, flat)
    if not use_triton(flat) or flat.dtype == torch.float64 or not flat.numel():
        return segment_squares_reference(flat, segments)
    return segment_squares_forward(flat, segments.chunks, segments.first_chunk)


def segment_squares_reference(flat: Tensor, segments: Segments) -> Tensor:
    """:func:`segment_squares` in plain torch: the CPU path and the definition that the kernels are tested against."""
    if not segments.lengths:
        return flat.new_empty(0, dtype=compute_dtype(flat))
    return torch.stack(torch._foreach_norm(segments.split(flat), 2, dtype=compute_dtype(flat))).square()


def check_divides(segments: Segments, flat: Tensor) -> None:
    """Raises ValueError unless ``segments`` divides ``flat``."""
    if flat.ndim != 1 or not flat.is_contiguous() or flat.numel() != sum(segments.lengths):
        raise ValueError(
            f"the segments divide {sum(segments.lengths)} elements in a row; got shape {tuple(flat.shape)}, "
            f"strides {flat.stride()}"
        )
    if flat.device != segments.chunks.device:
        raise ValueError(f"the tensor is on {flat.device}, its segments on {segments.chunks.device}")


@operator()
def segment_squares_forward(flat: Tensor, chunks: Tensor, first_chunk: Tensor) -> Tensor:
    """The launches behind :func:`segment_squares`."""
    partial = torch.empty(len(chunks), dtype=torch.float32, device=flat.device)
    squares = torch.empty(len(first_chunk) - 1, dtype=torch.float32, device=flat.device)
    with torch.cuda.device_of(flat):
        _partial_squares_kernel[(len(partial),)](partial, flat, chunks, BLOCK=BLOCK, num_warps=4)
        _segment_squares_kernel[(len(squares),)](squares, partial, first_chunk, BLOCK=1024, num_warps=4)
    return squares


@segment_squares_forward.register_fake
def _(flat: Tensor, chunks: Tensor, first_chunk: Tensor) -> Tensor:
    return flat.new_empty(len(first_chunk) - 1, dtype=torch.float32)


@triton.jit
def _partial_squares_kernel(partial_ptr, flat_ptr, chunks_ptr, BLOCK: tl.constexpr):
    # One chunk per program. The block that it lies in starts at an aligned address; a whole one needs no mask.
    start, low, high, _ = load_chunk(chunks_ptr, BLOCK)
    i = tl.arange(0, BLOCK)
    flat_ptr += start
    if high - low == BLOCK:
        x = tl.load(flat_ptr + i)
    else:
        x = tl.load(flat_ptr + i, mask=(i >= low) & (i < high), other=0.0)
    x = x.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def load_chunk(chunks_ptr, BLOCK: tl.constexpr):
    # Start of this program's block, the chunk's first element and end within it, and its segment.
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 3
    begin = tl.load(chunk_ptr)
    start = begin // BLOCK * BLOCK
    return start, begin - start, tl.load(chunk_ptr + 1) - start, tl.load(chunk_ptr + 2)


@triton.jit
def _segment_squares_kernel(squares_ptr, partial_ptr, first_chunk_ptr, BLOCK: tl.constexpr):
    # One segment per program: its chunks' sums, added in order.
    segment = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.load(first_chunk_ptr + segment + 1)
    for start in range(tl.load(first_chunk_ptr + segment), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < end, other=0.0)
    tl.store(squares_ptr + segment, tl.sum(total, 0))

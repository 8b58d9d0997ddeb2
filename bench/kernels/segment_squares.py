"""segment_squares: the squared norm of each parameter's gradient, from one flat tensor."""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import Bench, Bound, Shape, Variant
from fastdino_kernels import Segments, make_segments, segment_squares
from fastdino_kernels.optim.segment_squares import segment_squares_reference


class Inputs(NamedTuple):
    flat: Tensor
    segments: Segments  # of equal lengths


def _make(shape: Shape, seed: int) -> Inputs:
    count, elements = shape.sizes
    flat = shape.random(seed)(elements // count * count).to(shape.dtype)
    return Inputs(flat, make_segments([elements // count] * count, shape.device))


def _bytes(shape: Shape) -> int:
    count, elements = shape.sizes
    return elements // count * count * shape.dtype.itemsize + 4 * count


def _foreach(inputs: Inputs) -> Bound:
    """What clip_grad_norm_ does with a list of gradients before it adds their norms."""
    grads = inputs.segments.split(inputs.flat)
    return lambda: [torch.stack(torch._foreach_norm(grads, 2.0)).square()]


def _of_equal_lengths(flat: Tensor, segments: Segments) -> Tensor:
    return flat.view(len(segments.lengths), -1).float().square().sum(1)


BENCH = Bench(
    name="segment_squares",
    shapes={"cuda": ["150,86000000", "150,22000000", "294,304000000"], "cpu": ["150,2200000"]},  # segments, elements
    make=_make,
    bytes=_bytes,
    ours=segment_squares,
    reference=segment_squares_reference,
    others=lambda shape: {"torch._foreach_norm": Variant(_foreach)},
    compiled=lambda shape: _of_equal_lengths,
)

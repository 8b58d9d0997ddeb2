"""segment_squares: the squared norm of each parameter's gradient, from one flat tensor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import Segments, make_segments, segment_squares
from fastdino_kernels.optim.segment_squares import segment_squares_reference

SHAPES = {"cuda": ["150,22000000", "150,86000000", "294,304000000"], "cpu": ["150,2200000"]}  # segments, elements


class Inputs(NamedTuple):
    flat: Tensor
    segments: Segments


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (segments, elements), dtype = parse_shape(shape)
    size = elements // segments

    def make(seed: int) -> Inputs:
        flat = torch.randn(size * segments, generator=generator(device, seed), device=device).to(dtype)
        return Inputs(flat, make_segments([size] * segments, device))

    variants = {
        OURS: Variant(_bind(segment_squares)),
        PLAIN: Variant(_bind(segment_squares_reference)),
        "torch._foreach_norm": Variant(_foreach),
    }
    if compiled:
        summed = torch.compile(lambda x: x.view(segments, size).float().square().sum(1), dynamic=False)
        variants["equal segments, torch.compile"] = Variant(lambda inputs: lambda: [summed(inputs.flat)])
    return Case("segment_squares", shape, make, _exact, variants, size * segments * dtype.itemsize + 4 * segments)


def _bind(implementation: Callable[[Tensor, Segments], Tensor]) -> Callable[[Inputs], Bound]:
    return lambda inputs: lambda: [implementation(*inputs)]


def _foreach(inputs: Inputs) -> Bound:
    """What clip_grad_norm_ does with a list of gradients before it adds their norms."""
    grads = inputs.segments.split(inputs.flat)
    return lambda: [torch.stack(torch._foreach_norm(grads, 2.0)).square()]


def _exact(inputs: Inputs) -> list[Tensor]:
    return [segment_squares_reference(inputs.flat.double(), inputs.segments)]

"""sinkhorn: three iterations over the teacher's logits. Ours gives two vectors, lightly's the whole matrix."""

from typing import Any

import torch
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor

from bench.kernels.case import LOGITS_STD, OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels.losses.sinkhorn import sinkhorn, sinkhorn_reference

TEMP, ITERATIONS = 0.07, 3
SHAPES = {"cuda": ["3764,65536,bf16", "4096,131072,bf16"], "cpu": ["64,4096", "64,4096,bf16", "512,16384"]}  # R, K


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (R, K), dtype = parse_shape(shape)

    def make(seed: int) -> Tensor:
        return (LOGITS_STD * torch.randn(R, K, generator=generator(device, seed), device=device)).to(dtype)

    variants = {
        OURS: Variant(_bind(sinkhorn), judge=_matrix),
        PLAIN: Variant(_bind(sinkhorn_reference), judge=_matrix),
        "lightly": Variant(lambda x: lambda: [lightly_sinkhorn(x.float(), ITERATIONS, TEMP)]),
    }
    if compiled:
        variants["torch.compile"] = Variant(_bind(torch.compile(sinkhorn_reference, dynamic=False)), judge=_matrix)
    # An iteration needs the sums of the columns, then those of the rows: two readings.
    return Case("sinkhorn", shape, make, _exact, variants, 2 * ITERATIONS * R * K * dtype.itemsize)


def _bind(implementation: Any) -> Any:
    def bind(logits: Tensor) -> Bound:
        return lambda: list(implementation(logits, temp=TEMP, iterations=ITERATIONS))

    return bind


def _matrix(logits: Tensor, scalings: list[Tensor]) -> list[Tensor]:
    """Q, which is what the vectors stand for."""
    row, column = (x.double() for x in scalings)
    return [(logits.double() / TEMP + row[:, None] + column).exp()]


def _exact(logits: Tensor) -> list[Tensor]:
    return _matrix(logits, list(sinkhorn_reference(logits.double(), temp=TEMP, iterations=ITERATIONS)))

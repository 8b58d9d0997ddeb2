"""sinkhorn: three iterations over the teacher's logits. Ours gives two vectors, lightly's the whole matrix."""

from functools import partial
from typing import NamedTuple

from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor

from bench.kernels.case import LOGITS_STD, Bench, Shape, Variant
from fastdino_kernels.losses.sinkhorn import sinkhorn, sinkhorn_reference

TEMP, ITERATIONS = 0.07, 3


class Inputs(NamedTuple):
    logits: Tensor  # (R, K)


def _make(shape: Shape, seed: int) -> Inputs:
    return Inputs((LOGITS_STD * shape.random(seed)(*shape.sizes)).to(shape.dtype))


def _bytes(shape: Shape) -> int:
    """An iteration needs the sums of the columns, then those of the rows: two readings."""
    R, K = shape.sizes
    return 2 * ITERATIONS * R * K * shape.dtype.itemsize


def _log_matrix(inputs: Inputs, scalings: list[Tensor]) -> list[Tensor]:
    """log Q, which is what the vectors stand for, in their dtype.

    fp32 rounds exponents of 30 by some 4e-6, with which the peak of Q, a hundred times its root mean square, would be
    off by 4e-4 of that: more than the tolerance, which is for peaks of 20.
    """
    row, column = (x.double() for x in scalings)
    return [(inputs.logits.double() / TEMP + row[:, None] + column).to(scalings[0].dtype)]


BENCH = Bench(
    name="sinkhorn",
    # R, K
    shapes={"cuda": ["3736,65536,bf16", "4096,131072,bf16"], "cpu": ["64,4096", "64,4096,bf16", "512,16384"]},
    make=_make,
    bytes=_bytes,
    ours=partial(sinkhorn, temp=TEMP, iterations=ITERATIONS),
    reference=partial(sinkhorn_reference, temp=TEMP, iterations=ITERATIONS),
    others=lambda shape: {
        "lightly": Variant(
            lambda inputs: lambda: [lightly_sinkhorn(inputs.logits.float(), ITERATIONS, TEMP)],
            judge=lambda inputs, results: [results[0].log()],
        )
    },
    judge=_log_matrix,
)

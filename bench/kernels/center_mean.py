"""center_mean: the mean of the teacher's logits over views and images."""

from typing import NamedTuple

from lightly.models.modules.center import center_mean as lightly_center_mean
from torch import Tensor

from bench.kernels.case import Bench, Shape
from fastdino_kernels import center_mean
from fastdino_kernels.losses.center_mean import center_mean_reference


class Inputs(NamedTuple):
    teacher: Tensor


def _make(shape: Shape, seed: int) -> Inputs:
    return Inputs(shape.random(seed)(*shape.sizes).to(shape.dtype))


def _bytes(shape: Shape) -> int:
    T, B, K = shape.sizes
    return T * B * K * shape.dtype.itemsize + 4 * K


BENCH = Bench(
    name="center_mean",
    shapes={"cuda": ["2,64,65536,bf16", "2,64,262144,bf16"], "cpu": ["2,8,65536", "2,8,65536,bf16"]},  # T, B, K
    make=_make,
    bytes=_bytes,
    ours=center_mean,
    reference=center_mean_reference,
    others=lambda shape: {"lightly": lambda x: lightly_center_mean(x, dim=(0, 1)).view(-1)},
)

"""koleo_loss, forward and backward: the class tokens of the global views, each within its view."""

from typing import NamedTuple

import torch
from lightly.loss import KoLeoLoss
from torch import Tensor

from bench.kernels.case import Bench, Shape
from fastdino_kernels import koleo_loss
from fastdino_kernels.losses.koleo_loss import koleo_loss_reference


class Inputs(NamedTuple):
    features: Tensor  # (G, B, D), a leaf


def _make(shape: Shape, seed: int) -> Inputs:
    """Pairs: of many rows, two may else be equally near within a rounding, and variants choose differently."""
    G, B, D = shape.sizes
    x = shape.random(seed)(G, B, D)
    x[:, 1::2] += x[:, 0 : B // 2 * 2 : 2]
    return Inputs(x.to(shape.dtype).requires_grad_())


def _bytes(shape: Shape) -> int:
    """Forward reads the features; backward reads them again and writes their gradient."""
    G, B, D = shape.sizes
    return 3 * G * B * D * shape.dtype.itemsize


def _lightly(features: Tensor) -> Tensor:
    """One call for each view, in fp32 as DINOv2 does it."""
    return torch.stack([KoLeoLoss()(view.float()) for view in features]).mean()


BENCH = Bench(
    name="koleo_loss",
    # G, B, D
    shapes={"cuda": ["2,64,1024,bf16", "2,64,384", "2,1024,1024,bf16"], "cpu": ["2,64,384", "2,64,1024,bf16"]},
    make=_make,
    bytes=_bytes,
    ours=koleo_loss,
    reference=koleo_loss_reference,
    others=lambda shape: {"lightly": _lightly},
    leaves=("features",),
)

"""gather_layer_norm, forward and backward: what a residual branch reads of the images that stochastic depth keeps."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import Bench, Shape
from fastdino_kernels import gather_layer_norm
from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm_reference

# B, M, N, D: two global views of 64 images at a drop rate of 0.3, eight local ones; ViT-B, ViT-L
SHAPES = {
    "cuda": ["128,89,201,768,bf16", "512,358,37,768,bf16", "128,89,201,1024,bf16"],
    "cpu": ["16,11,201,384"],
}
EPS = 1e-6


class Inputs(NamedTuple):
    x: Tensor  # (B, N, D), a leaf
    rows: Tensor  # (M,)
    weight: Tensor  # (D,) in x's dtype, a leaf
    bias: Tensor
    grad: Tensor  # (M, N, D) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    (B, M, N, D), random = shape.sizes, shape.random(seed)
    x, weight, bias, grad = (random(size).to(shape.dtype) for size in [(B, N, D), D, D, (M, N, D)])
    return Inputs(x.requires_grad_(), kept_rows(shape, seed), weight.requires_grad_(), bias.requires_grad_(), grad)


def kept_rows(shape: Shape, seed: int) -> Tensor:
    """M of B images, in any order."""
    B, M = shape.sizes[:2]
    return torch.randperm(B, generator=torch.Generator(shape.device).manual_seed(seed), device=shape.device)[:M]


def _bytes(shape: Shape) -> int:
    """Forward reads the kept rows and writes y; backward reads both again and writes the gradient of all rows."""
    B, M, N, D = shape.sizes
    return (4 * M + B) * N * D * shape.dtype.itemsize


def _eager(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x[rows], x.shape[2:], weight, bias, EPS)


BENCH = Bench(
    name="gather_layer_norm",
    shapes=SHAPES,
    make=_make,
    bytes=_bytes,
    ours=partial(gather_layer_norm, eps=EPS),
    reference=partial(gather_layer_norm_reference, eps=EPS),
    others=lambda shape: {"F.layer_norm(x[rows])": _eager},
    compiled=lambda shape: _eager,
    leaves=("x", "weight", "bias"),
)

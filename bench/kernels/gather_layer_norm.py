"""gather_layer_norm, forward and backward: what a residual branch reads of the views that stochastic depth keeps."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import Bench, Shape
from fastdino_kernels import gather_layer_norm
from fastdino_kernels.layers._sample_drop import kept_tokens
from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm_reference

# Sequences and tokens of each, group by group, and D: 2 global and 8 local views of 64 images; ViT-L, ViT-B, and the
# global views of ViT-L with 4 registers.
SHAPES = {
    "cuda": ["128,197,512,37,1024,bf16", "128,197,512,37,768,bf16", "128,201,1024,bf16"],
    "cpu": ["16,197,64,37,384"],
}
DROP = 0.3
Lengths = tuple[tuple[int, int], ...]
EPS = 1e-6


class Inputs(NamedTuple):
    x: Tensor  # (tokens, D), a leaf
    lengths: Lengths
    rows: list[Tensor]  # (M,) per group
    weight: Tensor  # (D,) in x's dtype, a leaf
    bias: Tensor
    grad: Tensor  # (kept tokens, D) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    lengths, width, random = lengths_of(shape), shape.sizes[-1], shape.random(seed)
    all_tokens, kept = num_tokens(shape)
    sizes = [(all_tokens, width), (width,), (width,), (kept, width)]
    x, weight, bias, grad = (random(size).to(shape.dtype) for size in sizes)
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    return Inputs(leaves[0], lengths, kept_rows(shape, seed), *leaves[1:], grad)


def lengths_of(shape: Shape) -> Lengths:
    """(sequences, tokens of each) per group."""
    *sizes, _ = shape.sizes
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def kept_rows(shape: Shape, seed: int) -> list[Tensor]:
    """Of each group int(n * (1 - DROP)) of its n sequences, at least one, in any order."""
    generator = torch.Generator(shape.device).manual_seed(seed)
    return [
        torch.randperm(n, generator=generator, device=shape.device)[: max(1, int(n * (1 - DROP)))]
        for n, _ in lengths_of(shape)
    ]


def num_tokens(shape: Shape) -> tuple[int, int]:
    """Of all sequences, and of those that are kept."""
    groups = [(n, max(1, int(n * (1 - DROP))), tokens) for n, tokens in lengths_of(shape)]
    return sum(n * tokens for n, _, tokens in groups), sum(kept * tokens for _, kept, tokens in groups)


def _bytes(shape: Shape) -> int:
    """Forward reads the kept rows and writes y; backward reads both again and writes the gradient of all rows."""
    all_tokens, kept = num_tokens(shape)
    return (4 * kept + all_tokens) * shape.sizes[-1] * shape.dtype.itemsize


def _eager(x: Tensor, lengths: Lengths, rows: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x[kept_tokens(lengths, rows)], x.shape[1:], weight, bias, EPS)


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

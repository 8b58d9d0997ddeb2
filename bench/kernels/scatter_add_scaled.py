"""scatter_add_scaled, forward and backward: a residual branch added back to the views that stochastic depth keeps."""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import Bench, Shape
from bench.kernels.gather_layer_norm import SHAPES, Lengths, kept_rows, lengths_of, num_tokens
from fastdino_kernels import scatter_add_scaled
from fastdino_kernels.layers._sample_drop import kept_tokens
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled_reference


class Inputs(NamedTuple):
    x: Tensor  # (tokens, D), a leaf
    lengths: Lengths
    rows: list[Tensor]  # (M,) per group
    branch: Tensor  # (kept tokens, D), a leaf
    layer_scale: Tensor  # (D,) in x's dtype, a leaf
    grad: Tensor  # (tokens, D) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    width, random = shape.sizes[-1], shape.random(seed)
    all_tokens, kept = num_tokens(shape)
    sizes = [(all_tokens, width), (kept, width), (width,), (all_tokens, width)]
    x, branch, layer_scale, grad = (random(size).to(shape.dtype) for size in sizes)
    leaves = x.requires_grad_(), branch.requires_grad_(), layer_scale.requires_grad_()
    return Inputs(leaves[0], lengths_of(shape), kept_rows(shape, seed), *leaves[1:], grad)


def _bytes(shape: Shape) -> int:
    """Forward reads x and the branch and writes the sum; backward reads the kept gradient rows and the branch, and
    writes the branch's gradient."""
    all_tokens, kept = num_tokens(shape)
    return (2 * all_tokens + 4 * kept) * shape.sizes[-1] * shape.dtype.itemsize


def _index_add(x: Tensor, lengths: Lengths, rows: list[Tensor], branch: Tensor, layer_scale: Tensor) -> Tensor:
    groups = zip(lengths, rows, strict=True)
    scale = torch.cat([branch.new_full((len(kept) * tokens, 1), n / len(kept)) for (n, tokens), kept in groups])
    return x.index_add(0, kept_tokens(lengths, rows), branch * layer_scale * scale)


BENCH = Bench(
    name="scatter_add_scaled",
    shapes=SHAPES,
    make=_make,
    bytes=_bytes,
    ours=scatter_add_scaled,
    reference=scatter_add_scaled_reference,
    others=lambda shape: {"index_add": _index_add},
    compiled=lambda shape: _index_add,
    leaves=("x", "branch", "layer_scale"),
)

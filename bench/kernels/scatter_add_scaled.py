"""scatter_add_scaled, forward and backward: a residual branch added back to the images that stochastic depth keeps."""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from bench.kernels.case import Bench, Shape
from bench.kernels.gather_layer_norm import SHAPES, kept_rows
from fastdino_kernels import scatter_add_scaled
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled_reference


class Inputs(NamedTuple):
    x: Tensor  # (B, N, D), a leaf
    rows: Tensor  # (M,)
    branch: Tensor  # (M, N, D), a leaf
    layer_scale: Tensor  # (D,) in x's dtype, a leaf
    grad: Tensor  # (B, N, D) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    (B, M, N, D), random = shape.sizes, shape.random(seed)
    sizes = [(B, N, D), (M, N, D), D, (B, N, D)]
    x, branch, layer_scale, grad = (random(size).to(shape.dtype) for size in sizes)
    leaves = x.requires_grad_(), branch.requires_grad_(), layer_scale.requires_grad_()
    return Inputs(leaves[0], kept_rows(shape, seed), *leaves[1:], grad)


def _bytes(shape: Shape) -> int:
    """Forward reads x and the branch and writes the sum; backward reads the kept gradient rows and the branch, and
    writes the branch's gradient."""
    B, M, N, D = shape.sizes
    return (2 * B + 4 * M) * N * D * shape.dtype.itemsize


def _scaled(implementation: Any, x: Tensor, rows: Tensor, *rest: Tensor) -> Tensor:
    return implementation(x, rows, *rest, len(x) / len(rows))


def _index_add(x: Tensor, rows: Tensor, branch: Tensor, layer_scale: Tensor) -> Tensor:
    return x.index_add(0, rows, branch * layer_scale, alpha=len(x) / len(rows))


BENCH = Bench(
    name="scatter_add_scaled",
    shapes=SHAPES,
    make=_make,
    bytes=_bytes,
    ours=partial(_scaled, scatter_add_scaled),
    reference=partial(_scaled, scatter_add_scaled_reference),
    others=lambda shape: {"index_add": _index_add},
    compiled=lambda shape: _index_add,
    leaves=("x", "branch", "layer_scale"),
)

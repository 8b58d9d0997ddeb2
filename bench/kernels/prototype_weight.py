"""prototype_weight, forward and backward: weight normalisation of the prototypes, rounded to the layer's dtype."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.kernels.case import Bench, Bound, Shape, Variant
from fastdino_kernels import prototype_weight
from fastdino_kernels.layers.prototype_weight import prototype_weight_reference


class Inputs(NamedTuple):
    v: Tensor  # (K, D) fp32, a leaf
    g: Tensor  # (K, 1) ones, as with frozen norms
    dtype: torch.dtype  # of the result
    grad: Tensor  # (K, D) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    (K, D), random = shape.sizes, shape.random(seed)
    v, grad = random(K, D), random(K, D).to(shape.dtype)
    return Inputs(v.requires_grad_(), torch.ones(K, 1, device=shape.device), shape.dtype, grad)


def _bytes(shape: Shape) -> int:
    """Forward reads v and writes w; backward reads v and the gradient and writes v's; g is small."""
    K, D = shape.sizes
    return K * D * (3 * 4 + 2 * shape.dtype.itemsize) + 8 * K


def _reference(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return prototype_weight_reference(v, g, v.dtype if v.dtype == torch.float64 else dtype)


def _formula(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return (v * (g / v.norm(dim=1, keepdim=True))).to(dtype)


def _torch(inputs: Inputs) -> Bound:
    """torch's parametrization of a linear layer, whose weight is then cast, as autocast does."""
    layer = nn.utils.parametrizations.weight_norm(
        nn.Linear(inputs.v.shape[1], len(inputs.v), bias=False, device="meta")
    )
    parts = layer.parametrizations.weight
    parts.original0, parts.original1 = nn.Parameter(inputs.g, requires_grad=False), nn.Parameter(inputs.v.detach())

    def call() -> list[Tensor]:
        w = layer.weight.to(inputs.dtype)
        (grad,) = torch.autograd.grad(w, parts.original1, inputs.grad)
        return [w.detach(), grad]

    return call


BENCH = Bench(
    name="prototype_weight",
    shapes={
        "cuda": ["65536,256,bf16", "65536,256", "262144,512,bf16"],
        "cpu": ["4096,256"],
    },  # K, D, the result's dtype
    make=_make,
    bytes=_bytes,
    ours=prototype_weight,
    reference=_reference,
    others=lambda shape: {"formula": _formula, "torch weight_norm": Variant(_torch)},
    compiled=lambda shape: _formula,
    leaves=("v",),
)

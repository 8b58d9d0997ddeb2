"""prototype_weight, forward and backward: weight normalisation of the prototypes, rounded to the layer's dtype."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import prototype_weight
from fastdino_kernels.layers.prototype_weight import prototype_weight_reference

SHAPES = {"cuda": ["65536,256,bf16", "65536,256", "262144,512,bf16"], "cpu": ["4096,256"]}  # K, D, dtype of the result


class Inputs(NamedTuple):
    v: Tensor  # (K, D) fp32, a leaf
    g: Tensor  # (K, 1) ones, as with frozen norms
    grad: Tensor  # (K, D) that comes back


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (K, D), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        v, grad = (torch.randn(K, D, generator=generator(device, 2 * seed + i), device=device) for i in range(2))
        return Inputs(v.requires_grad_(), torch.ones(K, 1, device=device), grad.to(dtype))

    def formula(v: Tensor, g: Tensor) -> Tensor:
        return (v * (g / v.norm(dim=1, keepdim=True))).to(dtype)

    variants = {
        OURS: Variant(_bind(lambda v, g: prototype_weight(v, g, dtype))),
        PLAIN: Variant(_bind(lambda v, g: prototype_weight_reference(v, g, dtype))),
        "formula": Variant(_bind(formula)),
        "torch weight_norm": Variant(lambda inputs: _torch(inputs, dtype)),
    }
    if compiled:
        variants["formula, torch.compile"] = Variant(_bind(torch.compile(formula, dynamic=False)))
    # Forward reads v and writes w; backward reads v and the gradient and writes v's; g is small.
    return Case("prototype_weight", shape, make, _exact, variants, K * D * (3 * 4 + 2 * dtype.itemsize) + 8 * K)


def _bind(implementation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            w = implementation(inputs.v, inputs.g)
            (grad,) = torch.autograd.grad(w, inputs.v, inputs.grad)
            return [w.detach(), grad]

        return call

    return bind


def _torch(inputs: Inputs, dtype: torch.dtype) -> Bound:
    """torch's parametrization of a linear layer, whose weight is then cast, as autocast does."""
    layer = nn.utils.parametrizations.weight_norm(
        nn.Linear(inputs.v.shape[1], len(inputs.v), bias=False, device="meta")
    )
    parts = layer.parametrizations.weight
    parts.original0, parts.original1 = nn.Parameter(inputs.g, requires_grad=False), nn.Parameter(inputs.v.detach())

    def call() -> list[Tensor]:
        w = layer.weight.to(dtype)
        (grad,) = torch.autograd.grad(w, parts.original1, inputs.grad)
        return [w.detach(), grad]

    return call


def _exact(inputs: Inputs) -> list[Tensor]:
    v = inputs.v.detach().double().requires_grad_()
    w = prototype_weight_reference(v, inputs.g.double())
    (grad,) = torch.autograd.grad(w, v, inputs.grad.double())
    return [w.detach(), grad]

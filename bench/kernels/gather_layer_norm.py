"""gather_layer_norm, forward and backward: what a residual branch reads of the images that stochastic depth keeps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
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


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (B, M, N, D), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        random = generator(device, seed)
        x, weight, bias, grad = (
            torch.randn(size, generator=random, device=device, dtype=dtype) for size in [(B, N, D), D, D, (M, N, D)]
        )
        rows = torch.randperm(B, generator=random, device=device)[:M]
        return Inputs(x.requires_grad_(), rows, weight.requires_grad_(), bias.requires_grad_(), grad)

    variants = {
        OURS: Variant(_bind(lambda *inputs: gather_layer_norm(*inputs, eps=EPS))),
        PLAIN: Variant(_bind(_reference)),
        "F.layer_norm(x[rows])": Variant(_bind(_eager)),
    }
    if compiled:
        variants["F.layer_norm(x[rows]), torch.compile"] = Variant(_bind(torch.compile(_eager, dynamic=False)))
    # Forward reads the kept rows and writes y; backward reads both again and writes the gradient of all rows.
    return Case("gather_layer_norm", shape, make, _exact, variants, (4 * M + B) * N * D * dtype.itemsize)


def _reference(*inputs: Tensor) -> Tensor:
    return gather_layer_norm_reference(*inputs, eps=EPS)


def _eager(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x[rows], x.shape[2:], weight, bias, EPS)


def _bind(implementation: Callable[..., Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            y = implementation(*inputs[:4])
            return [y.detach(), *torch.autograd.grad(y, (inputs.x, inputs.weight, inputs.bias), inputs.grad)]

        return call

    return bind


def _exact(inputs: Inputs) -> list[Tensor]:
    x, weight, bias, grad = (tensor.detach().double() for tensor in (inputs.x, inputs.weight, inputs.bias, inputs.grad))
    leaves = (x.requires_grad_(), inputs.rows, weight.requires_grad_(), bias.requires_grad_())
    return _bind(_reference)(Inputs(*leaves, grad))()

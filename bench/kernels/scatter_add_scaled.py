"""scatter_add_scaled, forward and backward: a residual branch added back to the images that stochastic depth keeps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import scatter_add_scaled
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled_reference

# B, M, N, D: two global views of 64 images at a drop rate of 0.3, eight local ones; ViT-B, ViT-L
SHAPES = {
    "cuda": ["128,89,201,768,bf16", "512,358,37,768,bf16", "128,89,201,1024,bf16"],
    "cpu": ["16,11,201,384"],
}


class Inputs(NamedTuple):
    x: Tensor  # (B, N, D)
    rows: Tensor  # (M,)
    branch: Tensor  # (M, N, D), a leaf
    layer_scale: Tensor  # (D,) in x's dtype, a leaf
    grad: Tensor  # (B, N, D) that comes back


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (B, M, N, D), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        random = generator(device, seed)
        x, branch, layer_scale, grad = (
            torch.randn(size, generator=random, device=device, dtype=dtype)
            for size in [(B, N, D), (M, N, D), D, (B, N, D)]
        )
        rows = torch.randperm(B, generator=random, device=device)[:M]
        return Inputs(x.requires_grad_(), rows, branch.requires_grad_(), layer_scale.requires_grad_(), grad)

    variants = {
        OURS: Variant(_bind(lambda *inputs: scatter_add_scaled(*inputs, B / M))),
        PLAIN: Variant(_bind(lambda *inputs: scatter_add_scaled_reference(*inputs, B / M))),
        "index_add": Variant(_bind(_index_add)),
    }
    if compiled:
        variants["index_add, torch.compile"] = Variant(_bind(torch.compile(_index_add, dynamic=False)))
    # Forward reads x and the branch and writes the sum; backward reads the kept gradient rows and the branch, and
    # writes the branch's gradient.
    return Case("scatter_add_scaled", shape, make, _exact, variants, (2 * B + 4 * M) * N * D * dtype.itemsize)


def _index_add(x: Tensor, rows: Tensor, branch: Tensor, layer_scale: Tensor) -> Tensor:
    return x.index_add(0, rows, branch * layer_scale, alpha=len(x) / len(rows))


def _bind(implementation: Callable[..., Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            out = implementation(*inputs[:4])
            return [out.detach(), *torch.autograd.grad(out, (inputs.x, inputs.branch, inputs.layer_scale), inputs.grad)]

        return call

    return bind


def _exact(inputs: Inputs) -> list[Tensor]:
    x, branch, layer_scale, grad = (
        tensor.detach().double() for tensor in (inputs.x, inputs.branch, inputs.layer_scale, inputs.grad)
    )
    leaves = (x.requires_grad_(), inputs.rows, branch.requires_grad_(), layer_scale.requires_grad_())
    scale = len(x) / len(branch)
    return _bind(lambda *tensors: scatter_add_scaled_reference(*tensors, scale))(Inputs(*leaves, grad))()

"""fp8_linear, forward and backward: a block's linear layer on the tokens of a packed batch.

F.linear is the product of the same shape in bf16; torch.compile is ours as a block runs it, its rounding fused.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import Bench, Shape
from fastdino_kernels import fp8_linear
from fastdino_kernels.layers.fp8_linear import fp8_linear_reference


class Inputs(NamedTuple):
    x: Tensor  # (M, K), a leaf
    weight: Tensor  # (N, K), a leaf
    bias: Tensor  # (N,), a leaf
    grad: Tensor  # (M, N) that comes back


def _make(shape: Shape, seed: int) -> Inputs:
    (M, N, K), random = shape.sizes, shape.random(seed)
    sizes = [(M, K), (N, K), (N,), (M, N)]
    x, weight, bias, grad = (random(*size).to(shape.dtype) for size in sizes)
    return Inputs(x.requires_grad_(), (weight.detach() * K**-0.5).requires_grad_(), bias.requires_grad_(), grad)


def _bytes(shape: Shape) -> int:
    """x and the weight twice, y, its gradient, the gradients for both; the products, not these bytes, set the pace."""
    M, N, K = shape.sizes
    return (3 * M * K + 3 * N * K + 2 * M * N) * shape.dtype.itemsize


BENCH = Bench(
    name="fp8_linear",
    shapes={  # M, N, K: tokens of 2 global and 8 local views of 64 images; ViT-L's MLP and qkv, ViT-7B's MLP
        "cuda": ["44160,4096,1024,bf16", "44160,1024,4096,bf16", "44160,3072,1024,bf16", "11040,16384,4096,bf16"],
        "cpu": ["512,1024,1024"],
    },
    make=_make,
    bytes=_bytes,
    ours=fp8_linear,
    reference=fp8_linear_reference,
    others=lambda shape: {"F.linear": F.linear},
    compiled=lambda shape: fp8_linear,
    leaves=("x", "weight", "bias"),
)

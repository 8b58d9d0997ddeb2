"""center_mean: the mean of the teacher's logits over views and images."""

from collections.abc import Callable

import torch
from lightly.models.modules.center import center_mean as lightly_center_mean
from torch import Tensor

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import center_mean
from fastdino_kernels.losses.center_mean import center_mean_reference

SHAPES = {  # T, B, K
    "cuda": ["2,64,65536,bf16", "2,64,262144,bf16"],
    "cpu": ["2,8,65536", "2,8,65536,bf16"],
}


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (T, B, K), dtype = parse_shape(shape)

    def make(seed: int) -> Tensor:
        return torch.randn(T, B, K, generator=generator(device, seed), device=device).to(dtype)

    variants = {
        OURS: Variant(_bind(center_mean)),
        PLAIN: Variant(_bind(center_mean_reference)),
        "lightly": Variant(_bind(lambda x: lightly_center_mean(x, dim=(0, 1)).view(-1))),
    }
    if compiled:
        variants["torch.compile"] = Variant(_bind(torch.compile(center_mean_reference, dynamic=False)))
    num_bytes = T * B * K * dtype.itemsize + 4 * K
    return Case("center_mean", shape, make, lambda x: [x.double().mean((0, 1))], variants, num_bytes)


def _bind(implementation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Bound]:
    return lambda x: lambda: [implementation(x)]

"""linear_ibot_loss, forward and backward: features of masked patches, gradients for them and the prototypes."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import Bench, Shape
from bench.kernels.ibot_loss import TEMPS
from fastdino_kernels import ibot_loss, linear_ibot_loss
from fastdino_kernels.losses.linear_ibot_loss import linear_ibot_loss_reference


class Inputs(NamedTuple):
    student: Tensor  # (M, D), a leaf
    student_weight: Tensor  # (K, D), a leaf
    teacher: Tensor
    teacher_weight: Tensor
    center: Tensor
    weight: Tensor  # (M,)


def _make(shape: Shape, seed: int) -> Inputs:
    (M, K, D), random = shape.sizes, shape.random(seed)
    student, student_weight, teacher, teacher_weight = (
        torch.nn.functional.normalize(random(rows, D), dim=1).to(shape.dtype) for rows in (M, K, M, K)
    )
    leaves = student.requires_grad_(), student_weight.requires_grad_()
    return Inputs(*leaves, teacher, teacher_weight, 0.1 * random(K), torch.full((M,), 1 / M, device=shape.device))


def _bytes(shape: Shape) -> int:
    """Both features and weights once, the two gradients; the products, not these bytes, set the pace."""
    M, K, D = shape.sizes
    return (3 * M + 3 * K) * D * shape.dtype.itemsize + 4 * (K + M)


def _whole(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, weight: Tensor
) -> Tensor:
    """All logits at once, their gradient over them."""
    logits = student @ student_weight.T, teacher @ teacher_weight.T
    return ibot_loss(*logits, center, weight, **TEMPS, inplace_grad=True)


BENCH = Bench(
    name="linear_ibot_loss",
    shapes={  # M, K, D: masked patches of 64 images at 14 x 14 and at 16 x 16 patches; DINOv2's ViT-L, its ViT-g
        "cuda": ["3736,65536,256,bf16", "4888,131072,256,bf16"],
        "cpu": ["1024,4096,256", "1024,4096,256,bf16"],
    },
    make=_make,
    bytes=_bytes,
    ours=partial(linear_ibot_loss, **TEMPS),
    reference=partial(linear_ibot_loss_reference, **TEMPS),
    others=lambda shape: {"linear, ibot_loss": _whole},
    leaves=("student", "student_weight"),
)

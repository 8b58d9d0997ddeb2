"""dino_loss, forward and backward: all pairs of views, the gradient for the student's logits."""

from functools import partial
from typing import Any, NamedTuple

import torch
from lightly.loss import DINOLoss
from torch import Tensor

from bench.kernels.case import LOGITS_STD, Bench, Bound, Function, Shape, Variant, with_gradients
from fastdino_kernels import dino_loss
from fastdino_kernels.losses.dino_loss import dino_loss_reference

TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.04}


class Inputs(NamedTuple):
    student: Tensor  # (S, B, K), a leaf
    teacher: Tensor
    center: Tensor


def _make(shape: Shape, seed: int) -> Inputs:
    (S, T, B, K), random = shape.sizes, shape.random(seed)
    student, teacher = ((LOGITS_STD * random(views, B, K)).to(shape.dtype) for views in (S, T))
    return Inputs(student.requires_grad_(), teacher, 0.1 * LOGITS_STD * random(K))


def _bytes(shape: Shape) -> int:
    """Student, teacher and center read, the gradient written."""
    S, T, B, K = shape.sizes
    return (2 * S + T) * B * K * shape.dtype.itemsize + 4 * K


def refill(inputs: Any) -> None:
    """New logits in the place of their gradient."""
    with torch.no_grad():
        inputs.student.normal_(0, LOGITS_STD)


def _others(shape: Shape) -> dict[str, Variant | Function]:
    return {"fastdino, gradient apart": partial(dino_loss, **TEMPS), "lightly": Variant(_lightly)}


def _lightly(inputs: Inputs) -> Bound:
    """As lightly's users call it, under autocast where the logits are bf16; without its update of the center."""
    loss = DINOLoss(len(inputs.center), **TEMPS).to(inputs.center.device)
    loss.center.copy_(inputs.center)
    loss.update_center = lambda teacher: None

    def implementation(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=student.dtype == torch.bfloat16):
            return loss(list(teacher), list(student), teacher_temp=TEMPS["teacher_temp"])

    return with_gradients(implementation, ["student"])(inputs)


BENCH = Bench(
    name="dino_loss",
    shapes={  # S, T, B, K
        "cuda": ["10,2,64,65536,bf16", "10,2,64,65536", "10,2,64,131072,bf16", "10,2,64,262144,bf16"],
        "cpu": ["10,2,8,4096", "10,2,8,4096,bf16"],
    },
    make=_make,
    bytes=_bytes,
    ours=partial(dino_loss, **TEMPS, inplace_grad=True),  # what the trainer calls
    reference=partial(dino_loss_reference, **TEMPS),
    others=_others,
    leaves=("student",),
    restore=refill,
)

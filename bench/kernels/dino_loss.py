"""dino_loss, forward and backward: all pairs of views, the gradient for the student's logits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from lightly.loss import DINOLoss
from torch import Tensor

from bench.kernels.case import LOGITS_STD, OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from bench.kernels.dino_loss_in_groups import dino_loss_in_groups
from fastdino_kernels import dino_loss
from fastdino_kernels.losses.dino_loss import dino_loss_reference

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
TEMPS: dict[str, Any] = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
SHAPES = {  # S, T, B, K
    "cuda": ["10,2,64,65536,bf16", "10,2,64,65536", "10,2,64,131072,bf16", "10,2,64,262144,bf16"],
    "cpu": ["10,2,8,4096", "10,2,8,4096,bf16"],
}


class Inputs(NamedTuple):
    student: Tensor  # (S, B, K), a leaf
    teacher: Tensor
    center: Tensor


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (S, T, B, K), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        random: dict[str, Any] = {"generator": generator(device, seed), "device": device}
        student, teacher = ((LOGITS_STD * torch.randn(views, B, K, **random)).to(dtype) for views in (S, T))
        return Inputs(student.requires_grad_(), teacher, 0.1 * LOGITS_STD * torch.randn(K, **random))

    def refill(inputs: Inputs) -> None:
        with torch.no_grad():
            inputs.student.normal_(0, LOGITS_STD)

    def fused(*args: Tensor) -> Tensor:
        return dino_loss(*args, **TEMPS)

    def in_place(*args: Tensor) -> Tensor:
        return dino_loss(*args, **TEMPS, inplace_grad=True)

    def reference(*args: Tensor) -> Tensor:
        return dino_loss_reference(*args, **TEMPS)

    variants = {
        OURS: Variant(_bind(in_place), refill),  # what the trainer calls
        "fastdino, gradient apart": Variant(_bind(fused)),
        PLAIN: Variant(_bind(reference)),
        "formula": Variant(_bind(formula)),
        "lightly": Variant(lambda inputs: _lightly(inputs, K)),
    }
    if device.type == "cuda":  # a CPU has no such groups
        groups = [group for group in (8, 16, 32) if group < B]
        for group in groups:
            call = partial(dino_loss_in_groups, **TEMPS, group=group)
            variants[f"{OURS}, groups of {group}"] = Variant(_bind(call), refill)
    if compiled:
        variants["formula, torch.compile"] = Variant(_bind(torch.compile(formula, dynamic=False)))
    num_bytes = (2 * S + T) * B * K * dtype.itemsize + 4 * K
    return Case("dino_loss", shape, make, _exact, variants, num_bytes)


def formula(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """Equation 1 of Caron et al. 2021 as one would write it today: autograd, all pairs in one product."""
    log_q = torch.log_softmax(student.float() / STUDENT_TEMP, dim=-1)
    p = torch.softmax((teacher.float() - center) / TEACHER_TEMP, dim=-1)
    cross_entropy = -torch.einsum("tbk,sbk->ts", p, log_q)
    pairs = cross_entropy.sum() - cross_entropy.diagonal().sum()
    return pairs / (len(teacher) * (len(student) - 1) * student.shape[1])


def _bind(implementation: Callable[..., Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            student = inputs.student.view_as(inputs.student)  # no leaf, like the output of a layer
            loss = implementation(student, inputs.teacher, inputs.center)
            (grad,) = torch.autograd.grad(loss, inputs.student)
            return [loss.detach(), grad]

        return call

    return bind


def _lightly(inputs: Inputs, num_prototypes: int) -> Bound:
    """lightly's loss as its users call it, under autocast where the logits are bf16; without its update of the center,
    which :mod:`bench.kernels.center_mean` measures."""
    loss = DINOLoss(num_prototypes, teacher_temp=TEACHER_TEMP, student_temp=STUDENT_TEMP).to(inputs.center.device)
    loss.center.copy_(inputs.center)
    loss.update_center = lambda teacher: None
    dtype = inputs.student.dtype

    def implementation(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return loss(list(teacher), list(student), teacher_temp=TEACHER_TEMP)

    return _bind(implementation)(inputs)


def _exact(inputs: Inputs) -> list[Tensor]:
    """The reference in float64, where the tests compare it with the published formula."""
    student = inputs.student.detach().double().requires_grad_()
    loss = dino_loss_reference(student, inputs.teacher.double(), inputs.center.double(), **TEMPS)
    loss.backward()
    assert student.grad is not None
    return [loss.detach(), student.grad]

"""ibot_loss, forward and backward: masked patches, gradient for the student's logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightly.loss import IBOTPatchLoss
from torch import Tensor

from bench.kernels.case import LOGITS_STD, OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from bench.kernels.peers_triton import RowLoss, entropy, row_losses
from fastdino_kernels.losses.ibot_loss import ibot_loss, ibot_loss_reference

TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.04}
IMAGES = 4  # M is a multiple of it
SHAPES = {
    "cuda": ["3764,65536,bf16", "4096,131072,bf16"],
    "cpu": ["64,4096", "64,4096,bf16", "512,16384", "512,16384,bf16"],
}  # M, K


class Inputs(NamedTuple):
    student: Tensor  # (M, K), a leaf
    teacher: Tensor
    center: Tensor
    weight: Tensor  # (M,)


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (M, K), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        random: dict[str, Any] = {"generator": generator(device, seed), "device": device}
        student, teacher = ((LOGITS_STD * torch.randn(M, K, **random)).to(dtype) for _ in range(2))
        weight = torch.full((M,), 1 / M, device=device)
        return Inputs(student.requires_grad_(), teacher, 0.1 * LOGITS_STD * torch.randn(K, **random), weight)

    def refill(inputs: Inputs) -> None:
        with torch.no_grad():
            inputs.student.normal_(0, LOGITS_STD)

    variants = {
        OURS: Variant(_bind(lambda *x: ibot_loss(*x, **TEMPS, inplace_grad=True)), refill),
        PLAIN: Variant(_bind(_reference)),
        "formula": Variant(_bind(formula)),
        "lightly": Variant(_lightly),
    }
    if device.type == "cuda":
        variants |= {name: divergence(loss) for name, loss in row_losses().items()}
    if compiled:
        variants["formula, torch.compile"] = Variant(_bind(torch.compile(formula, dynamic=False)))
    return Case("ibot_loss", shape, make, _exact, variants, 3 * M * K * dtype.itemsize + 4 * (K + M))


def _reference(*inputs: Tensor) -> Tensor:
    return ibot_loss_reference(*inputs, **TEMPS)


def formula(student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor) -> Tensor:
    """Equation 2 of Zhou et al. 2022 as one would write it today, with autograd."""
    log_q = torch.log_softmax(student.float() / TEMPS["student_temp"], dim=-1)
    p = torch.softmax((teacher.float() - center) / TEMPS["teacher_temp"], dim=-1)
    return -(weight * (p * log_q).sum(dim=-1)).sum()


def _bind(implementation: Callable[..., Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            student = inputs.student.view_as(inputs.student)  # no leaf, like the output of a layer
            loss = implementation(student, *inputs[1:])
            (grad,) = torch.autograd.grad(loss, inputs.student)
            return [loss.detach(), grad]

        return call

    return bind


def _lightly(inputs: Inputs) -> Bound:
    """Under autocast where the logits are bf16; without its update of the center."""
    student, teacher, center, _ = inputs
    loss = IBOTPatchLoss(len(center), **TEMPS).to(center.device)
    loss.center.center.copy_(center)
    loss.center.update = lambda x: None
    mask = torch.ones(IMAGES, 1, len(student) // IMAGES, dtype=torch.bool, device=center.device)

    def implementation(student: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=student.dtype == torch.bfloat16):
            return loss(teacher, student, mask)

    return _bind(implementation)(inputs)


def divergence(kl: RowLoss) -> Variant:
    """A peer's KL(q || p), behind the softmaxes that it leaves to its user; weights are equal, so the mean is theirs.

    The teacher's entropy, by which the cross-entropy is larger, is added where it is judged, not where it is timed.
    """

    def implementation(student: Tensor, teacher: Tensor, center: Tensor, _: Tensor) -> Tensor:
        log_p = torch.log_softmax(student.float() / TEMPS["student_temp"], dim=-1)
        log_q = torch.log_softmax((teacher.float() - center) / TEMPS["teacher_temp"], dim=-1)
        return kl(log_p, log_q)

    def judge(inputs: Inputs, results: list[Tensor]) -> list[Tensor]:
        loss, grad = results
        return [loss + entropy(inputs.teacher, inputs.center, TEMPS["teacher_temp"]), grad]

    return Variant(_bind(implementation), judge=judge)


def _exact(inputs: Inputs) -> list[Tensor]:
    student = inputs.student.detach().double().requires_grad_()
    loss = _reference(student, *(x.double() for x in inputs[1:]))
    (grad,) = torch.autograd.grad(loss, student)
    return [loss.detach(), grad]

"""The soft cross-entropy in plain torch: what defines the losses of DINO and iBOT, and what a CPU runs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype
from fastdino_kernels._chunks import chunks, without_subnormals
from fastdino_kernels.soft_cross_entropy import Terms, dense_rows, unpack


def soft_cross_entropy_reference(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, inplace_grad: bool
) -> Tensor:
    """:func:`soft_cross_entropy` in plain torch, also for fp64, which stays fp64: the tests' truth; B may be 0."""
    return _SoftCrossEntropyReference.apply(student, teacher, center, weight, terms, inplace_grad)


class _SoftCrossEntropyReference(torch.autograd.Function):
    """A few images at a time, view by view, and the gradient by hand: autograd would keep every probability."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        weight: Tensor | None,
        terms: Terms,
        inplace_grad: bool,
    ) -> Tensor:
        student = dense_rows(student)
        ctx.save_for_backward(student, teacher, center, weight)
        ctx.terms, ctx.inplace_grad, ctx.consumed = terms, inplace_grad, False
        return reference_loss(student, teacher, center, weight, terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, grad, (teacher, center, weight) = unpack(ctx)
        reference_gradient_(grad, student, grad_loss, teacher, center, weight, ctx.terms)
        return grad, None, None, None, None, None


def reference_loss(student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms) -> Tensor:
    """The scaled sum of weight * -<q, log p> over images and pairs of views."""
    loss = torch.zeros((), dtype=compute_dtype(student), device=student.device)
    for images in chunks(*student.shape[1:]):
        for s, target in enumerate(_targets(student, teacher[:, images], center, terms)):
            log_p = torch.log_softmax(student[s, images].to(loss.dtype) / terms.student_temp, dim=-1)
            cross_entropy = -(target * log_p).sum(dim=-1)
            loss += (cross_entropy if weight is None else weight[images] * cross_entropy).sum()
    return loss * terms.scale


def reference_gradient_(
    grad: Tensor,
    student: Tensor,
    grad_loss: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor | None,
    terms: Terms,
) -> None:
    """Writes grad_loss times its gradient, weight * (p - q) summed over pairs, into ``grad``: maybe ``student``."""
    scale = grad_loss * (terms.scale / terms.student_temp)
    for images in chunks(*student.shape[1:]):
        row_scale = scale if weight is None else scale * weight[images, None]
        for s, target in enumerate(_targets(student, teacher[:, images], center, terms)):
            p = torch.softmax(student[s, images].to(scale.dtype) / terms.student_temp, dim=-1)
            num_targets = len(teacher) - (terms.other_views and s < len(teacher))
            grad[s, images] = torch.sub(target, p, alpha=num_targets).mul_(-row_scale)


def _targets(student: Tensor, teacher: Tensor, center: Tensor, terms: Terms) -> list[Tensor]:
    """For each student view the sum of the teacher's probabilities over the views that it is compared with."""
    logits = (teacher.to(compute_dtype(student)) - center).div_(terms.teacher_temp)
    q = torch.softmax(without_subnormals(logits), dim=-1)
    everyone = q[0] + q[1] if len(q) == 2 else q[0]
    if not terms.other_views:
        return [everyone] * len(student)
    others = [q[1], q[0]] if len(q) == 2 else [torch.zeros_like(everyone)]
    return others + [everyone] * (len(student) - len(q))

"""The soft cross-entropy in plain torch: what defines the losses of DINO and iBOT, and what a CPU runs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype, operator
from fastdino_kernels._chunks import chunks, without_subnormals_
from fastdino_kernels.soft_cross_entropy import Terms, consume, dense_rows


def soft_cross_entropy_reference(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, inplace_grad: bool
) -> Tensor:
    """:func:`soft_cross_entropy` in plain torch, also for fp64, which stays fp64: the tests' truth; B may be 0."""
    return _SoftCrossEntropyReference.apply(student, teacher, center, weight, terms, inplace_grad)


class _SoftCrossEntropyReference(torch.autograd.Function):
    """A few images at a time, view by view, and the gradient by hand: autograd would keep every probability.

    Where it may replace the logits it does so in the forward pass, which has the probabilities at hand.
    """

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
        ctx.terms, ctx.inplace_grad, ctx.consumed = terms, inplace_grad, False
        if not (inplace_grad and ctx.needs_input_grad[0]):
            ctx.save_for_backward(student, teacher, center, weight)
            return reference_loss(student, teacher, center, weight, terms)
        ctx.grad = student.detach()
        loss = reference_loss(student, teacher, center, weight, terms, ctx.grad)
        torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_grad:
            consume(ctx)
            scale_reference_(ctx.grad, grad_loss)
            return ctx.grad, None, None, None, None, None
        student, teacher, center, weight = ctx.saved_tensors
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        reference_loss(student, teacher, center, weight, ctx.terms, grad)
        return grad.mul_(grad_loss), None, None, None, None, None


@operator("x")
def scale_reference_(x: Tensor, factor: Tensor) -> None:
    """Multiplies ``x`` by a 0-d ``factor``; not by 1, since on a CPU there is nothing to wait for before one looks."""
    if factor.tolist() != 1:
        x.mul_(factor)


def reference_loss(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, grad: Tensor | None = None
) -> Tensor:
    """The scaled sum of weight * -<q, log p> over images and pairs of views.

    ``grad``, which may be ``student``, receives the gradient: weight * (p - q) summed over pairs, scaled.
    """
    dtype = compute_dtype(student)
    row_loss = torch.zeros(student.shape[1], dtype=dtype, device=student.device)
    scale = terms.scale / terms.student_temp
    row_scale = None if weight is None else scale * weight[:, None]
    for images in chunks(*student.shape[1:]):
        for s, target in enumerate(_targets(student, teacher[:, images], center, terms)):
            log_p = torch.log_softmax(student[s, images].to(dtype) / terms.student_temp, dim=-1)
            row_loss[images] -= (target * log_p).sum(dim=-1)
            if grad is not None:
                num_targets = len(teacher) - (terms.other_views and s < len(teacher))
                p = log_p.exp_() if num_targets == 1 else log_p.exp_().mul_(num_targets)
                torch.mul(p.sub_(target), scale if row_scale is None else row_scale[images], out=grad[s, images])
                del p
            del target, log_p  # before the next ones are made
    return (row_loss if weight is None else weight * row_loss).sum() * terms.scale


def _targets(student: Tensor, teacher: Tensor, center: Tensor, terms: Terms) -> list[Tensor]:
    """For each student view the sum of the teacher's probabilities over the views that it is compared with."""
    logits = (teacher - center).div_(terms.teacher_temp)  # at least fp32, as the center is
    q = torch.softmax(without_subnormals_(logits), dim=-1)
    everyone = q[0] + q[1] if len(q) == 2 else q[0]
    if not terms.other_views:
        return [everyone] * len(student)
    others = [q[1], q[0]] if len(q) == 2 else [torch.zeros_like(everyone)]
    return others + [everyone] * (len(student) - len(q))

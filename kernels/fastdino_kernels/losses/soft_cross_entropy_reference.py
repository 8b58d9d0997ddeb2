"""The soft cross-entropy in plain torch: what defines the losses of DINO and iBOT, and what a CPU runs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import check_single_backward, compute_dtype, dense_rows, operator
from fastdino_kernels._chunks import chunks


class Terms(NamedTuple):
    """Which cross-entropies are summed, and how."""

    student_temp: float
    teacher_temp: float
    scale: float  # of the sum
    other_views: bool  # only the pairs of different views, s != t


def soft_cross_entropy_reference(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, inplace_grad: bool
) -> Tensor:
    """The soft cross-entropy in plain torch, also for fp64, which stays fp64: the tests' truth.

    B may be 0, and student and teacher may be (B, K), one view of each.
    """
    student = student if torch.is_grad_enabled() else student.detach()  # no gradient, nothing to overwrite
    return _SoftCrossEntropyReference.apply(student, teacher, center, weight, terms, inplace_grad)


class _SoftCrossEntropyReference(torch.autograd.Function):
    """A few images at a time, and the gradient by hand: autograd would keep every probability.

    The gradient is taken in the forward pass, which has the probabilities at hand; over the logits if it may.
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
        if not ctx.needs_input_grad[0]:
            return reference_loss(student, teacher, center, weight, terms)
        ctx.terms, ctx.inplace_grad, ctx.consumed = terms, inplace_grad, False
        ctx.grad = student.detach() if inplace_grad else torch.empty_like(student)
        loss = reference_loss(student, teacher, center, weight, terms, ctx.grad)
        if inplace_grad:
            torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
        else:
            ctx.save_for_backward(student, teacher, center, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_grad:
            check_single_backward(ctx)
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # the first backward pass gave it away; this is another one, over a graph that was retained
            student, teacher, center, weight = ctx.saved_tensors
            grad = torch.empty_like(student)
            reference_loss(student, teacher, center, weight, ctx.terms, grad)
        (scale_reference_ if torch.compiler.is_compiling() else _scale_)(grad, grad_loss)
        return grad, None, None, None, None, None


def _scale_(x: Tensor, factor: Tensor) -> None:
    """Multiplies ``x`` by a 0-d ``factor``; not by 1 on a CPU, where there is nothing to wait for before one looks."""
    if x.is_cuda or factor.tolist() != 1:
        x.mul_(factor)


@operator("x")
def scale_reference_(x: Tensor, factor: Tensor) -> None:
    """Keeps the branch from being traced. Its dispatch alone costs as much as a small loss."""
    _scale_(x, factor)


def reference_loss(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, grad: Tensor | None = None
) -> Tensor:
    """The scaled sum of weight * -<q, log p> over images and pairs of views.

    ``grad``, which may be ``student``, receives the gradient: weight * (p - q) summed over pairs, scaled.
    """
    if student.dim() == 2:  # here and not in the doors, where autograd would follow
        student, teacher, grad = student[None], teacher[None], None if grad is None else grad[None]
    (S, B, K), dtype = student.shape, compute_dtype(student)
    beta = 1 / terms.student_temp  # the inverse temperature
    # Centered and sharpened in one pass over the teacher: teacher / temp + bias. At least fp32, as the center is.
    bias = center.to(torch.promote_types(teacher.dtype, center.dtype)) * (-1 / terms.teacher_temp)
    scaled_loss = torch.empty(S, B, 1, dtype=dtype, device=student.device)  # of each row, times -beta
    in_grad = grad is not None and student.dtype == dtype  # it has room for z, and then for p - q
    temporaries = 2 if in_grad else 3  # q and p, and z
    for images in chunks(B, (temporaries + len(teacher) - 1) * K, on_gpu=student.is_cuda):
        width = temporaries * (images.stop - images.start) * K
        row_weight = 1.0 if weight is None else weight[images, None]
        for views, num_terms, q in _targets(student, teacher[:, images], bias, terms):
            factor = row_weight * (num_terms * terms.scale * beta)
            for part in chunks(len(views), width, views.start, on_gpu=student.is_cuda):
                logits = student[part, images].to(dtype)
                out = None if grad is None else grad[part, images]
                shift = logits.amax(-1, keepdim=True).mul_(-beta)
                room = out if student.dtype == dtype else logits  # where the gradient will be, or a copy
                z = torch.add(shift, logits, alpha=beta, out=room)
                del logits, room
                p = torch.softmax(z, dim=-1)
                # LSE(z) = -log max p, as max z is 0: log p itself would cost one more exponential per logit.
                minus_loss = p.amax(-1, keepdim=True).log_().add_(z.mul_(q).sum(-1, keepdim=True))
                torch.mul(minus_loss, factor, out=scaled_loss[part, images])
                del z
                if in_grad:
                    torch.sub(p, q, out=out).mul_(factor)
                elif out is not None:
                    out.copy_(p.sub_(q).mul_(factor))  # whole passes: a CPU is slow at mixed dtypes
                del p
            del q  # before the next one is made
    # Not in place: torch.compile 2.11 loses the gradient of a result that was written to.
    return scaled_loss.sum() * -terms.student_temp


def _targets(student: Tensor, teacher: Tensor, bias: Tensor, terms: Terms) -> list[tuple[range, int, Tensor]]:
    """Student views with the teacher views that they are compared with: how many those are, and their mean softmax."""
    S, T = len(student), len(teacher)
    copy = teacher.to(bias.dtype)
    logits = torch.add(bias, copy, alpha=1 / terms.teacher_temp, out=None if copy is teacher else copy)
    q = torch.softmax(logits, dim=-1, out=logits)
    everyone = q[0] if T == 1 else q.mean(0)
    if not terms.other_views:
        return [(range(S), T, everyone)]
    others = [(range(t, t + 1), T - 1, q[T - 1 - t]) for t in range(T)]
    return [*others, (range(T, S), T, everyone)]

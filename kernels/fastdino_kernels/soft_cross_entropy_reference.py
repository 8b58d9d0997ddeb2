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
            consume(ctx)
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
    (_, B, K), dtype = student.shape, compute_dtype(student)
    loss = torch.zeros((), dtype=dtype, device=student.device)
    beta = 1 / terms.student_temp  # the inverse temperature
    temporaries = 2 if grad is not None and student.dtype == dtype else 3  # target and p; z, where grad has no room
    for images in chunks(B, (temporaries + len(teacher) - 1) * K):
        width = temporaries * (images.stop - images.start) * K
        for views, num_terms, target in _targets(student, teacher[:, images], center, terms):
            for part in chunks(len(views), width, views.start):
                logits = student[part, images].to(dtype)
                shift = logits.amax(-1, keepdim=True).mul_(-beta)
                out = None if grad is None else grad[part, images]
                room = out if student.dtype == dtype else logits  # where the gradient will be, or a copy
                z = torch.add(shift, logits, alpha=beta, out=room)
                del logits, room
                p = torch.softmax(z, dim=-1)
                # LSE(z) = -log max p, as max z is 0: log p itself would cost one more exponential per logit.
                minus_loss = p.amax(-1).log_().add_(z.mul_(target).sum(-1))
                minus_loss = minus_loss if weight is None else minus_loss * weight[images]
                # Not in place: torch.compile 2.11 loses the gradient of a result that was written to.
                loss = loss - minus_loss.sum() * (num_terms * terms.scale)
                del z
                if out is not None:
                    scale = num_terms * terms.scale * beta
                    row_scale = scale if weight is None else weight[images, None] * scale
                    torch.mul(p.sub_(target), row_scale, out=out)
                del p
            del target  # before the next one is made
    return loss


def _targets(student: Tensor, teacher: Tensor, center: Tensor, terms: Terms) -> list[tuple[range, int, Tensor]]:
    """Student views with the teacher views that they are compared with: how many those are, and their mean softmax."""
    S, T = len(student), len(teacher)
    logits = (teacher - center).mul_(1 / terms.teacher_temp)  # at least fp32, as the center is
    q = torch.softmax(without_subnormals_(logits), dim=-1, out=logits)
    everyone = q[0] if T == 1 else q.mean(0)
    if not terms.other_views:
        return [(range(S), T, everyone)]
    others = [(range(t, t + 1), T - 1, q[T - 1 - t]) for t in range(T)]
    return [*others, (range(T, S), T, everyone)]

"""DINO's loss: the teacher's centered, sharpened probabilities against the student's, over all pairs of views."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import compute_dtype, use_triton
from fastdino_kernels.soft_cross_entropy import Terms, dense_rows, soft_cross_entropy, unpack

MAX_STUDENT_VIEWS = 32

Temps = tuple[float, float]  # the student's, the teacher's


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    inplace_grad: bool = False,
) -> Tensor:
    """Mean cross-entropy of softmax((teacher - center) / teacher_temp) and softmax(student / student_temp).

    Args:
        student: (S, B, K) logits of S views of B images over K prototypes, S <= 32; fp32, fp16, bf16 or fp64.
        teacher: (T, B, K) logits of the first T of those views, T = 1 or 2; takes no gradient.
        center: (K,) fp32 running mean of the teacher's logits (fp64 with fp64 logits).
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0.
        inplace_grad: write the gradient over the student's logits, which saves their size in memory. They are then
            consumed: their version counter moves, and a second backward raises RuntimeError.

    Returns the fp32 (fp64 for fp64 logits) scalar mean over the pairs of views t != s and over B, with a gradient for
    ``student``. It is not finite when a logit that takes part is not; but a teacher's -inf is a probability of 0.
    Raises ValueError when shapes, dtypes, devices or temperatures do not fit.
    Source: Caron et al. 2021 (DINO), equation 1 and algorithm 1.
    """
    _check(student, teacher, center, student_temp, teacher_temp)
    if inplace_grad and student.requires_grad and student.is_leaf:
        raise ValueError(
            "inplace_grad=True would overwrite student, which is a leaf tensor: pass the output of a layer"
        )
    if not use_triton(student) or torch.float64 in (student.dtype, teacher.dtype):
        return _DinoLossReference.apply(student, teacher, center, (student_temp, teacher_temp), inplace_grad)
    scale = 1 / _num_terms(student, teacher)
    terms = Terms(student_temp, teacher_temp, scale, other_views=True)
    return soft_cross_entropy(student, teacher, center, None, terms, inplace_grad)


def dino_loss_reference(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    inplace_grad: bool = False,
) -> Tensor:
    """:func:`dino_loss` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    return _DinoLossReference.apply(student, teacher, center, (student_temp, teacher_temp), inplace_grad)


class _DinoLossReference(torch.autograd.Function):
    """View by view, with the gradient by hand: autograd would keep (S, B, K) probabilities."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, center: Tensor, temps: Temps, inplace_grad: bool) -> Tensor:
        student = dense_rows(student)
        dtype = compute_dtype(student)  # fp64 stays fp64: the tests' truth
        q = torch.softmax((teacher.to(dtype) - center) / temps[1], dim=-1)  # (T, B, K)
        loss = torch.zeros((), dtype=dtype, device=student.device)
        for logits, target in zip(student, _targets(q, len(student)), strict=True):
            loss -= (target * torch.log_softmax(logits.to(dtype) / temps[0], dim=-1)).sum()
        ctx.save_for_backward(student, q)
        ctx.student_temp, ctx.inplace_grad, ctx.consumed = temps[0], inplace_grad, False
        return loss / _num_terms(student, teacher)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, grad, (q,) = unpack(ctx)
        scale = grad_loss / (ctx.student_temp * _num_terms(student, q))
        for s, (logits, target) in enumerate(zip(student, _targets(q * scale, len(student)), strict=True)):
            p = torch.softmax(logits.to(q.dtype) / ctx.student_temp, dim=-1)
            num_targets = len(q) - (s < len(q))
            grad[s] = p.mul_(num_targets * scale).sub_(target)
        return grad, None, None, None, None


def _targets(q: Tensor, num_views: int) -> list[Tensor]:
    """For each student view the sum of the other views' teacher probabilities; views past the teacher's share one."""
    everyone = q.sum(0)
    return [q[[t for t in range(len(q)) if t != s]].sum(0) if s < len(q) else everyone for s in range(num_views)]


def _num_terms(student: Tensor, teacher: Tensor) -> int:
    """Pairs t != s, times images: T is at most S, so each teacher view leaves out exactly one student view."""
    return len(teacher) * (len(student) - 1) * student.shape[1]


def _check(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> None:
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, center {tuple(center.shape)}"
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(f"expected student (S, B, K) and teacher (T, B, K) with the same B and K; got {shapes}")
    if center.shape != student.shape[2:]:
        raise ValueError(f"expected center (K,), one entry for each prototype; got {shapes}")
    (S, B, K), T = student.shape, len(teacher)
    if T not in (1, 2) or not max(T, 2) <= S <= MAX_STUDENT_VIEWS or B * K == 0:
        raise ValueError(
            f"expected 1 or 2 teacher views, which are the first of 2 to {MAX_STUDENT_VIEWS} student views, "
            f"and at least one image and one prototype; got {shapes}"
        )
    if not student_temp > 0 or not teacher_temp > 0:
        raise ValueError(f"temperatures must be positive; got student_temp={student_temp}, teacher_temp={teacher_temp}")
    if not student.device == teacher.device == center.device:
        raise ValueError(f"expected one device; got {student.device}, {teacher.device}, {center.device}")
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if student.dtype not in dtypes or teacher.dtype not in dtypes or center.dtype not in (torch.float32, student.dtype):
        raise ValueError(
            f"expected fp32, fp16, bf16 or fp64 logits and an fp32 center; "
            f"got student {student.dtype}, teacher {teacher.dtype}, center {center.dtype}"
        )
    if teacher.requires_grad or center.requires_grad:
        raise ValueError("teacher and center take no gradient: detach them, or compute them under torch.no_grad()")

"""DINO's loss: the teacher's centered, sharpened probabilities against the student's, over all pairs of views."""

import torch
from torch import Tensor

from fastdino_kernels._backend import use_triton
from fastdino_kernels.losses import grouped_cross_entropy
from fastdino_kernels.losses.soft_cross_entropy import Terms, soft_cross_entropy
from fastdino_kernels.losses.soft_cross_entropy_reference import soft_cross_entropy_reference

MAX_STUDENT_VIEWS = 32


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
            consumed, possibly by the call already: their version counter moves, and a second backward raises
            RuntimeError.

    Returns the fp32 (fp64 for fp64 logits) scalar mean over the pairs of views t != s and over B, with a gradient for
    ``student``. It is not finite when a logit that takes part is not; but a teacher's -inf is a probability of 0.
    Raises ValueError when shapes, dtypes, devices or temperatures do not fit.
    Source: Caron et al. 2021 (DINO), equation 1 and algorithm 1.
    """
    _check(student, teacher, center, student_temp, teacher_temp)
    student = student if torch.is_grad_enabled() else student.detach()  # no gradient, nothing to overwrite
    if inplace_grad and student.requires_grad and student.is_leaf:
        raise ValueError(
            "inplace_grad=True would overwrite student, which is a leaf tensor: pass the output of a layer"
        )
    fused = use_triton(student) and torch.float64 not in (student.dtype, teacher.dtype)
    terms = Terms(student_temp, teacher_temp, 1 / _num_terms(student, teacher), other_views=True)
    group = grouped_cross_entropy.images_per_group(student.shape[1])
    if fused and inplace_grad and student.requires_grad and group < student.shape[1]:
        return grouped_cross_entropy.grouped_cross_entropy(student, teacher, center, terms, group)
    implementation = soft_cross_entropy if fused else soft_cross_entropy_reference
    return implementation(student, teacher, center, None, terms, inplace_grad)


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
    terms = Terms(student_temp, teacher_temp, 1 / _num_terms(student, teacher), other_views=True)
    return soft_cross_entropy_reference(student, teacher, center, None, terms, inplace_grad)


def _num_terms(student: Tensor, teacher: Tensor) -> int:
    """Pairs t != s, times images: T is at most S, so each teacher view leaves out exactly one student view."""
    return len(teacher) * (len(student) - 1) * student.shape[1]


def _check(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> None:
    def shapes() -> str:
        return f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, center {tuple(center.shape)}"

    if student.dim() != 3 or teacher.dim() != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(f"expected student (S, B, K) and teacher (T, B, K) with the same B and K; got {shapes()}")
    if center.shape != student.shape[2:]:
        raise ValueError(f"expected center (K,), one entry for each prototype; got {shapes()}")
    (S, B, K), T = student.shape, len(teacher)
    if T not in (1, 2) or not max(T, 2) <= S <= MAX_STUDENT_VIEWS or B * K == 0:
        raise ValueError(
            f"expected 1 or 2 teacher views, which are the first of 2 to {MAX_STUDENT_VIEWS} student views, "
            f"and at least one image and one prototype; got {shapes()}"
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

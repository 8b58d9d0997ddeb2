"""iBOT's loss: the teacher's probabilities of a masked patch against the student's."""

import torch
from torch import Tensor

from fastdino_kernels._backend import use_triton
from fastdino_kernels.losses import row_cross_entropy
from fastdino_kernels.losses.soft_cross_entropy import Terms, dense_rows, soft_cross_entropy
from fastdino_kernels.losses.soft_cross_entropy_reference import soft_cross_entropy_reference


def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    inplace_grad: bool = False,
) -> Tensor:
    """Sum of weight * H(softmax((teacher - center) / teacher_temp), softmax(student / student_temp)) over patches.

    Args:
        student: (M, K) logits of M masked patches over K prototypes; M may be 0. fp32, fp16, bf16 or fp64.
        teacher: (M, K) logits of the same patches, which the teacher sees; takes no gradient.
        center: (K,) fp32. After :func:`sinkhorn`, -teacher_temp times its column scaling: the row scaling is then the
            softmax's own denominator.
        weight: (M,) fp32 weight of each patch. iBOT's is 1 / (images * masked patches of the patch's image).
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0.
        inplace_grad: write the gradient over the student's logits, as in :func:`dino_loss`, but possibly in the forward
            pass already.

    Returns the fp32 (fp64 for fp64 logits) scalar, with a gradient for ``student``.
    Raises ValueError when shapes, dtypes, devices or temperatures do not fit.
    Source: Zhou et al. 2022 (iBOT), equation 2; the mean over images as in DINOv2 (Oquab et al. 2024).
    """
    _check(student, teacher, center, weight, student_temp, teacher_temp)
    student = student if torch.is_grad_enabled() else student.detach()  # no gradient, nothing to overwrite
    if inplace_grad and student.requires_grad and student.is_leaf:
        raise ValueError("inplace_grad=True would overwrite student, a leaf tensor: pass the output of a layer")
    fused = use_triton(student) and torch.float64 not in (student.dtype, teacher.dtype) and len(student)
    gives_up_logits = inplace_grad or not student.requires_grad
    if fused and gives_up_logits and row_cross_entropy.pays(len(student), student.device):
        rows = (dense_rows(student), dense_rows(teacher), center.contiguous(), weight.contiguous())
        return row_cross_entropy.row_cross_entropy(*rows, student_temp, teacher_temp)
    terms = Terms(student_temp, teacher_temp, scale=1.0, other_views=False)
    if not fused:
        return soft_cross_entropy_reference(student, teacher, center, weight, terms, inplace_grad)
    return soft_cross_entropy(student[None], teacher[None], center, weight, terms, inplace_grad)


def ibot_loss_reference(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    inplace_grad: bool = False,
) -> Tensor:
    """:func:`ibot_loss` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    terms = Terms(student_temp, teacher_temp, scale=1.0, other_views=False)
    return soft_cross_entropy_reference(student, teacher, center, weight, terms, inplace_grad)


def _check(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor, student_temp: float, teacher_temp: float
) -> None:
    def found() -> str:
        tensors = {"student": student, "teacher": teacher, "center": center, "weight": weight}
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())

    M, K = student.shape if student.dim() == 2 else (-1, -1)
    if not (teacher.shape == (M, K) and center.shape == (K,) and weight.shape == (M,) and K > 0):
        raise ValueError(f"expected student (M, K), teacher (M, K), center (K,) and weight (M,); got {found()}")
    if not student_temp > 0 or not teacher_temp > 0:
        raise ValueError(f"temperatures must be positive; got student_temp={student_temp}, teacher_temp={teacher_temp}")
    if not student.device == teacher.device == center.device == weight.device:
        raise ValueError(f"expected one device; got {found()}")
    dtypes = (torch.float32, student.dtype)
    floating = student.is_floating_point() and teacher.is_floating_point()
    if not floating or center.dtype not in dtypes or weight.dtype not in dtypes:
        raise ValueError(f"expected floating-point logits, and an fp32 center and weight; got {found()}")
    if teacher.requires_grad or center.requires_grad or weight.requires_grad:
        raise ValueError("teacher, center and weight take no gradient: detach them, or use torch.no_grad()")

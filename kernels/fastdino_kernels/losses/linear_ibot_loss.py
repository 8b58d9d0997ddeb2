"""iBOT's loss from the features in front of the prototypes: the logits exist a few thousand rows at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import operator, use_triton
from fastdino_kernels._numbers import Number, check_temps, to_operator
from fastdino_kernels.losses.ibot_loss import ibot_loss_reference, ibot_loss_rows_


def linear_ibot_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    weight: Tensor,
    *,
    student_temp: float,
    teacher_temp: Number,
) -> Tensor:
    """ibot_loss(student @ student_weight.T, teacher @ teacher_weight.T, center, weight), never with all its logits.

    The gradients are made along with the loss, a chunk of rows at a time, and only scaled in the backward pass, which
    can run once: in bf16 the student's is rounded before and after. What does not require a gradient costs nothing. The
    reference (on a CPU, and in fp64) has all logits.

    Args:
        student: (M, D) normalised features of M masked patches, which may be 0; fp32, bf16 or fp64. Not fp16, in which
            a gradient of 1 / K that no loss scale has enlarged yet is lost.
        student_weight: (K, D) prototypes, of the same dtype; see :func:`prototype_weight`.
        teacher: (M, D) features of the same patches, from the teacher; takes no gradient, nor does its weight.
        teacher_weight: (K, D), of the teacher's dtype.
        center: (K,) fp32, as in :func:`ibot_loss`; known beforehand, also where it comes from :func:`sinkhorn`.
        weight: (M,) fp32 weight of each patch.
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0: a float or a tensor, as in :func:`dino_loss`.

    Returns the fp32 (fp64 for fp64) scalar, with gradients for ``student`` and ``student_weight``; the latter is summed
    over the chunks in fp32. Raises ValueError when shapes, dtypes, devices or temperatures do not fit.
    Source: as :func:`ibot_loss`; the gradient along with the loss as in Hsu et al. 2024 (Liger Kernel).
    """
    tensors = (student, student_weight, teacher, teacher_weight, center, weight)
    _check(*tensors, student_temp, teacher_temp)
    if not use_triton(student) or torch.float64 in (student.dtype, teacher.dtype):
        return linear_ibot_loss_reference(*tensors, student_temp=student_temp, teacher_temp=teacher_temp)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in tensors[:2]]
    return _LinearIbotLoss.apply(*tensors, student_temp, *to_operator(teacher_temp), *wanted)


def linear_ibot_loss_reference(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    weight: Tensor,
    *,
    student_temp: float,
    teacher_temp: Number,
) -> Tensor:
    """:func:`linear_ibot_loss` in plain torch, with all logits: what the kernel is tested against and a CPU runs."""
    with torch.autocast(student.device.type, enabled=False):
        logits, teacher_logits = student @ student_weight.T, teacher @ teacher_weight.T
    tensors = (logits, teacher_logits, center, weight)
    return ibot_loss_reference(*tensors, student_temp=student_temp, teacher_temp=teacher_temp)


class _LinearIbotLoss(torch.autograd.Function):
    """Saves the two gradients, complete but for the factor that comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        center: Tensor,
        weight: Tensor,
        student_temp: float,
        teacher_temp: float | None,
        temp_on_device: Tensor | None,
        for_student: bool,
        for_weight: bool,
    ) -> Tensor:
        tensors = (student, student_weight, teacher, teacher_weight, center, weight)
        temps, wanted = (student_temp, teacher_temp, temp_on_device), (for_student, for_weight)
        loss, *grads = linear_ibot_loss_forward(*tensors, *temps, *wanted)
        ctx.save_for_backward(*grads)
        ctx.wanted, ctx.weight_dtype, ctx.consumed = wanted, student_weight.dtype, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError("linear_ibot_loss scales its gradients in place: call backward once")
        ctx.consumed = True
        grad_student, grad_weight = (
            grad.mul_(grad_loss) if wanted else None for grad, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        )
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        return grad_student, grad_weight, None, None, None, None, None, None, None, None, None


# Most rows of logits at a time. Each chunk reads both weights and updates the gradient of one, so few chunks are best.
MAX_ROWS = 2048


def chunk_rows(num_rows: int) -> int:
    """Rows of the chunks that ``num_rows`` are cut into, all of equal size."""
    return -(-num_rows // max(1, -(-num_rows // MAX_ROWS)))


@operator()
def linear_ibot_loss_forward(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float | None,
    temp_on_device: Tensor | None,
    for_student: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for ``student`` and (in fp32) for ``student_weight``; empty if not wanted.

    One operator, so that torch.compile does not unroll the chunks.
    """
    (M, D), K, temps = student.shape, len(student_weight), (student_temp, teacher_temp, temp_on_device)
    center, weight = center.contiguous(), weight.contiguous()
    loss = torch.zeros((), device=student.device)
    grad_student = student.new_empty((M if for_student else 0, D))
    grad_weight = student.new_zeros((K if for_weight else 0, D), dtype=torch.float32)
    rows = chunk_rows(M)
    logits, teacher_logits = (
        x.new_empty((rows, K)) for x in (student, teacher)
    )  # with out=, autocast leaves products alone
    for start in range(0, M, max(1, rows)):
        chunk = slice(start, min(start + rows, M))
        num_rows = chunk.stop - start
        z = torch.mm(student[chunk], student_weight.T, out=logits[:num_rows])
        z_teacher = torch.mm(teacher[chunk], teacher_weight.T, out=teacher_logits[:num_rows])
        grad, z_student = (z, None) if for_student or for_weight else (None, z)
        loss += ibot_loss_rows_(grad, z_student, z_teacher, center, weight[chunk], *temps)
        if for_student:
            torch.mm(z, student_weight, out=grad_student[chunk])
        if for_weight:
            _add_product_(grad_weight, z, student[chunk])
    return loss, grad_student, grad_weight


@linear_ibot_loss_forward.register_fake
def _(student: Tensor, student_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (M, D), K = student.shape, len(student_weight)
    for_student, for_weight = args[-2:]
    grad_weight = student.new_empty((K if for_weight else 0, D), dtype=torch.float32)
    return grad_weight.new_empty(()), student.new_empty((M if for_student else 0, D)), grad_weight


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, summed in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif total.is_cuda:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:  # only CUDA has products that widen
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def _check(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    weight: Tensor,
    student_temp: float,
    teacher_temp: Number,
) -> None:
    tensors = (student, student_weight, teacher, teacher_weight, center, weight)
    shapes = [tuple(x.shape) for x in tensors]
    if student.dim() != 2 or student_weight.dim() != 2 or not student_weight.numel():
        raise ValueError(f"expected student (M, D) and student_weight (K, D), not empty; got {shapes[:2]}")
    (M, D), K = student.shape, len(student_weight)
    if shapes != [(M, D), (K, D), (M, D), (K, D), (K,), (M,)]:
        raise ValueError(
            "expected student (M, D), student_weight (K, D), teacher (M, D), teacher_weight (K, D), center (K,) and "
            f"weight (M,); got {shapes}"
        )
    check_temps(student.device, student_temp=student_temp, teacher_temp=teacher_temp)
    if any(x.device != student.device for x in tensors):
        raise ValueError(f"expected one device; got {[str(x.device) for x in tensors]}")
    dtypes = [x.dtype for x in tensors]
    features = (torch.float32, torch.bfloat16, torch.float64)
    if dtypes[0] not in features or dtypes[2] not in features or dtypes[0:4:2] != dtypes[1:4:2]:
        raise ValueError(f"expected features and weights of one dtype, fp32, bf16 or fp64; got {dtypes[:4]}")
    if any(dtype not in (torch.float32, student.dtype) for dtype in dtypes[4:]):
        raise ValueError(f"expected an fp32 center and weight; got {dtypes[4:]}")
    if any(x.requires_grad for x in tensors[2:]):
        raise ValueError("teacher, its weight, center and weight take no gradient: detach them, or use torch.no_grad()")

"""iBOT's loss: the teacher's probabilities of a masked patch against the student's."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import (
    LOG2_E,
    check_single_backward,
    compute_dtype,
    dense_rows,
    operator,
    scale_,
    use_triton,
)
from fastdino_kernels._numbers import Number, check_temps, from_operator, load_log2_scale, log2_scale, to_operator


def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor,
    *,
    student_temp: float,
    teacher_temp: Number,
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
        teacher_temp: temperature of the teacher, > 0: a float or a tensor, as in :func:`dino_loss`.
        inplace_grad: a kernel may write the gradient over the student's logits, as in :func:`dino_loss`; this one does
            so in the forward pass. What the loss is multiplied by then scales the rounded gradient: in 16 bits it is
            rounded twice (once if the factor is a power of 2), and a loss scale comes too late for what fp16 lost.

    Returns the fp32 (fp64 for fp64 logits) scalar, with a gradient for ``student``.
    Raises ValueError when shapes, dtypes, devices or temperatures do not fit.
    Source: Zhou et al. 2022 (iBOT), equation 2; the mean over images as in DINOv2 (Oquab et al. 2024).
    """
    _check(student, teacher, center, weight, student_temp, teacher_temp)
    student = student if torch.is_grad_enabled() else student.detach()  # no gradient, nothing to overwrite
    if inplace_grad and student.requires_grad and student.is_leaf:
        raise ValueError("inplace_grad=True would overwrite student, a leaf tensor: pass the output of a layer")
    if use_triton(student) and torch.float64 not in (student.dtype, teacher.dtype) and len(student):
        return _IbotLoss.apply(student, teacher, center, weight, student_temp, *to_operator(teacher_temp), inplace_grad)
    return ibot_loss_reference(student, teacher, center, weight, student_temp=student_temp, teacher_temp=teacher_temp)


def ibot_loss_reference(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor, *, student_temp: float, teacher_temp: Number
) -> Tensor:
    """:func:`ibot_loss` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    dtype = compute_dtype(student)
    log_p = torch.log_softmax(student.to(dtype) / student_temp, dim=-1)
    q = torch.softmax((teacher.to(dtype) - center) / teacher_temp, dim=-1)
    return -(weight * (q * log_p).sum(dim=-1)).sum()


def _check(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor, student_temp: float, teacher_temp: Number
) -> None:
    def found() -> str:
        tensors = {"student": student, "teacher": teacher, "center": center, "weight": weight}
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())

    M, K = student.shape if student.dim() == 2 else (-1, -1)
    if not (teacher.shape == (M, K) and center.shape == (K,) and weight.shape == (M,) and K > 0):
        raise ValueError(f"expected student (M, K), teacher (M, K), center (K,) and weight (M,); got {found()}")
    check_temps(student.device, student_temp=student_temp, teacher_temp=teacher_temp)
    if not student.device == teacher.device == center.device == weight.device:
        raise ValueError(f"expected one device; got {found()}")
    dtypes = (torch.float32, student.dtype)
    floating = student.is_floating_point() and teacher.is_floating_point()
    if not floating or center.dtype not in dtypes or weight.dtype not in dtypes:
        raise ValueError(f"expected floating-point logits, and an fp32 center and weight; got {found()}")
    if teacher.requires_grad or center.requires_grad or weight.requires_grad:
        raise ValueError("teacher, center and weight take no gradient: detach them, or use torch.no_grad()")


class _IbotLoss(torch.autograd.Function):
    """Saves the gradient where that replaces the logits, and the logits where it may not.

    In place, the forward pass takes the gradient as if the loss's own were 1, and the backward pass scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        weight: Tensor,
        student_temp: float,
        teacher_temp: float | None,
        temp_on_device: Tensor | None,
        inplace_grad: bool,
    ) -> Tensor:
        student, teacher = dense_rows(student), dense_rows(teacher)
        center, weight, temps = center.contiguous(), weight.contiguous(), (student_temp, teacher_temp, temp_on_device)
        ctx.temps, ctx.inplace_grad, ctx.consumed = temps[:2], inplace_grad, False
        if not (inplace_grad and ctx.needs_input_grad[0]):
            ctx.save_for_backward(student, teacher, center, weight, temp_on_device)
            return ibot_loss_rows_(None, student, teacher, center, weight, *temps)
        ctx.grad = student.detach()
        loss = ibot_loss_rows_(ctx.grad, None, teacher, center, weight, *temps)
        torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_grad:
            check_single_backward(ctx)
            grad = ctx.grad
            scale_(grad, grad_loss)
        else:
            student, teacher, center, weight, temp_on_device = ctx.saved_tensors
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            ibot_loss_rows_(grad, student, teacher, center, weight.float() * grad_loss, *ctx.temps, temp_on_device)
        return grad, None, None, None, None, None, None, None


def launch_config(num_prototypes: int) -> dict[str, int]:
    """16 elements of a row per thread, which is 128 bits of bf16 on a wave of 64 lanes too.

    Two programs of 8 warps share a multiprocessor, so that one works while the other waits for its maxima. One of 16
    warps leaves an H200 only 132 rows at a time, whose 34 MB (65536 prototypes in bf16) its L2 cache keeps until they
    are read again, but takes 1.13 times as long.
    """
    block = min(4096, max(512, triton.next_power_of_2(num_prototypes)))
    return {"BLOCK_K": block, "num_warps": block // 512}


@operator("grad")
def ibot_loss_rows_(
    grad: Tensor | None,
    student: Tensor | None,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float | None,
    temp_on_device: Tensor | None,
) -> Tensor:
    """The loss; and into ``grad``, if there is one, its gradient for the logits, which it holds if ``student`` is None.

    ``grad`` is contiguous unless it holds the logits.
    """
    logits = student if student is not None else grad
    assert logits is not None
    M, K = logits.shape
    row_loss = torch.empty(M, dtype=torch.float32, device=logits.device)
    strides = (logits.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0))
    scales = (LOG2_E / student_temp, log2_scale(from_operator(teacher_temp, temp_on_device)), 1 / student_temp)
    with torch.cuda.device_of(logits):
        _ibot_loss_kernel[(M,)](
            row_loss, grad, logits, teacher, center, weight, *strides, *scales, K=K, **launch_config(K)
        )
    return row_loss.sum()


@ibot_loss_rows_.register_fake
def _(grad: Tensor | None, student: Tensor | None, teacher: Tensor, *_: Any) -> Tensor:
    return teacher.new_empty((), dtype=torch.float32)


@triton.jit
def _ibot_loss_kernel(
    row_loss_ptr,
    grad_ptr,
    student_ptr,
    teacher_ptr,
    center_ptr,
    weight_ptr,
    student_stride,
    teacher_stride,
    grad_stride,
    student_scale,
    teacher_scale,
    grad_scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: one row of each, read twice, the second time from its end, where the cache is warm. In units of log2,
    # with x = student * scale and y = (teacher - center) * scale, the first reading keeps for both the maximum so far
    # and, in every lane, sums over it: of 2^x, of 2^y, and of 2^y * x, whose x also counts from the maximum.
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    teacher_scale = load_log2_scale(teacher_scale)
    x_top = tl.full([], float("-inf"), tl.float32)
    y_top = tl.full([], float("-inf"), tl.float32)
    x_sum = tl.zeros([BLOCK_K], tl.float32)
    y_sum = tl.zeros([BLOCK_K], tl.float32)
    dot = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
        x = tl.load(student_ptr + k, mask=inside, other=0.0).to(tl.float32) * student_scale
        y = tl.load(teacher_ptr + k, mask=inside, other=float("-inf")).to(tl.float32)
        y = (y - tl.load(center_ptr + k, mask=inside, other=0.0)) * teacher_scale
        new_x_top = tl.maximum(x_top, tl.max(tl.where(inside, x, float("-inf")), 0))
        new_y_top = tl.maximum(y_top, tl.max(y, 0))
        y_base = tl.where(new_y_top == float("-inf"), 0.0, new_y_top)  # nothing but -inf so far has probability 0
        shift = tl.where(x_top == float("-inf"), 0.0, x_top - new_x_top)
        shrink = tl.exp2(y_top - y_base)
        x -= new_x_top
        e = tl.exp2(y - y_base)
        x_sum = x_sum * tl.exp2(x_top - new_x_top) + tl.where(inside, tl.exp2(x), 0.0)
        dot = (dot + y_sum * shift) * shrink + e * x
        y_sum = y_sum * shrink + e
        x_top = new_x_top
        y_top = new_y_top
    x_total = tl.sum(x_sum, 0)
    y_total = tl.sum(y_sum, 0)
    weight = tl.load(weight_ptr + row)
    loss = (tl.log2(x_total) - tl.sum(dot, 0) / y_total) * (weight / 1.4426950408889634)  # log2(e): back to nats
    tl.store(row_loss_ptr + row, loss)
    if grad_ptr is not None:
        grad_ptr += row * grad_stride
        p_scale = weight * grad_scale / x_total
        q_scale = weight * grad_scale / y_total
        num_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        for n in tl.range(0, num_blocks, num_stages=3):
            k = (num_blocks - 1 - n) * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
            x = tl.load(student_ptr + k, mask=inside, other=0.0).to(tl.float32) * student_scale - x_top
            y = tl.load(teacher_ptr + k, mask=inside, other=0.0).to(tl.float32)
            y = (y - tl.load(center_ptr + k, mask=inside, other=0.0)) * teacher_scale - y_top
            grad = tl.exp2(x) * p_scale - tl.exp2(y) * q_scale
            tl.store(grad_ptr + k, grad.to(grad_ptr.dtype.element_ty), mask=inside)

"""Cross-entropy of many pairs of rows, loss and gradient in one launch: the second reading of a row finds it cached."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import LOG2_E, operator
from fastdino_kernels.losses.soft_cross_entropy import consume


def row_cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Sum over rows of weight * H(softmax((teacher - center) / teacher_temp), softmax(student / student_temp)).

    Where the student takes a gradient, that replaces its logits at once, taken as if the result's own were 1. The
    backward pass multiplies it by the latter: a launch that looks at that number on the device and, at 1, leaves.

    Args:
        student, teacher: (M, K) logits with contiguous rows; fp32, fp16 or bf16.
        center: (K,) fp32, contiguous.
        weight: (M,) fp32, contiguous.

    Returns the fp32 scalar, with a gradient for ``student``. The caller has checked the shapes.
    """
    return _RowCrossEntropy.apply(student, teacher, center, weight, student_temp, teacher_temp)


class _RowCrossEntropy(torch.autograd.Function):
    """Saves the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        weight: Tensor,
        student_temp: float,
        teacher_temp: float,
    ) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return row_cross_entropy_(None, student, teacher, center, weight, student_temp, teacher_temp)
        grad = student.detach()
        loss = row_cross_entropy_(grad, None, teacher, center, weight, student_temp, teacher_temp)
        torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
        ctx.grad, ctx.consumed = grad, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx)
        scale_(ctx.grad, grad_loss)
        return ctx.grad, None, None, None, None, None


def pays(num_rows: int, device: torch.device) -> bool:
    """Whether there are rows enough to keep the device busy with whole ones: four for each multiprocessor."""
    if device.type != "cuda":
        return True
    return num_rows >= 4 * torch.cuda.get_device_properties(device).multi_processor_count


def launch_config(num_prototypes: int) -> dict[str, int]:
    """16 elements of a row per thread, which is 128 bits of bf16 on a wave of 64 lanes too.

    One program of 16 warps has all registers of a multiprocessor, so that an H200 reads 132 rows at a time: their 34 MB
    (65536 prototypes in bf16) stay in its 50 MB of L2 cache until they are read again.
    """
    block = min(8192, max(512, triton.next_power_of_2(num_prototypes)))
    return {"BLOCK_K": block, "num_warps": block // 512}


@operator("grad")
def row_cross_entropy_(
    grad: Tensor | None,
    student: Tensor | None,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """The loss; and into ``grad``, if there is one, its gradient for the logits, which it holds if ``student`` is None.

    ``grad`` is contiguous unless it holds the logits.
    """
    logits = student if student is not None else grad
    assert logits is not None
    M, K = logits.shape
    row_loss = torch.empty(M, dtype=torch.float32, device=logits.device)
    strides = (logits.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0))
    scales = (LOG2_E / student_temp, LOG2_E / teacher_temp, 1 / student_temp)
    with torch.cuda.device_of(logits):
        _row_cross_entropy_kernel[(M,)](
            row_loss, grad, logits, teacher, center, weight, *strides, *scales, K=K, **launch_config(K)
        )
    return row_loss.sum()


@row_cross_entropy_.register_fake
def _(grad: Tensor | None, student: Tensor | None, teacher: Tensor, *_: Any) -> Tensor:
    return teacher.new_empty((), dtype=torch.float32)


@operator("x")
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiplies (M, K) ``x`` by a number on the device; does nothing when that is 1."""
    M, K = x.shape
    config = {"BLOCK": min(4096, max(128, triton.next_power_of_2(K))), "num_warps": 4}
    with torch.cuda.device_of(x):
        _scale_kernel[(M, triton.cdiv(K, config["BLOCK"]))](x, factor, x.stride(0), K=K, **config)


@triton.jit
def _row_cross_entropy_kernel(
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


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < K if K % BLOCK else tl.full([BLOCK], True, tl.int1)
        x_ptr += tl.program_id(0).to(tl.int64) * stride
        x = tl.load(x_ptr + k, mask=inside).to(tl.float32) * factor
        tl.store(x_ptr + k, x.to(x_ptr.dtype.element_ty), mask=inside)

"""DINO's loss: the teacher's centered, sharpened probabilities against the student's, over all pairs of views."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import LOG2_E, check_single_backward, compute_dtype, dense_rows, operator, use_triton
from fastdino_kernels._numbers import Number, check_temps, from_operator, load_log2_scale, log2_scale, to_operator

MAX_STUDENT_VIEWS = 32


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: Number,
    inplace_grad: bool = False,
) -> Tensor:
    """Mean cross-entropy of softmax((teacher - center) / teacher_temp) and softmax(student / student_temp).

    Args:
        student: (S, B, K) logits of S views of B images over K prototypes, S <= 32; fp32, fp16, bf16 or fp64.
        teacher: (T, B, K) logits of the first T of those views, T = 1 or 2; takes no gradient.
        center: (K,) fp32 running mean of the teacher's logits (fp64 with fp64 logits).
        student_temp: temperature of the student, > 0.
        teacher_temp: temperature of the teacher, > 0: a float, or a 0-d fp32 or fp64 tensor on the logits' device, for
            whose value the host does not wait: it is neither checked nor may it change before the backward pass.
        inplace_grad: a kernel may write the gradient over the student's logits, which saves their size in memory.
            They are then consumed, possibly by the call already: their version counter moves, and a second backward
            raises RuntimeError. The reference (on a CPU, and in fp64) keeps them, and (S, B, K) probabilities besides.

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
    if use_triton(student) and torch.float64 not in (student.dtype, teacher.dtype):
        return _DinoLoss.apply(student, teacher, center, student_temp, *to_operator(teacher_temp), inplace_grad)
    return dino_loss_reference(student, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp)


def dino_loss_reference(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float, teacher_temp: Number
) -> Tensor:
    """:func:`dino_loss` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    dtype = compute_dtype(student)
    with torch.autocast(student.device.type, enabled=False):  # it would round log-probabilities to bf16
        log_p = torch.log_softmax(student.to(dtype) / student_temp, dim=-1)
        q = torch.softmax((teacher.to(dtype) - center) / teacher_temp, dim=-1)
        cross_entropy = -torch.einsum("tbk,sbk->ts", q.to(dtype), log_p)
        same_view = torch.eye(len(teacher), len(student), dtype=torch.bool, device=student.device)
        return cross_entropy.masked_fill(same_view, 0).sum() / num_terms(student, teacher)


def num_terms(student: Tensor, teacher: Tensor) -> int:
    """Pairs t != s, times images: T is at most S, so each teacher view leaves out exactly one student view."""
    return len(teacher) * (len(student) - 1) * student.shape[1]


def _check(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Number) -> None:
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
    check_temps(student.device, student_temp=student_temp, teacher_temp=teacher_temp)
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


class _DinoLoss(torch.autograd.Function):
    """Saves the logits and, for each row, its maximum and the sum of its exponentials; never a probability."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        student_temp: float,
        teacher_temp: float | None,
        temp_on_device: Tensor | None,
        inplace_grad: bool,
    ) -> Tensor:
        student, teacher, center = dense_rows(student), dense_rows(teacher), center.contiguous()
        loss, *statistics = dino_loss_forward(student, teacher, center, student_temp, teacher_temp, temp_on_device)
        ctx.save_for_backward(student, teacher, center, *statistics, temp_on_device)
        ctx.temps, ctx.inplace_grad, ctx.consumed = (student_temp, teacher_temp), inplace_grad, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_grad:
            check_single_backward(ctx)
        student, *saved, temp_on_device = ctx.saved_tensors
        if ctx.inplace_grad:
            torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
            grad, logits = student.detach(), None
        else:
            grad, logits = torch.empty_like(student, memory_format=torch.contiguous_format), student
        dino_loss_gradient_(grad, logits, grad_loss, *saved, *ctx.temps, temp_on_device)
        return grad, None, None, None, None, None, None


def launch_config(num_prototypes: int) -> dict[str, dict[str, int]]:
    """Block sizes and warps of the two passes over rows of ``num_prototypes``.

    One warp owns a slice of 512: its row sums need no barrier and no shared memory, and the teacher's two tiles fit in
    64 registers a thread, so that 32 of them are resident. The gradient has no sums and takes larger blocks.
    """
    row = max(16, triton.next_power_of_2(num_prototypes))
    return {
        "slice": {"BLOCK_K": min(row, 512), "num_warps": 1},
        "gradient": {"BLOCK_K": min(row, 1024), "num_warps": 2},
    }


@operator()
def dino_loss_forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | None,
    temp_on_device: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the (S, 2, B) and (T, 2, B) row statistics: the maximum in units of log2, and the sum over it."""
    (S, B, K), T = student.shape, len(teacher)
    config = launch_config(K)["slice"]
    num_slices = triton.cdiv(K, config["BLOCK_K"])
    student_parts, teacher_parts, student_stats, teacher_stats, row_loss = (
        torch.empty(shape, dtype=torch.float32, device=student.device)
        for shape in [(S, 2 + T, B, num_slices), (T, 2, B, num_slices), (S, 2, B), (T, 2, B), (S, B)]
    )
    parts, stats = (student_parts, teacher_parts), (student_stats, teacher_stats)
    strides = (student.stride()[:2], teacher.stride()[:2])
    scales = (LOG2_E / student_temp, log2_scale(from_operator(teacher_temp, temp_on_device)))
    slices = {"NUM_SLICES": num_slices, "BLOCK_N": triton.next_power_of_2(num_slices), "num_warps": 1}
    loss_scale = 1 / (LOG2_E * num_terms(student, teacher))
    with torch.cuda.device_of(student):
        _slice_kernel[(B * num_slices,)](*parts, student, teacher, center, S, B, *strides, *scales, T=T, K=K, **config)
        _merge_kernel[(S * B,)](row_loss, *stats, *parts, B, loss_scale, T=T, **slices)
    return row_loss.sum(), student_stats, teacher_stats


@dino_loss_forward.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (S, B, _K), T = student.shape, len(teacher)
    shapes = ((), (S, 2, B), (T, 2, B))
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


@operator("grad")
def dino_loss_gradient_(
    grad: Tensor,
    student: Tensor | None,
    grad_loss: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_temp: float,
    teacher_temp: float | None,
    temp_on_device: Tensor | None,
) -> None:
    """Writes the gradient for the student's logits into ``grad``, which holds those logits if ``student`` is None."""
    student = grad if student is None else student
    (S, B, K), T = student.shape, len(teacher)
    config = launch_config(K)["gradient"]
    grid = (B * triton.cdiv(K, config["BLOCK_K"]),)
    tensors = (grad, grad_loss, student, teacher, center, student_stats, teacher_stats)
    strides = (grad.stride()[:2], student.stride()[:2], teacher.stride()[:2])
    teacher_scale = log2_scale(from_operator(teacher_temp, temp_on_device))
    scales = (LOG2_E / student_temp, teacher_scale, 1 / (student_temp * num_terms(student, teacher)))
    with torch.cuda.device_of(student):
        _gradient_kernel[grid](*tensors, S, B, *strides, *scales, T=T, K=K, **config)


@triton.jit(do_not_specialize=["S", "B"])
def _slice_kernel(
    student_parts_ptr,
    teacher_parts_ptr,
    student_ptr,
    teacher_ptr,
    center_ptr,
    S,
    B,
    student_strides,
    teacher_strides,
    student_scale,
    teacher_scale,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: all rows of one image, in one slice of K. With x = logits * scale - top, top the slice's maximum, it
    # writes top and sum(exp2(x)) of each row, and for student rows <e_t, x>, e_t the exponentials of teacher view t.
    # Those stay in registers: taken again for every student row they would bound the kernel.
    pid = tl.program_id(0)
    num_slices: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    image = (pid // num_slices).to(tl.int64)
    k = (pid % num_slices) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
    plane = B.to(tl.int64) * num_slices
    student_parts_ptr += pid
    teacher_parts_ptr += pid
    student_ptr += image * student_strides[1]
    teacher_ptr += image * teacher_strides[1]
    center = tl.load(center_ptr + k, mask=inside, other=0.0)
    teacher_scale = load_log2_scale(teacher_scale)
    for t in tl.static_range(T):
        logits = tl.load(teacher_ptr + k, mask=inside, other=float("-inf")).to(tl.float32) - center
        top = tl.max(logits, 0) * teacher_scale
        # A slice of nothing but -inf has probability 0: exp2(-inf - 0), not exp2(-inf + inf).
        e = tl.exp2(tl.fma(logits, teacher_scale, -tl.where(top == float("-inf"), 0.0, top)))
        tl.store(teacher_parts_ptr, top)
        tl.store(teacher_parts_ptr + plane, tl.sum(e, 0))
        if t == 0:
            first = e
        else:
            second = e
        teacher_ptr += teacher_strides[0]
        teacher_parts_ptr += 2 * plane
    for s in tl.range(S, num_stages=3):
        logits = tl.load(student_ptr + k, mask=inside, other=0.0).to(tl.float32)
        top = tl.max(tl.where(inside, logits, float("-inf")), 0) * student_scale
        x = tl.fma(logits, student_scale, -top)
        # Not a pointer carried through the loop: triton 3.6 crashes on a store to one when it compiles for AMD.
        parts_ptr = student_parts_ptr + s * (2 + T) * plane
        tl.store(parts_ptr, top)
        tl.store(parts_ptr + plane, tl.sum(tl.where(inside, tl.exp2(x), 0.0), 0))
        tl.store(parts_ptr + 2 * plane, tl.sum(first * x, 0))
        if T == 2:
            tl.store(parts_ptr + 3 * plane, tl.sum(second * x, 0))
        student_ptr += student_strides[0]


@triton.jit(do_not_specialize=["B"])
def _merge_kernel(
    row_loss_ptr,
    student_stats_ptr,
    teacher_stats_ptr,
    student_parts_ptr,
    teacher_parts_ptr,
    B,
    loss_scale,
    T: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: the slices of one student row s merged into its statistics and its share of the loss,
    # sum over t != s of LSE(z_s) - <q_t, z_s>, in units of log2 until loss_scale.
    s = tl.program_id(0) // B
    image = tl.program_id(0) % B
    plane = B.to(tl.int64) * NUM_SLICES
    n = tl.arange(0, BLOCK_N)
    inside = n < NUM_SLICES
    student_parts_ptr += s * (2 + T) * plane + image * NUM_SLICES + n
    teacher_parts_ptr += image * NUM_SLICES + n
    tops = tl.load(student_parts_ptr, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    shift = tl.where(inside, tops - top, 0.0)
    total = tl.sum(tl.load(student_parts_ptr + plane, mask=inside, other=0.0) * tl.exp2(shift), 0)
    tl.store(student_stats_ptr + 2 * s * B + image, top)
    tl.store(student_stats_ptr + (2 * s + 1) * B + image, total)
    loss = 0.0
    for t in tl.static_range(T):
        q_tops = tl.load(teacher_parts_ptr + 2 * t * plane, mask=inside, other=float("-inf"))
        q_sums = tl.load(teacher_parts_ptr + (2 * t + 1) * plane, mask=inside, other=0.0)
        q_top = tl.max(q_tops, 0)
        rescale = tl.exp2(q_tops - q_top)
        q_total = tl.sum(q_sums * rescale, 0)
        tl.store(teacher_stats_ptr + 2 * t * B + image, q_top, mask=s == t)  # one of the S programs of this image
        tl.store(teacher_stats_ptr + (2 * t + 1) * B + image, q_total, mask=s == t)
        dots = tl.load(student_parts_ptr + (2 + t) * plane, mask=inside, other=0.0)  # <e_t, x> of each slice
        dot = tl.sum((dots + shift * q_sums) * rescale, 0) / q_total  # <q_t, z - top>
        loss += tl.where(s == t, 0.0, tl.log2(total) - dot)
    tl.store(row_loss_ptr + s * B + image, loss * loss_scale)


@triton.jit(do_not_specialize=["S", "B"])
def _gradient_kernel(
    grad_ptr,
    grad_loss_ptr,
    student_ptr,
    teacher_ptr,
    center_ptr,
    student_stats_ptr,
    teacher_stats_ptr,
    S,
    B,
    grad_strides,
    student_strides,
    teacher_strides,
    student_scale,
    teacher_scale,
    grad_scale,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grad_s = scale * sum over t != s of p_s - q_t. One program: all rows of one image, in one slice
    # of K, the scaled q_t in registers. Last image first: the images that the forward pass read last may still be in
    # the L2 cache.
    num_slices: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    image = B - 1 - tl.program_id(0) // num_slices
    k = (tl.program_id(0) % num_slices) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
    student_stats_ptr += image
    teacher_stats_ptr += image
    image = image.to(tl.int64)
    grad_ptr += image * grad_strides[1]
    student_ptr += image * student_strides[1]
    teacher_ptr += image * teacher_strides[1]
    scale = tl.load(grad_loss_ptr).to(tl.float32) * grad_scale
    center = tl.load(center_ptr + k, mask=inside, other=0.0)
    teacher_scale = load_log2_scale(teacher_scale)
    for t in tl.static_range(T):
        logits = tl.load(teacher_ptr + k, mask=inside, other=0.0).to(tl.float32) - center
        x = tl.fma(logits, teacher_scale, -tl.load(teacher_stats_ptr))
        q = tl.exp2(x) * (scale / tl.load(teacher_stats_ptr + B))
        if t == 0:
            first = q
        else:
            second = q
        teacher_ptr += teacher_strides[0]
        teacher_stats_ptr += 2 * B
    grad_view_stride = tl.cast(grad_strides[0], tl.int64)
    for s in tl.range(S, num_stages=3):
        logits = tl.load(student_ptr + k, mask=inside, other=0.0).to(tl.float32)
        x = tl.fma(logits, student_scale, -tl.load(student_stats_ptr))
        others = tl.where(s == 0, 0.0, 1.0)
        grad = -others * first
        if T == 2:
            other = tl.where(s == 1, 0.0, 1.0)
            grad -= other * second
            others += other
        grad += tl.exp2(x) * (others * scale / tl.load(student_stats_ptr + B))
        tl.store(grad_ptr + s * grad_view_stride + k, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        student_stats_ptr += 2 * B
        student_ptr += student_strides[0]

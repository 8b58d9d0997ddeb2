"""Cross-entropy between the softmax of a teacher and of a student, fused: what the losses of DINO and iBOT share."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import LOG2_E, operator


class Terms(NamedTuple):
    """Which cross-entropies are summed, and how."""

    student_temp: float
    teacher_temp: float
    scale: float  # of the sum
    other_views: bool  # only the pairs of different views, s != t


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor, weight: Tensor | None, terms: Terms, inplace_grad: bool
) -> Tensor:
    """Scaled sum of weight * H(softmax((teacher - center) / teacher_temp), softmax(student / student_temp)).

    Args:
        student: (S, B, K) logits; fp32, fp16 or bf16.
        teacher: (T, B, K) logits, T = 1 or 2; takes no gradient.
        center: (K,) fp32.
        weight: (B,) fp32, or None for 1.
        inplace_grad: write the gradient over the student's logits.

    Returns the fp32 scalar, summed over pairs of views and over B, with a gradient for ``student``. The caller has
    checked the shapes.
    """
    return _SoftCrossEntropy.apply(student, teacher, center, weight, terms, inplace_grad)


class _SoftCrossEntropy(torch.autograd.Function):
    """Saves the logits and, for each row, its maximum and the sum of its exponentials; never a probability."""

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
        student, teacher, center = dense_rows(student), dense_rows(teacher), center.contiguous()
        weight = None if weight is None else weight.contiguous()
        loss, *statistics = soft_cross_entropy_forward(student, teacher, center, weight, *terms)
        ctx.save_for_backward(student, teacher, center, weight, *statistics)
        ctx.terms, ctx.inplace_grad, ctx.consumed = terms, inplace_grad, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_grad:
            consume(ctx)
        student, *saved = ctx.saved_tensors
        if ctx.inplace_grad:
            torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
            grad, logits = student.detach(), None
        else:
            grad, logits = torch.empty_like(student, memory_format=torch.contiguous_format), student
        soft_cross_entropy_gradient_(grad, logits, grad_loss, *saved, *ctx.terms)
        return grad, None, None, None, None, None


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself when its rows are contiguous and apart from each other, else a copy."""
    return x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x


def consume(ctx: Any) -> None:
    """Raises RuntimeError in the second backward pass of what works in place."""
    if ctx.consumed:
        raise RuntimeError(
            "inplace_grad=True has already overwritten the student's logits with their gradient: "
            "call backward once, or pass inplace_grad=False"
        )
    ctx.consumed = True


def launch_config(num_prototypes: int, num_views: int) -> dict[str, dict[str, int]]:
    """Block sizes and warps of the two passes over rows of ``num_prototypes``, ``num_views`` of the student per image.

    Many views: one warp owns a slice of 512. Its row sums need no barrier and no shared memory, and the teacher's two
    tiles fit in 64 registers a thread, so that 32 of them are resident. The gradient has no sums and takes larger
    blocks. One view: there is no loop over views, so blocks are large enough to be worth a program.
    """
    row = max(16, triton.next_power_of_2(num_prototypes))
    if num_views == 1:
        return {name: {"BLOCK_K": min(row, 2048), "num_warps": 4} for name in ("slice", "gradient")}
    return {
        "slice": {"BLOCK_K": min(row, 512), "num_warps": 1},
        "gradient": {"BLOCK_K": min(row, 1024), "num_warps": 2},
    }


@operator()
def soft_cross_entropy_forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    scale: float,
    other_views: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the (S, 2, B) and (T, 2, B) row statistics: the maximum in units of log2, and the sum over it."""
    (S, B, K), T = student.shape, len(teacher)
    config = launch_config(K, S)["slice"]
    num_slices = triton.cdiv(K, config["BLOCK_K"])
    student_parts, teacher_parts, student_stats, teacher_stats, row_loss = (
        torch.empty(shape, dtype=torch.float32, device=student.device)
        for shape in [(S, 2 + T, B, num_slices), (T, 2, B, num_slices), (S, 2, B), (T, 2, B), (S, B)]
    )
    parts, stats = (student_parts, teacher_parts), (student_stats, teacher_stats)
    strides = (student.stride()[:2], teacher.stride()[:2])
    scales = (LOG2_E / student_temp, LOG2_E / teacher_temp)
    pairs = {"T": T, "OTHER_VIEWS": other_views}
    slices = {"NUM_SLICES": num_slices, "BLOCK_N": triton.next_power_of_2(num_slices), "num_warps": 1}
    with torch.cuda.device_of(student):
        _slice_kernel[(B * num_slices,)](*parts, student, teacher, center, S, B, *strides, *scales, T=T, K=K, **config)
        _merge_kernel[(S * B,)](row_loss, weight, *stats, *parts, B, scale / LOG2_E, **pairs, **slices)
    return row_loss.sum(), student_stats, teacher_stats


@soft_cross_entropy_forward.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (S, B, _K), T = student.shape, len(teacher)
    shapes = ((), (S, 2, B), (T, 2, B))
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


@operator("grad")
def soft_cross_entropy_gradient_(
    grad: Tensor,
    student: Tensor | None,
    grad_loss: Tensor,
    teacher: Tensor,
    center: Tensor,
    weight: Tensor | None,
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_temp: float,
    teacher_temp: float,
    scale: float,
    other_views: bool,
) -> None:
    """Writes the gradient for the student's logits into ``grad``, which holds those logits if ``student`` is None."""
    student = grad if student is None else student
    (S, B, K), T = student.shape, len(teacher)
    config = launch_config(K, S)["gradient"]
    grid = (B * triton.cdiv(K, config["BLOCK_K"]),)
    tensors = (grad, grad_loss, student, teacher, center, weight, student_stats, teacher_stats)
    strides = (grad.stride()[:2], student.stride()[:2], teacher.stride()[:2])
    scales = (LOG2_E / student_temp, LOG2_E / teacher_temp, scale / student_temp)
    pairs = {"T": T, "OTHER_VIEWS": other_views}
    with torch.cuda.device_of(student):
        _gradient_kernel[grid](*tensors, S, B, *strides, *scales, **pairs, K=K, **config)


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
    weight_ptr,
    student_stats_ptr,
    teacher_stats_ptr,
    student_parts_ptr,
    teacher_parts_ptr,
    B,
    loss_scale,
    T: tl.constexpr,
    OTHER_VIEWS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: the slices of one student row s merged into its statistics and its share of the loss,
    # sum over t (t != s if OTHER_VIEWS) of LSE(z_s) - <q_t, z_s>, in units of log2 until loss_scale.
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
        loss += tl.where(OTHER_VIEWS & (s == t), 0.0, tl.log2(total) - dot)
    if weight_ptr is not None:
        loss_scale *= tl.load(weight_ptr + image)
    tl.store(row_loss_ptr + s * B + image, loss * loss_scale)


@triton.jit(do_not_specialize=["S", "B"])
def _gradient_kernel(
    grad_ptr,
    grad_loss_ptr,
    student_ptr,
    teacher_ptr,
    center_ptr,
    weight_ptr,
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
    OTHER_VIEWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grad_s = scale * sum over t (t != s if OTHER_VIEWS) of p_s - q_t. One program: all rows of one image, in one slice
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
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + image)
    center = tl.load(center_ptr + k, mask=inside, other=0.0)
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
        others = tl.where(OTHER_VIEWS & (s == 0), 0.0, 1.0)
        grad = -others * first
        if T == 2:
            other = tl.where(OTHER_VIEWS & (s == 1), 0.0, 1.0)
            grad -= other * second
            others += other
        grad += tl.exp2(x) * (others * scale / tl.load(student_stats_ptr + B))
        tl.store(grad_ptr + s * grad_view_stride + k, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        student_stats_ptr += 2 * B
        student_ptr += student_strides[0]

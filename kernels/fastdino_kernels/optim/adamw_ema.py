"""AdamW and the teacher's moving average on flat fp32 shards, in one pass."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import lerp, operator, use_triton
from fastdino_kernels._numbers import (
    Number,
    check_number,
    ema_weight,
    from_operator,
    load_ema_weight,
    load_number,
    on_host,
    product,
    to_operator,
)
from fastdino_kernels.optim.ema_update import ema_update_reference_
from fastdino_kernels.optim.segment_squares import BLOCK, Segments, check_divides, load_chunk


class AdamWHyper(NamedTuple):
    """Hyperparameters of one step. A schedule's are floats, or 0-d fp32 or fp64 tensors on the parameter's device."""

    lr: Number
    weight_decay: Number
    momentum: Number  # weight of the old teacher, in [0, 1]; fp32 would lose digits of 1 - momentum
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    hyper: AdamWHyper,
    *,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
    segments: Segments | None = None,
    found_inf: Tensor | None = None,
    param_lp: Tensor | None = None,
    ema_lp: Tensor | None = None,
) -> None:
    """A step of AdamW, then ema <- momentum * ema + (1 - momentum) * param; in place, and ``grad`` is only read.

    With g = grad * grad_scale and (b1, b2) = betas:
        exp_avg <- b1 exp_avg + (1 - b1) g,  exp_avg_sq <- b2 exp_avg_sq + (1 - b2) g^2,
        param <- (1 - rate weight_decay) param - rate exp_avg / (1 - b1^step) / (sqrt(exp_avg_sq / (1 - b2^step)) + eps)
    and rate = lr * lr_scale.

    Args:
        param, exp_avg, exp_avg_sq, ema: (N,) contiguous, fp32 or fp64, which share no memory.
        grad: (N,) contiguous, of the same dtype; or bf16 or fp16.
        step: 0-d fp32, updates so far with this one. Like every tensor here the host does not wait for it (except in
            fp64 on a GPU).
        hyper: numbers, of which those that are tensors are read by the kernel, and their values not checked.
        grad_scale: fp32 coefficient for clipping: 0-d, or with ``segments`` (num_segments,), one for each.
        lr_scale: fp32 multiplier of the learning rate, of the shapes that ``grad_scale`` has. Where the product with lr
            is 0 the parameter stays bit for bit as it was, not even decayed, while its moments run on.
        segments: a division of the N elements into parameters, see :func:`~fastdino_kernels.make_segments`.
        found_inf: 0-d fp32; unless it is 0 nothing changes, bit for bit, whatever the gradient holds.
        param_lp, ema_lp: (N,) contiguous, of any floating dtype; receive the results.

    Raises ValueError when a tensor's shape, dtype, device or strides do not fit, or a number is out of range.
    Source: Loshchilov and Hutter 2019, algorithm 2; Caron et al. 2021, algorithm 1.
    """
    flat = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    optional = {"param_lp": param_lp, "ema_lp": ema_lp}
    _check_hyper(hyper, param.device)
    _check_flat(flat | {name: x for name, x in optional.items() if x is not None})
    _check_scalars(param, segments, step=step, found_inf=found_inf, grad_scale=grad_scale, lr_scale=lr_scale)
    parts = (None, None, None) if segments is None else segments
    numbers = (*to_operator(hyper.lr), *to_operator(hyper.weight_decay), *to_operator(hyper.momentum))
    with torch.no_grad():
        adamw_ema_flat_(
            param, grad, exp_avg, exp_avg_sq, ema, step, *numbers, hyper.betas, hyper.eps, grad_scale, lr_scale, *parts,
            found_inf, param_lp, ema_lp,
        )  # fmt: skip


@operator("param", "exp_avg", "exp_avg_sq", "ema", "param_lp", "ema_lp")
def adamw_ema_flat_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    lr: float | None,
    lr_on_device: Tensor | None,
    weight_decay: float | None,
    weight_decay_on_device: Tensor | None,
    momentum: float | None,
    momentum_on_device: Tensor | None,
    betas: Sequence[float],
    eps: float,
    grad_scale: Tensor | None,
    lr_scale: Tensor | None,
    lengths: Sequence[int] | None,
    chunks: Tensor | None,
    first_chunk: Tensor | None,
    found_inf: Tensor | None,
    param_lp: Tensor | None,
    ema_lp: Tensor | None,
) -> None:
    """:func:`adamw_ema_` in the types of an operator. Here the addresses are known."""
    hyper = AdamWHyper(
        from_operator(lr, lr_on_device),
        from_operator(weight_decay, weight_decay_on_device),
        from_operator(momentum, momentum_on_device),
        (betas[0], betas[1]),
        eps,
    )
    segments = None
    if lengths is not None and chunks is not None and first_chunk is not None:
        segments = Segments(tuple(lengths), chunks, first_chunk)
    _check_apart(
        param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, ema=ema, param_lp=param_lp,
        ema_lp=ema_lp,
    )  # fmt: skip
    update = _launch if use_triton(param) and param.dtype == torch.float32 else adamw_ema_reference_
    update(
        param, grad, exp_avg, exp_avg_sq, ema, step, hyper,
        grad_scale=grad_scale, lr_scale=lr_scale, segments=segments, found_inf=found_inf, param_lp=param_lp,
        ema_lp=ema_lp,
    )  # fmt: skip


@torch.no_grad()
def adamw_ema_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    hyper: AdamWHyper,
    *,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
    segments: Segments | None = None,
    found_inf: Tensor | None = None,
    param_lp: Tensor | None = None,
    ema_lp: Tensor | None = None,
) -> None:
    """:func:`adamw_ema_` in plain torch: the CPU path and the definition that the kernel is tested against."""
    if found_inf is not None and found_inf.tolist() != 0:  # on a CPU there is nothing to wait for
        return
    split = (lambda x: [x]) if segments is None else segments.split
    g = grad.to(param.dtype, copy=grad_scale is not None)
    if grad_scale is not None and grad_scale.numel():  # a shard may have no segment
        torch._foreach_mul_(split(g), list(grad_scale.view(-1).unbind()))
    lr, weight_decay = on_host(hyper.lr), on_host(hyper.weight_decay)  # torch's update takes its decay from the host
    flat = (param, g, exp_avg, exp_avg_sq)
    rates, parts = [lr], [[x] for x in flat]
    if lr_scale is not None:
        rates, parts = [lr * scale for scale in lr_scale.view(-1).tolist()], [split(x) for x in flat]
    for rate, *part in zip(rates, *parts, strict=True):
        if lr_scale is not None and rate == 0:
            part[0] = part[0].clone()
        p, part_grad, average, average_sq = ([x] for x in part)
        torch._fused_adamw_(
            p, part_grad, average, average_sq, [], [step], lr=rate, beta1=hyper.betas[0], beta2=hyper.betas[1],
            weight_decay=weight_decay, eps=hyper.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    ema_update_reference_(ema, param, hyper.momentum, ema_lp)
    if param_lp is not None:
        param_lp.copy_(param)


def _check_hyper(hyper: AdamWHyper, device: torch.device) -> None:
    for name in ("lr", "weight_decay", "momentum"):
        if isinstance(number := getattr(hyper, name), Tensor):
            check_number(name, number, device)
    if not isinstance(hyper.momentum, Tensor) and not 0 <= hyper.momentum <= 1:
        raise ValueError(f"momentum is {hyper.momentum}, but the weight of the old teacher must be in [0, 1]")
    if not all(0 <= beta < 1 for beta in hyper.betas):
        raise ValueError(f"betas are {hyper.betas}, but the weights of the old moments must be in [0, 1)")


def _check_flat(tensors: dict[str, Tensor]) -> None:
    param = tensors["param"]
    for name, x in tensors.items():
        if x.ndim != 1 or x.shape != param.shape or x.device != param.device or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} with strides {x.stride()} on {x.device}: expected it contiguous and 1-D "
                f"like param, which is {tuple(param.shape)} on {param.device}"
            )
        narrow = (torch.bfloat16, torch.float16, torch.float32)
        if x.dtype != param.dtype and not (x.dtype in narrow and name in ("grad", "param_lp", "ema_lp")):
            raise ValueError(f"{name} is {x.dtype}, but param is {param.dtype}")
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"param is {param.dtype}: AdamW and the teacher's average need fp32 or fp64")


def _check_apart(**tensors: Tensor | None) -> None:
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in tensors.items() if x is not None)
    for (_, stop, first), (start, _, second) in itertools.pairwise(spans):
        if start < stop:
            raise ValueError(f"{first} and {second} share memory: clone one")


def _check_scalars(param: Tensor, segments: Segments | None, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        shape = () if segments is None or not name.endswith("_scale") else (len(segments.lengths),)
        if x is not None and (x.shape != shape or x.dtype != torch.float32 or x.device != param.device):
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}: "
                f"expected torch.float32 of shape {shape} on {param.device}"
            )
    if segments is not None:
        check_divides(segments, param)


def launch_config() -> dict[str, int]:
    """Warps for a block of ``BLOCK`` elements: 8 elements of each tensor per thread."""
    return {"BLOCK": BLOCK, "num_warps": 8}


def _launch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: Tensor,
    hyper: AdamWHyper,
    *,
    grad_scale: Tensor | None,
    lr_scale: Tensor | None,
    segments: Segments | None,
    found_inf: Tensor | None,
    param_lp: Tensor | None,
    ema_lp: Tensor | None,
) -> None:
    if not param.numel():
        return
    b1, b2 = hyper.betas
    # What would lose digits in fp32 is computed here.
    decay = product(hyper.lr, hyper.weight_decay)
    numbers = (hyper.lr, *decay, ema_weight(hyper.momentum), hyper.eps)
    decays = (1 - b1, 1 - b2, math.log(b1) if b1 else -math.inf, math.log(b2) if b2 else -math.inf)
    num_programs = triton.cdiv(param.numel(), BLOCK) if segments is None else len(segments.chunks)
    chunks = None if segments is None else segments.chunks
    with torch.cuda.device_of(param):
        _adamw_ema_kernel[(num_programs,)](
            (param, grad, exp_avg, exp_avg_sq, ema, param_lp, ema_lp),
            (step, found_inf, grad_scale, lr_scale, chunks),
            param.numel(), numbers, decays, **launch_config(),
        )  # fmt: skip


@triton.jit
def _adamw_ema_kernel(tensors, control, num_elements, numbers, decays, BLOCK: tl.constexpr):
    # One block of the flat tensors per program or, with a table of chunks, the part of one that lies in one segment.
    step_ptr, found_inf_ptr, scale_ptr, lr_scale_ptr, chunks_ptr = control
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    if chunks_ptr is None:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        low = 0
        high = num_elements - start
    else:
        start, low, high, segment = load_chunk(chunks_ptr, BLOCK)
        if scale_ptr is not None:
            scale_ptr += segment
        if lr_scale_ptr is not None:
            lr_scale_ptr += segment
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    lr_scale = None if lr_scale_ptr is None else tl.load(lr_scale_ptr)
    step = tl.load(step_ptr)
    correction1 = 1 / neg_expm1(step * decays[2])
    correction2 = 1 / neg_expm1(step * decays[3])
    i = tl.max_contiguous(tl.arange(0, BLOCK), 4)  # 4 elements per thread in every dtype, see _ema_block
    if (low == 0) & (high >= BLOCK):
        _adamw_ema_block(tensors, start, i, None, scale, lr_scale, correction1, correction2, numbers, decays)
    else:
        mask = (i >= low) & (i < high)
        _adamw_ema_block(tensors, start, i, mask, scale, lr_scale, correction1, correction2, numbers, decays)


@triton.jit
def _adamw_ema_block(tensors, start, i, mask, scale, lr_scale, correction1, correction2, numbers, decays):
    lr, lr_decay, weight_decay, weight, eps = numbers
    lr = load_number(lr)
    if lr_decay is None:
        lr_decay = lr * load_number(weight_decay)
    weight = load_ema_weight(weight)
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, param_lp_ptr, ema_lp_ptr = tensors
    param = tl.load(param_ptr + start + i, mask=mask)
    grad = tl.load(grad_ptr + start + i, mask=mask).to(tl.float32) * scale
    exp_avg = tl.load(exp_avg_ptr + start + i, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + start + i, mask=mask)
    ema = tl.load(ema_ptr + start + i, mask=mask)
    exp_avg = lerp(exp_avg, grad, decays[0])
    exp_avg_sq = lerp(exp_avg_sq, grad * grad, decays[1])
    if lr_scale is not None:
        lr *= lr_scale
        lr_decay *= lr_scale
    moved = param - lr_decay * param
    moved -= lr * correction1 * exp_avg / (tl.sqrt(exp_avg_sq * correction2) + eps)
    param = moved if lr_scale is None else tl.where(lr == 0, param, moved)  # 0 * x is no 0 for every x
    ema = lerp(ema, param, weight)
    tl.store(param_ptr + start + i, param, mask=mask)
    tl.store(exp_avg_ptr + start + i, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + start + i, exp_avg_sq, mask=mask)
    tl.store(ema_ptr + start + i, ema, mask=mask)
    if param_lp_ptr is not None:
        tl.store(param_lp_ptr + start + i, param.to(param_lp_ptr.dtype.element_ty), mask=mask)
    if ema_lp_ptr is not None:
        tl.store(ema_lp_ptr + start + i, ema.to(ema_lp_ptr.dtype.element_ty), mask=mask)


@triton.jit
def neg_expm1(x):
    # 1 - e^x for x <= 0. Near 0 the difference would cancel: at step 1 and beta2 0.999 fp32 keeps 4 digits of 7.
    series = 1.0 + x * (1 / 8)
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + series * x * (1 / n)
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))

"""adamw_ema_: clipping, AdamW, the teacher's average and its bf16 copy, as the trainer's step has them.

A shape that ends in ``rates`` has a learning rate for each tensor, as layer-wise decay makes them, and a coefficient.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import Bench, Bound, Shape, Variant
from fastdino_kernels import AdamWHyper, adamw_ema_, make_segments
from fastdino_kernels.optim.adamw_ema import adamw_ema_reference_
from fastdino_kernels.optim.segment_squares import Segments

HYPER = AdamWHyper(lr=5e-4, weight_decay=0.04, momentum=0.996)
STEPS_BEFORE = 10.0
NUM_LAYERS = 26  # ViT-L's blocks, what lies before and what lies behind them


class Inputs(NamedTuple):
    """Flat fp32 tensors; ``scale`` is 1, so that repeated calls of a peer that clips in place change nothing."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor
    grads: Tensor
    ema_lp: Tensor  # bf16
    step: Tensor
    scale: Tensor
    lr_scale: Tensor | None  # like ``scale`` one for each segment
    segments: Segments | None
    num_tensors: int  # which the peers see


def _make(shape: Shape, seed: int) -> Inputs:
    random, size, (count, _) = shape.random(seed), _size(shape), shape.sizes
    param, grad, exp_avg, exp_avg_sq, ema = (random(size) for _ in range(5))
    ema_lp, step = torch.empty_like(ema, dtype=torch.bfloat16), torch.tensor(STEPS_BEFORE, device=shape.device)
    scale, rates, segments = torch.ones_like(step), None, None
    if shape.text.endswith(",rates"):
        segments = make_segments([size // count] * count, shape.device)
        rates = torch.tensor([0.9 ** (NUM_LAYERS - 1 - _layer(i, count)) for i in range(count)], device=shape.device)
        scale = torch.ones_like(rates)
    return Inputs(
        param, exp_avg, exp_avg_sq.square_(), ema, grad, ema_lp, step, scale, rates, segments, count
    )  # fmt: skip


def _layer(tensor: int, count: int) -> int:
    return tensor * NUM_LAYERS // count


def _size(shape: Shape) -> int:
    count, parameters = shape.sizes
    return parameters // count // 16 * 16 * count


def _update(implementation: Callable[..., None], *given: object) -> tuple[Tensor, ...]:
    """One step; what is judged."""
    inputs = Inputs(*given)  # type: ignore[arg-type]
    inputs.step.add_(1)
    implementation(
        inputs.param, inputs.grads, inputs.exp_avg, inputs.exp_avg_sq, inputs.ema, inputs.step, HYPER,
        grad_scale=inputs.scale, lr_scale=inputs.lr_scale, segments=inputs.segments, ema_lp=inputs.ema_lp,
    )  # fmt: skip
    return inputs[:4]


def _torch_fused(inputs: Inputs) -> Bound:
    """What a careful user writes, on a list of tensors: a parameter group for each rate."""
    params, exp_avgs, exp_avg_sqs, emas, grads, emas_lp = (x.chunk(inputs.num_tensors) for x in inputs[:6])
    leaves = [torch.nn.Parameter(p) for p in params]
    rates = [1.0] * len(leaves) if inputs.lr_scale is None else inputs.lr_scale.tolist()
    groups = [
        {"params": [leaf for leaf, other in zip(leaves, rates, strict=True) if other == rate], "lr": HYPER.lr * rate}
        for rate in dict.fromkeys(rates)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=HYPER.weight_decay, fused=True)
    for leaf, grad, exp_avg, exp_avg_sq in zip(leaves, grads, exp_avgs, exp_avg_sqs, strict=True):
        leaf.grad = grad
        optimizer.state[leaf] = {"step": inputs.step.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    scale = list(inputs.scale.unbind()) if inputs.scale.ndim else inputs.scale

    @torch.no_grad()
    def call() -> list[Tensor]:
        torch._foreach_mul_(grads, scale)  # type: ignore[arg-type]
        optimizer.step()
        torch._foreach_lerp_(emas, params, 1 - HYPER.momentum)
        torch._foreach_copy_(emas_lp, emas)
        return list(inputs[:4])

    return call


def _formula(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: Tensor, hyper: AdamWHyper,
    *, grad_scale: Tensor, lr_scale: Tensor | None, segments: Segments | None, ema_lp: Tensor,
) -> None:  # fmt: skip
    """On the flat tensors, for the compiler to fuse."""

    def spread(x: Tensor) -> Tensor:
        return x[:, None].expand(len(x), len(param) // len(x)).flatten() if x.ndim else x

    g = grad * spread(grad_scale)
    lr = hyper.lr if lr_scale is None else hyper.lr * spread(lr_scale)
    exp_avg.lerp_(g, 1 - hyper.betas[0])
    exp_avg_sq.mul_(hyper.betas[1]).addcmul_(g, g, value=1 - hyper.betas[1])
    first, second = 1 - hyper.betas[0] ** step, 1 - hyper.betas[1] ** step
    update = exp_avg / first / ((exp_avg_sq / second).sqrt() + hyper.eps)
    param.mul_(1 - lr * hyper.weight_decay).sub_(lr * update)
    ema.lerp_(param, 1 - hyper.momentum)
    ema_lp.copy_(ema)


BENCH = Bench(
    name="adamw_ema_",
    # Number of tensors and of parameters: ViT-B, ViT-S, ViT-L; on a CPU a tenth of ViT-S.
    shapes={"cuda": ["150,86000000", "150,22000000", "294,304000000", "294,304000000,rates"], "cpu": ["150,2200000"]},
    make=_make,
    bytes=lambda shape: _size(shape) * (9 * 4 + 2),
    ours=partial(_update, adamw_ema_),
    reference=partial(_update, adamw_ema_reference_),
    others=lambda shape: {"torch AdamW(fused) and _foreach_lerp_": Variant(_torch_fused)},
    compiled=lambda shape: partial(_update, _formula),
)

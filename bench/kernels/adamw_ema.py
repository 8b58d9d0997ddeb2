"""adamw_ema_: clipping, AdamW, the teacher's average and its bf16 copy, as the trainer's step has them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import AdamWHyper, adamw_ema_
from fastdino_kernels.optim.adamw_ema import adamw_ema_reference_

HYPER = AdamWHyper(lr=5e-4, weight_decay=0.04, momentum=0.996)
STEPS_BEFORE = 10.0
# Number of tensors, which the peers see, and of parameters. ViT-S, ViT-B, ViT-L; on a CPU a tenth of ViT-S.
SHAPES = {"cuda": ["150,22000000", "150,86000000", "294,304000000"], "cpu": ["150,2200000"]}


class Inputs(NamedTuple):
    """Flat fp32 tensors; ``scale`` is 1, so that repeated calls of a peer that clips in place change nothing."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor
    ema_lp: Tensor  # bf16
    step: Tensor
    scale: Tensor
    pieces: int


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (count, parameters), _ = parse_shape(shape)
    size = parameters // count // 16 * 16 * count

    def make(seed: int) -> Inputs:
        random: dict[str, Any] = {"generator": generator(device, seed), "device": device}
        param, grad, exp_avg, exp_avg_sq, ema = (torch.randn(size, **random) for _ in range(5))
        ema_lp, step = torch.empty_like(ema, dtype=torch.bfloat16), torch.tensor(STEPS_BEFORE, device=device)
        return Inputs(param, grad, exp_avg, exp_avg_sq.square_(), ema, ema_lp, step, torch.ones_like(step), count)

    variants = {
        OURS: Variant(lambda inputs: _bind(adamw_ema_, inputs)),
        PLAIN: Variant(lambda inputs: _bind(adamw_ema_reference_, inputs)),
        "torch AdamW(fused) and _foreach_lerp_": Variant(_torch_fused),
    }
    if compiled:
        variants["torch.compile"] = Variant(_compiled)
    return Case("adamw_ema_", shape, make, _exact, variants, size * (9 * 4 + 2))


def _bind(implementation: Any, inputs: Inputs) -> Bound:
    def call() -> list[Tensor]:
        inputs.step.add_(1)
        implementation(*inputs[:5], inputs.step, HYPER, grad_scale=inputs.scale, ema_lp=inputs.ema_lp)
        return _judged(inputs)

    return call


def _judged(inputs: Inputs) -> list[Tensor]:
    return [inputs.param, inputs.exp_avg, inputs.exp_avg_sq, inputs.ema]


def _torch_fused(inputs: Inputs) -> Bound:
    """What a careful user writes, on a list of tensors."""
    params, grads, exp_avgs, exp_avg_sqs, emas, emas_lp = (x.chunk(inputs.pieces) for x in inputs[:6])
    leaves = [torch.nn.Parameter(p) for p in params]
    optimizer = torch.optim.AdamW(leaves, lr=HYPER.lr, weight_decay=HYPER.weight_decay, fused=True)
    for leaf, grad, exp_avg, exp_avg_sq in zip(leaves, grads, exp_avgs, exp_avg_sqs, strict=True):
        leaf.grad = grad
        optimizer.state[leaf] = {"step": inputs.step.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @torch.no_grad()
    def call() -> list[Tensor]:
        torch._foreach_mul_(grads, inputs.scale)
        optimizer.step()
        torch._foreach_lerp_(emas, params, 1 - HYPER.momentum)
        torch._foreach_copy_(emas_lp, emas)
        return _judged(inputs)

    return call


@torch.compile(dynamic=False)
def _step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, ema_lp: Tensor, step: Tensor,
    scale: Tensor,
) -> None:  # fmt: skip
    """The formulas on the flat tensors, for the compiler to fuse."""
    step += 1
    g = grad * scale
    exp_avg.lerp_(g, 1 - HYPER.betas[0])
    exp_avg_sq.mul_(HYPER.betas[1]).addcmul_(g, g, value=1 - HYPER.betas[1])
    first, second = 1 - HYPER.betas[0] ** step, 1 - HYPER.betas[1] ** step
    update = exp_avg / first / ((exp_avg_sq / second).sqrt() + HYPER.eps)
    param.mul_(1 - HYPER.lr * HYPER.weight_decay).sub_(HYPER.lr * update)
    ema.lerp_(param, 1 - HYPER.momentum)
    ema_lp.copy_(ema)


def _compiled(inputs: Inputs) -> Bound:
    def call() -> list[Tensor]:
        _step(*inputs[:8])
        return _judged(inputs)

    return call


def _exact(inputs: Inputs) -> list[Tensor]:
    param, grad, exp_avg, exp_avg_sq, ema = (x.double() for x in inputs[:5])
    adamw_ema_reference_(param, grad, exp_avg, exp_avg_sq, ema, inputs.step + 1, HYPER)
    return [param, exp_avg, exp_avg_sq, ema]

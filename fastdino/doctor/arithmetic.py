"""Kernels of a training step beside their references: ``python -m fastdino.doctor.arithmetic DEVICE`` prints JSON.

In a process of its own, because a kernel that fails may end it. Without a GPU Triton's interpreter runs them.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

from fastdino_kernels import AdamWHyper, make_segments
from fastdino_kernels.layers import gather_layer_norm, packed_attention, prototype_weight
from fastdino_kernels.losses import dino_loss, koleo_loss, linear_ibot_loss, sinkhorn
from fastdino_kernels.optim import adamw_ema, ema_update, segment_squares
from fastdino_kernels.testing import assert_no_worse

Call = Callable[..., Tensor | tuple[Tensor, ...]]


def calls(device: str) -> dict[str, tuple[Call, Call, list[Tensor]]]:
    """By name a kernel, its reference, and small inputs, fp16 for attention, else fp32; some take a gradient."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(sum(shape)))

    def leaf(*shape: int) -> Tensor:
        return random(*shape).requires_grad_()

    def pair(module: Any, name: str, **settings: Any) -> tuple[Call, Call]:
        return partial(getattr(module, name), **settings), partial(getattr(module, f"{name}_reference"), **settings)

    def in_place(module: Any, name: str, change: Callable[..., tuple[Tensor, ...]]) -> tuple[Call, Call]:
        return partial(change, getattr(module, f"{name}_")), partial(change, getattr(module, f"{name}_reference_"))

    K, rows, width, n = 100, 5, 48, 5000
    temps = {"student_temp": 0.1, "teacher_temp": 0.04}
    weight = random(rows).exp()
    linear = [leaf(rows, width), leaf(K, width), random(rows, width), random(K, width), random(K), weight]
    gathered = tuple(partial(_two_of_four, norm) for norm in pair(gather_layer_norm, "gather_layer_norm"))
    of_heads = [x.requires_grad_() for x in random(30, 2, 16).half().split(10)]
    tokens = {"queries": ((2, 5),), "keys": ((2, 5),)}
    segments = {"segments": make_segments((3000, n - 3000), device)}
    return {
        "dino_loss": (*pair(dino_loss, "dino_loss", **temps), [leaf(4, 3, K), random(2, 3, K), random(K)]),
        "linear_ibot_loss": (*pair(linear_ibot_loss, "linear_ibot_loss", **temps), linear),
        "koleo_loss": (*pair(koleo_loss, "koleo_loss"), [leaf(2, rows, width)]),
        "sinkhorn": (*pair(sinkhorn, "sinkhorn", temp=0.1), [random(rows, K)]),
        "prototype_weight": (*pair(prototype_weight, "prototype_weight"), [leaf(K, width), random(K, 1)]),
        "gather_layer_norm": (gathered[0], gathered[1], [leaf(4 * rows, width), leaf(width), leaf(width)]),
        "packed_attention": (*pair(packed_attention, "packed_attention", **tokens), of_heads),
        "segment_squares": (*pair(segment_squares, "segment_squares", **segments), [random(n)]),
        "ema_update": (*in_place(ema_update, "ema_update", _average), [random(n), random(n)]),
        "adamw_ema": (*in_place(adamw_ema, "adamw_ema", _step), [random(n), random(n)]),
    }  # fmt: skip


def wrong(kernel: Call, reference: Call, inputs: list[Tensor]) -> str:
    """What is wrong with a kernel's results and gradients; empty for nothing."""
    try:
        exact = _results(reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
        for got, plain, right in zip(_results(kernel, inputs), _results(reference, inputs), exact, strict=True):
            # Attention rounds what its products take, too, beside plain torch in fp32: as much as one bf16 is off.
            assert_no_worse(got, plain, right, torch.bfloat16 if got.dtype == torch.float16 else None)
    except Exception as error:  # of compilers and drivers, which have no type in common
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _results(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    made = call(*inputs)
    results = [made] if isinstance(made, Tensor) else list(made)
    leaves = [x for x in inputs if x.requires_grad]
    return [*results, *(torch.autograd.grad(results[0].sin().sum(), leaves) if leaves else [])]


def _two_of_four(norm: Call, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, ...]:
    return norm(x, ((4, len(x) // 4),), (torch.tensor([2, 0], device=x.device),), weight, bias)


def _average(update: Callable[..., None], teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    teacher = teacher.clone()
    update(teacher, student, 0.9)
    return (teacher,)


def _step(update: Callable[..., None], param: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    state = param.clone(), param * 0.1, param * param, param + 1
    first, *rest = state
    update(first, grad, *rest, torch.ones((), device=param.device), AdamWHyper(1e-3, 0.04, 0.9))
    return state


if __name__ == "__main__":
    print(json.dumps({name: wrong(*call) for name, call in calls(sys.argv[1]).items()}))

"""ema_update_: the teacher's update over all parameters, as a list of tensors and as one flat buffer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from lightly.models.utils import update_momentum
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from bench.kernels.case import Bench, Bound, Function, Shape, Variant
from fastdino_kernels import ema_update_
from fastdino_kernels.optim.ema_update import ema_update_reference_

MOMENTUM = 0.996
Tensors = list[Tensor]


class Inputs(NamedTuple):
    teacher: Tensors
    student: Tensors
    teacher_lp: Tensors | None


def _make(shape: Shape, seed: int) -> Inputs:
    random, (count, _), size = shape.random(seed), shape.sizes, _size(shape)
    teacher = [random(size) for _ in range(count)]
    student = [random(size).to(shape.dtype) for _ in range(count)]
    copies = [torch.empty(size, dtype=torch.bfloat16, device=shape.device)] if count == 1 else None
    return Inputs(teacher, student, copies)


def _size(shape: Shape) -> int:
    """Of one tensor."""
    count, parameters = shape.sizes
    return parameters // count // 16 * 16


def _bytes(shape: Shape) -> int:
    count = shape.sizes[0]
    return count * _size(shape) * (8 + shape.dtype.itemsize + (2 if count == 1 else 0))


def _update(implementation: Callable[..., None], teacher: Tensors, student: Tensors, copies: Tensors | None) -> Tensors:
    implementation(teacher, student, MOMENTUM, copies)
    return teacher


def _then_copied(update: Callable[[], object], inputs: Inputs) -> Bound:
    """``update``, and where there is a rounded copy, that copy."""

    def call() -> list[Tensor]:
        update()
        if inputs.teacher_lp is not None:
            torch._foreach_copy_(inputs.teacher_lp, inputs.teacher)
        return inputs.teacher

    return call


def _foreach_lerp(inputs: Inputs) -> Bound:
    return _then_copied(lambda: torch._foreach_lerp_(inputs.teacher, inputs.student, 1 - MOMENTUM), inputs)


def _module(tensors: Tensors) -> nn.Module:
    return nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in tensors])


def _lightly(inputs: Inputs) -> Bound:
    student, teacher = _module(inputs.student), _module(inputs.teacher)
    return _then_copied(lambda: update_momentum(student, teacher, MOMENTUM), inputs)


def _timm(inputs: Inputs) -> Bound:
    student = _module(inputs.student)
    ema = ModelEmaV3(_module(inputs.teacher[:1]), decay=MOMENTUM)
    ema.module = _module(inputs.teacher)  # it would start from a copy of the student
    return _then_copied(lambda: ema.update(student), inputs)


def _others(shape: Shape) -> dict[str, Variant | Function]:
    peers: dict[str, Variant | Function] = {"lightly": Variant(_lightly), "timm": Variant(_timm)}
    if shape.dtype == torch.float32:  # it raises on other students
        peers["torch._foreach_lerp_"] = Variant(_foreach_lerp)
    return peers


def _lerp_and_copy(teacher: Tensors, student: Tensors, copies: Tensors) -> Tensors:
    teacher[0].lerp_(student[0].float(), 1 - MOMENTUM)
    copies[0].copy_(teacher[0])
    return teacher


BENCH = Bench(
    name="ema_update_",
    # Number of tensors (1: a flat buffer, whose bf16 copy is written in the same pass) and of parameters; the student's
    # dtype. ViT-L, ViT-S, ViT-B, ViT-g; on a CPU a tenth of ViT-S.
    shapes={
        "cuda": [
            "1,304000000", "1,304000000,bf16", "294,304000000", "294,304000000,bf16", "150,22000000", "150,86000000",
            "490,1136000000",
        ],
        "cpu": ["150,2200000", "150,2200000,bf16", "1,2200000"],
    },
    make=_make,
    bytes=_bytes,
    ours=partial(_update, ema_update_),
    reference=partial(_update, ema_update_reference_),
    others=_others,
    # Over a list, compile takes minutes for what foreach already does in one pass.
    compiled=lambda shape: _lerp_and_copy if shape.sizes[0] == 1 else None,
)  # fmt: skip

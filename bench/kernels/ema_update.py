"""ema_update_: the teacher's update over all parameters, as a list of tensors and as one flat buffer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightly.models.utils import update_momentum
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import ema_update_
from fastdino_kernels.optim.ema_update import ema_update_reference_

MOMENTUM = 0.996
# Number of tensors (1: a flat buffer, whose bf16 copy is written in the same pass) and of parameters; the student's
# dtype. ViT-S, ViT-B, ViT-L, ViT-g; on a CPU a tenth of ViT-S.
SHAPES = {
    "cuda": [
        "150,22000000", "150,86000000", "294,304000000", "490,1136000000",
        "294,304000000,bf16", "1,304000000", "1,304000000,bf16",
    ],
    "cpu": ["150,2200000", "150,2200000,bf16", "1,2200000"],
}  # fmt: skip


class Inputs(NamedTuple):
    teacher: list[Tensor]
    student: list[Tensor]
    teacher_lp: list[Tensor] | None


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (count, parameters), dtype = parse_shape(shape)
    size = parameters // count // 16 * 16

    def make(seed: int) -> Inputs:
        random: dict[str, Any] = {"generator": generator(device, seed), "device": device}
        teacher = [torch.randn(size, **random) for _ in range(count)]
        student = [torch.randn(size, **random).to(dtype) for _ in range(count)]
        teacher_lp = [torch.empty(size, dtype=torch.bfloat16, device=device)] if count == 1 else None
        return Inputs(teacher, student, teacher_lp)

    variants = {OURS: Variant(_bind(ema_update_)), PLAIN: Variant(_bind(ema_update_reference_))}
    if dtype == torch.float32:  # it raises on other students
        variants["torch._foreach_lerp_"] = Variant(_foreach_lerp)
    variants |= {"lightly": Variant(_lightly), "timm": Variant(_timm)}
    if compiled and count == 1:  # over a list, compile takes minutes for what foreach already does in one pass
        variants["torch.compile"] = Variant(_compiled)
    num_bytes = count * size * (8 + dtype.itemsize + (2 if count == 1 else 0))
    return Case("ema_update_", shape, make, _exact, variants, num_bytes)


def _exact(inputs: Inputs) -> list[Tensor]:
    return [
        torch.lerp(t.double(), s.double(), 1 - MOMENTUM) for t, s in zip(inputs.teacher, inputs.student, strict=True)
    ]


def _call(inputs: Inputs, update: Callable[[], object], writes_copy: bool = False) -> Bound:
    """``update``, and where there is a rounded copy that it does not write, that copy."""

    def call() -> list[Tensor]:
        update()
        if inputs.teacher_lp is not None and not writes_copy:
            torch._foreach_copy_(inputs.teacher_lp, inputs.teacher)
        return inputs.teacher

    return call


def _bind(implementation: Callable[..., None]) -> Callable[[Inputs], Bound]:
    return lambda inputs: _call(
        inputs, lambda: implementation(inputs.teacher, inputs.student, MOMENTUM, inputs.teacher_lp), writes_copy=True
    )


def _foreach_lerp(inputs: Inputs) -> Bound:
    return _call(inputs, lambda: torch._foreach_lerp_(inputs.teacher, inputs.student, 1 - MOMENTUM))


def _module(tensors: list[Tensor]) -> nn.Module:
    return nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in tensors])


def _lightly(inputs: Inputs) -> Bound:
    student, teacher = _module(inputs.student), _module(inputs.teacher)
    return _call(inputs, lambda: update_momentum(student, teacher, MOMENTUM))


def _timm(inputs: Inputs) -> Bound:
    student = _module(inputs.student)
    ema = ModelEmaV3(_module(inputs.teacher[:1]), decay=MOMENTUM)
    ema.module = _module(inputs.teacher)  # it would start from a copy of the student
    return _call(inputs, lambda: ema.update(student))


@torch.compile(dynamic=False)
def _lerp_and_copy(teacher: Tensor, student: Tensor, teacher_lp: Tensor) -> None:
    teacher.lerp_(student.float(), 1 - MOMENTUM)
    teacher_lp.copy_(teacher)


def _compiled(inputs: Inputs) -> Bound:
    assert inputs.teacher_lp is not None
    teacher, student, teacher_lp = inputs.teacher[0], inputs.student[0], inputs.teacher_lp[0]
    return _call(inputs, lambda: _lerp_and_copy(teacher, student, teacher_lp), writes_copy=True)

"""linear_ibot_loss, forward and backward: features of masked patches, gradients for them and the prototypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.kernels import ibot_loss as ibot_bench
from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import ibot_loss, linear_ibot_loss
from fastdino_kernels.losses.linear_ibot_loss import linear_ibot_loss_reference

TEMPS = ibot_bench.TEMPS
SHAPES = {  # M, K, D
    "cuda": ["3764,65536,256,bf16", "12800,131072,256,bf16"],
    "cpu": ["1024,4096,256", "1024,4096,256,bf16"],
}


class Inputs(NamedTuple):
    student: Tensor  # (M, D), a leaf
    student_weight: Tensor  # (K, D), a leaf
    teacher: Tensor
    teacher_weight: Tensor
    center: Tensor
    weight: Tensor  # (M,)


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (M, K, D), dtype = parse_shape(shape)

    def make(seed: int) -> Inputs:
        random: dict[str, Any] = {"generator": generator(device, seed), "device": device}
        vectors = [torch.randn(rows, D, **random) for rows in (M, K, M, K)]
        student, student_weight, teacher, teacher_weight = (
            torch.nn.functional.normalize(x, dim=1).to(dtype) for x in vectors
        )
        weight = torch.full((M,), 1 / M, device=device)
        center = 0.1 * torch.randn(K, **random)
        leaves = student.requires_grad_(), student_weight.requires_grad_()
        return Inputs(*leaves, teacher, teacher_weight, center, weight)

    variants = {
        OURS: Variant(_bind(lambda *x: linear_ibot_loss(*x, **TEMPS))),
        PLAIN: Variant(_bind(_reference)),
        "linear, ibot_loss": Variant(_bind(_whole)),
        "formula": Variant(_bind(_formula)),
    }
    if compiled:
        variants["formula, torch.compile"] = Variant(_bind(torch.compile(_formula, dynamic=False)))
    # Both features and weights once, the two gradients; the products, not these bytes, set the pace.
    num_bytes = (3 * M + 3 * K) * D * dtype.itemsize + 4 * (K + M)
    return Case("linear_ibot_loss", shape, make, _exact, variants, num_bytes)


def _reference(*inputs: Tensor) -> Tensor:
    return linear_ibot_loss_reference(*inputs, **TEMPS)


def _logits(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
    return student @ student_weight.T, teacher @ teacher_weight.T


def _whole(*inputs: Tensor) -> Tensor:
    """All logits at once, their gradient over them."""
    return ibot_loss(*_logits(*inputs[:4]), *inputs[4:], **TEMPS, inplace_grad=True)


def _formula(*inputs: Tensor) -> Tensor:
    return ibot_bench.formula(*_logits(*inputs[:4]), *inputs[4:])


def _bind(implementation: Callable[..., Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            loss = implementation(*inputs)
            return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]

        return call

    return bind


def _exact(inputs: Inputs) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in inputs[:2]]
    loss = _reference(*leaves, *(x.double() for x in inputs[2:]))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

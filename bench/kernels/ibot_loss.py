"""ibot_loss, forward and backward: masked patches, the gradient for the student's logits."""

from functools import partial
from typing import Any, NamedTuple

import torch
from lightly.loss import IBOTPatchLoss
from torch import Tensor

from bench.kernels.case import LOGITS_STD, Bench, Bound, Function, Shape, Variant, with_gradients
from bench.kernels.dino_loss import refill
from bench.kernels.peers_triton import RowLoss, entropy, row_losses
from fastdino_kernels import ibot_loss
from fastdino_kernels.losses.ibot_loss import ibot_loss_reference

TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.04}
IMAGES = 4  # M is a multiple of it


class Inputs(NamedTuple):
    student: Tensor  # (M, K), a leaf
    teacher: Tensor
    center: Tensor
    weight: Tensor  # (M,), all equal


def _make(shape: Shape, seed: int) -> Inputs:
    (M, K), random = shape.sizes, shape.random(seed)
    student, teacher = ((LOGITS_STD * random(M, K)).to(shape.dtype) for _ in range(2))
    weight = torch.full((M,), 1 / M, device=shape.device)
    return Inputs(student.requires_grad_(), teacher, 0.1 * LOGITS_STD * random(K), weight)


def _bytes(shape: Shape) -> int:
    M, K = shape.sizes
    return 3 * M * K * shape.dtype.itemsize + 4 * (K + M)


def _others(shape: Shape) -> dict[str, Variant | Function]:
    peers = row_losses() if shape.device.type == "cuda" else {}
    return {"lightly": Variant(_lightly), **{name: divergence(loss) for name, loss in peers.items()}}


def _lightly(inputs: Inputs) -> Bound:
    """Under autocast where the logits are bf16; without its update of the center."""
    center = inputs.center
    loss = IBOTPatchLoss(len(center), **TEMPS).to(center.device)
    loss.center.center.copy_(center)
    loss.center.update = lambda x: None
    mask = torch.ones(IMAGES, 1, len(inputs.student) // IMAGES, dtype=torch.bool, device=center.device)

    def implementation(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=student.dtype == torch.bfloat16):
            return loss(teacher, student, mask)

    return with_gradients(implementation, ["student"])(inputs)


def divergence(kl: RowLoss) -> Variant:
    """A peer's KL(q || p), behind the softmaxes that it leaves to its user; weights are equal, so the mean is theirs.

    The teacher's entropy, by which the cross-entropy is larger, is added where it is judged, not where it is timed.
    """

    def implementation(student: Tensor, teacher: Tensor, center: Tensor, _: Tensor) -> Tensor:
        log_p = torch.log_softmax(student.float() / TEMPS["student_temp"], dim=-1)
        log_q = torch.log_softmax((teacher.float() - center) / TEMPS["teacher_temp"], dim=-1)
        return kl(log_p, log_q)

    def judge(inputs: Inputs, results: list[Tensor]) -> list[Tensor]:
        loss, grad = results
        return [loss + entropy(inputs.teacher, inputs.center, TEMPS["teacher_temp"]), grad]

    return Variant(with_gradients(implementation, ["student"]), judge=judge)


BENCH = Bench(
    name="ibot_loss",
    shapes={  # M, K
        "cuda": ["3736,65536,bf16", "4096,131072,bf16"],
        "cpu": ["64,4096", "64,4096,bf16", "512,16384", "512,16384,bf16"],
    },
    make=_make,
    bytes=_bytes,
    ours=partial(ibot_loss, **TEMPS, inplace_grad=True),
    reference=partial(ibot_loss_reference, **TEMPS),
    others=_others,
    leaves=("student",),
    restore=refill,
)

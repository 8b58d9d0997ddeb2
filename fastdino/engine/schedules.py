"""Every number that changes with the step, as pure functions of the step: DINO's schedules, v1 and v2."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdino.config import Config


@dataclass(frozen=True)
class Now:
    """Hyperparameters of one optimizer step; numbers, or 0-d fp64 tensors on the device for a step that is captured."""

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float | Tensor
    """Weight of the teacher's old value."""
    teacher_temp: float | Tensor
    freeze_last_layer: bool
    """The prototypes do not move in this step."""

    NUMBERS: ClassVar = ("lr", "weight_decay", "momentum", "teacher_temp")


def cosine(start: float, end: float, index: int, count: int) -> float:
    """Value ``index`` of ``count`` along half a cosine from ``start`` to ``end``, which index ``count`` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * index / count))


class Schedules:
    """``schedules(step) -> Now`` for steps 0 to epochs * steps_per_epoch - 1; the last values hold beyond.

    The peak learning rate is ``optim.lr`` times global_batch / 256, or times sqrt(global_batch / 1024). It is reached
    linearly from 0 over the warm-up, whose last step already has it, and the step after the warm-up has it again: there
    a cosine begins to ``optim.min_lr``, which is not scaled. Weight decay and momentum are cosines without warm-up.
    With ``optim.schedule="constant"`` all three stay where the cosines begin.

    The teacher's temperature rises linearly, once per epoch as in DINO v1 or at each step as in DINOv2; the last of the
    warm-up's epochs, or steps, has ``loss.teacher_temp``. The rest is the same in both.
    Source: Caron et al. 2021, their main_dino.py; Oquab et al. 2023, their CosineScheduler.
    """

    def __init__(self, config: Config, steps_per_epoch: int, global_batch: int) -> None:
        optim = config.optim
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = config.run.epochs * steps_per_epoch
        self.warmup_steps = int(optim.warmup_epochs * steps_per_epoch)
        self.frozen_steps = round(optim.freeze_last_layer * steps_per_epoch)
        scale = global_batch / 256 if optim.lr_rule == "linear_256" else math.sqrt(global_batch / 1024)
        self.peak_lr = optim.lr * scale

    def __call__(self, step: int) -> Now:
        optim = self.config.optim
        index = min(step, self.num_steps - 1)
        return Now(
            lr=self._lr(index),
            weight_decay=self._along(optim.weight_decay, optim.weight_decay_end, index, self.num_steps),
            momentum=self._along(optim.teacher_momentum, optim.teacher_momentum_end, index, self.num_steps),
            teacher_temp=self._teacher_temp(step),
            freeze_last_layer=step < self.frozen_steps,
        )

    def _along(self, start: float, end: float, index: int, count: int) -> float:
        return start if self.config.optim.schedule == "constant" else cosine(start, end, index, count)

    def _lr(self, index: int) -> float:
        if index >= self.warmup_steps:
            done = index - self.warmup_steps
            return self._along(self.peak_lr, self.config.optim.min_lr, done, self.num_steps - self.warmup_steps)
        return self.peak_lr * index / max(self.warmup_steps - 1, 1)

    def _teacher_temp(self, step: int) -> float:
        loss = self.config.loss
        steps = 1 if loss.temp_warmup_by == "step" else self.steps_per_epoch  # between two values
        index, count = step // steps, round(loss.warmup_teacher_temp_epochs * self.steps_per_epoch / steps)
        if index >= count:
            return loss.teacher_temp
        return loss.warmup_teacher_temp + index / max(count - 1, 1) * (loss.teacher_temp - loss.warmup_teacher_temp)

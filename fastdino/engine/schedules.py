"""Every number that changes with the step, as pure functions of the step: DINO v1's schedules."""

import math
from dataclasses import dataclass

from fastdino.config import Config


@dataclass(frozen=True)
class Now:
    """Hyperparameters of one optimizer step."""

    lr: float
    weight_decay: float
    momentum: float
    """Weight of the teacher's old value."""
    teacher_temp: float
    freeze_last_layer: bool
    """The prototypes do not move in this step."""


def cosine(start: float, end: float, index: int, count: int) -> float:
    """Value ``index`` of ``count`` along half a cosine from ``start`` to ``end``, which index ``count`` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * index / count))


class Schedules:
    """``schedules(step) -> Now`` for steps 0 to epochs * steps_per_epoch - 1; the last values hold beyond.

    The learning rate is ``optim.lr * global_batch / 256``: linear from 0 over the warm-up, whose last step already has
    the peak, then a cosine to ``optim.min_lr``, which is not scaled. Weight decay and momentum are cosines without
    warm-up. The teacher's temperature changes once per epoch. Source: Caron et al. 2021, their main_dino.py.
    """

    def __init__(self, config: Config, steps_per_epoch: int, global_batch: int) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = config.run.epochs * steps_per_epoch
        self.warmup_steps = int(config.optim.warmup_epochs * steps_per_epoch)
        self.peak_lr = config.optim.lr * global_batch / 256

    def __call__(self, step: int) -> Now:
        optim, epoch = self.config.optim, step // self.steps_per_epoch
        index = min(step, self.num_steps - 1)
        return Now(
            lr=self._lr(index),
            weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, index, self.num_steps),
            momentum=cosine(optim.teacher_momentum, optim.teacher_momentum_end, index, self.num_steps),
            teacher_temp=self._teacher_temp(epoch),
            freeze_last_layer=epoch < optim.freeze_last_layer,
        )

    def _lr(self, index: int) -> float:
        if index >= self.warmup_steps:
            done = index - self.warmup_steps
            return cosine(self.peak_lr, self.config.optim.min_lr, done, self.num_steps - self.warmup_steps)
        return self.peak_lr * index / max(self.warmup_steps - 1, 1)

    def _teacher_temp(self, epoch: int) -> float:
        loss = self.config.loss
        if epoch >= loss.warmup_teacher_temp_epochs:
            return loss.teacher_temp
        share = epoch / max(loss.warmup_teacher_temp_epochs - 1, 1)
        return loss.warmup_teacher_temp + share * (loss.teacher_temp - loss.warmup_teacher_temp)

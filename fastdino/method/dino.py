"""DINO: the student predicts the output of its own moving-average teacher from other views of the same image.

Read this first. B images per rank, S student views, T = 2 teacher views (the global ones), K prototypes, D features.
Source: Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, equation 1 and algorithm 1.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import LossConfig
from fastdino.data import Batch
from fastdino.engine.schedules import Now
from fastdino.method.targets import Target
from fastdino.model import Outputs
from fastdino_kernels import dino_loss


class Dino:
    """One step of the method: which network sees which views, and what their outputs cost.

    Args:
        student: a :class:`fastdino.model.Network`, or what an engine wraps around one.
        teacher: the same with the moving-average weights; takes no gradient.
        config: temperatures.
        target: makes the center of the teacher's logits.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: LossConfig, target: Target) -> None:
        self.student, self.teacher, self.config, self.target = student, teacher, config, target
        self._newest: _Targets | None = None

    def loss(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro batch, an fp32 scalar with gradient, and its parts by name without.

        ``dino``: mean cross-entropy over pairs of a teacher view and another student view.

        Args:
            batch: its views are normalised: ``global`` (2, B, 3, G, G), and ``local`` (L, B, 3, l, l) if there are any.
            now: the schedules' values at this step.
        """
        with torch.no_grad():
            seen: Outputs = self.teacher({"global": batch.views["global"]})
            center = self.target(seen.cls_points.flatten(0, 1), seen.prototypes, now.teacher_temp)
            logits = F.linear(seen.cls_points, seen.prototypes)
            self._newest = _Targets(seen.cls, logits, center, now.teacher_temp)
        made: Outputs = self.student(batch.views)
        dino = dino_loss(
            F.linear(made.cls_points, made.prototypes),
            logits,
            center,
            student_temp=self.config.student_temp,
            teacher_temp=now.teacher_temp,
            inplace_grad=True,  # nobody else reads the student's logits
        )
        return dino, {"dino": dino.detach()}

    def after_step(self, applied: Tensor) -> None:
        """Called once per optimizer step; ``applied``, 0-d bool on the device, is False when the step was skipped."""
        self.target.after_step(applied)
        self._newest = None  # its center has moved

    def state(self) -> dict[str, Tensor]:
        """Live tensors, equal on all ranks, that a checkpoint saves and restores by name."""
        return self.target.state()

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """What tells learning from collapse, of the newest :meth:`loss`, as 0-d fp32 tensors on the device.

        Called between the loss and :meth:`after_step`, so it sees the targets that the loss has used.

        ``teacher_entropy``: mean entropy in nats of one view's target (0: all on one prototype; ln K: uniform).
        ``kl_to_uniform``: ln K less that. ``usage_entropy``: entropy of the mean target over the batch (0: all views
        share one prototype). ``center_norm``. ``feature_std``: deviation over the batch of the normalised features
        times sqrt(D): about 1 for directions spread at random, 0 for one point.
        """
        assert self._newest is not None, "statistics are of a loss, before its step"
        features, logits, center, temp = self._newest
        log_p = torch.log_softmax((logits.float() - center) / temp, dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        mean_p = p.flatten(0, 1).mean(0)
        unit = F.normalize(features.flatten(0, 1).float(), dim=-1)
        return {
            "teacher_entropy": entropy,
            "kl_to_uniform": math.log(logits.shape[-1]) - entropy,
            "usage_entropy": -torch.special.xlogy(mean_p, mean_p).sum(),
            "center_norm": center.norm(),
            "feature_std": unit.std(0, correction=0).mean() * math.sqrt(features.shape[-1]),
        }


class _Targets(NamedTuple):
    """What the newest loss was asked to predict."""

    features: Tensor  # (T, B, D) of the teacher
    logits: Tensor  # (T, B, K)
    center: Tensor  # (K,)
    temp: float

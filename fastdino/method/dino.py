"""DINO: the student predicts the output of its own moving-average teacher from other views of the same image.

Read this first. B images per rank, S student views, T = 2 teacher views (the global ones), K prototypes, D features.
Source: Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, equation 1 and algorithm 1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import LossConfig
from fastdino.distributed import Ranks
from fastdino_kernels import center_mean, dino_loss


class Dino:
    """One step of the method: the loss of the views, and the center that keeps the teacher from collapsing.

    Args:
        student: called with groups of views, returns logits (S, B, K); may be what an engine wraps around a Network.
        teacher: a :class:`fastdino.model.Network` with the moving-average weights; takes no gradient.
        config: temperatures and the center's momentum.
        center: (K,) fp32 running mean of teacher logits, updated in place.
        ranks: whose mean moves the center.
        accumulate: calls of :meth:`loss` per step; the center moves once, by the mean over all of them.
    """

    def __init__(
        self, student: nn.Module, teacher: Any, config: LossConfig, center: Tensor, ranks: Ranks, accumulate: int = 1
    ) -> None:
        self.student, self.teacher, self.config, self.center = student, teacher, config, center
        self.ranks, self.accumulate = ranks, accumulate
        self._newest: tuple[Tensor, Tensor] | None = None  # features (T, B, D), logits (T, B, K) of the teacher
        self._mean = torch.zeros_like(center)  # of teacher logits over the calls of this step
        self._calls = 0
        self._prototypes: Tensor | None = None  # the teacher's, normalised once for all calls of this step
        self._reduction: Any = None

    def loss(self, groups: list[Tensor], teacher_temp: float) -> Tensor:
        """Mean cross-entropy over pairs of a teacher view and another student view; fp32 scalar with gradient.

        Args:
            groups: views of equal size together: global (2, B, 3, G, G), then local (L, B, 3, l, l) if there are any.
            teacher_temp: temperature of the teacher at this step.
        """
        with torch.no_grad():
            features = self.teacher.features(groups[:1])
            if self._calls == 0:
                self._prototypes = self.teacher.head.prototypes()
            logits = self.teacher.head(features, self._prototypes)
            self._newest = features, logits
            self._observe(logits)
        return dino_loss(
            self.student(groups),
            logits,
            self.center,
            student_temp=self.config.student_temp,
            teacher_temp=teacher_temp,
            inplace_grad=True,  # nobody else reads the student's logits
        )

    def _observe(self, teacher_logits: Tensor) -> None:
        """Adds to the step's mean; after the last call its reduction over ranks starts, hidden behind the student."""
        self._mean.add_(center_mean(teacher_logits), alpha=1 / self.accumulate)
        self._calls += 1
        if self._calls == self.accumulate:
            self._reduction = self.ranks.mean_(self._mean, async_op=True)

    def update_center(self, finite: Tensor) -> None:
        """Moves the center once per step, after the loss has used the old one (algorithm 1).

        Args:
            finite: 0-d bool on the device; False leaves the center as it was, with no read on the host.
        """
        assert self._calls == self.accumulate, f"{self._calls} losses in a step of {self.accumulate}"
        if self._reduction is not None:
            self._reduction.wait()
        moved = torch.lerp(self._mean, self.center, self.config.center_momentum)
        self.center.copy_(torch.where(finite, moved, self.center))
        self._mean.zero_()
        self._calls, self._reduction, self._prototypes = 0, None, None

    @torch.no_grad()
    def statistics(self, teacher_temp: float) -> dict[str, Tensor]:
        """What tells learning from collapse, of the newest :meth:`loss`, as 0-d fp32 tensors on the device.

        ``teacher_entropy``: mean entropy in nats of one view's target (0: all on one prototype; ln K: uniform).
        ``kl_to_uniform``: ln K less that. ``usage_entropy``: entropy of the mean target over the batch (0: all views
        share one prototype). ``center_norm``. ``feature_std``: deviation over the batch of the normalised features
        times sqrt(D): about 1 for directions spread at random, 0 for one point.
        """
        assert self._newest is not None, "statistics are of a loss: call that first"
        features, logits = self._newest
        log_p = torch.log_softmax((logits.float() - self.center) / teacher_temp, dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1).mean()
        mean_p = p.flatten(0, 1).mean(0)
        unit = F.normalize(features.flatten(0, 1).float(), dim=-1)
        return {
            "teacher_entropy": entropy,
            "kl_to_uniform": math.log(logits.shape[-1]) - entropy,
            "usage_entropy": -torch.special.xlogy(mean_p, mean_p).sum(),
            "center_norm": self.center.norm(),
            "feature_std": unit.std(0, correction=0).mean() * math.sqrt(features.shape[-1]),
        }

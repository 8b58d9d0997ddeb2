"""What the student is asked to predict: softmax((teacher logits - center) / temperature), with a center per target."""

import logging
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import Config, ConfigError, HeadConfig
from fastdino.data.masks import num_hidden
from fastdino.distributed import Ranks
from fastdino_kernels import sinkhorn

log = logging.getLogger(__name__)


class Target(Protocol):
    """Makes the center of a micro batch; K prototypes, R rows of points of width P."""

    def __call__(self, points: Tensor, prototypes: Tensor, temp: float | Tensor) -> Tensor:
        """The teacher's (R, P) points and (K, P) prototypes -> (K,) fp32 center that the loss subtracts."""

    def after_step(self, applied: Tensor) -> None:
        """Called once per step; ``applied``, 0-d bool on the device, is False for a step that was skipped."""

    def abandon(self) -> None:
        """Forgets the calls of a step that is not taken."""

    def state(self) -> dict[str, Tensor]:
        """Live tensors, equal on all ranks, that a checkpoint needs."""


class Centering:
    """The running mean of the teacher's logits over steps, which keeps one prototype from winning everything.

    Logits are linear in the points, so their mean is ``prototypes @ mean(points)``: P numbers are reduced over the
    ranks rather than K, and no logit is read. Source: Caron et al. 2021, equation 4.

    Args:
        num_prototypes: K.
        momentum: weight of the old center.
        accumulate: calls per step; the center moves once, by the mean over all of them.
        ranks: the mean is over their points, too.
    """

    def __init__(self, num_prototypes: int, momentum: float, accumulate: int, ranks: Ranks) -> None:
        self.center = torch.zeros(num_prototypes, device=ranks.device)
        self.momentum, self.accumulate, self.ranks = momentum, accumulate, ranks
        self._mean: Tensor | None = None  # (P,) of the points over the calls of this step
        self._prototypes: Tensor | None = None
        self._calls = 0
        self._reduction: dist.Work | None = None

    def __call__(self, points: Tensor, prototypes: Tensor, temp: float | Tensor) -> Tensor:
        """The center from before this step; after the last call the reduction starts, hidden behind the student."""
        mean = points.float().mean(0) / self.accumulate
        self._mean = mean if self._mean is None else self._mean + mean
        self._prototypes = prototypes
        self._calls += 1
        if self._calls == self.accumulate:
            self._reduction = self.ranks.mean_(self._mean, async_op=True)
        return self.center

    def after_step(self, applied: Tensor) -> None:
        """Moves the center, after the loss has used the old one (algorithm 1)."""
        assert self._calls == self.accumulate, f"{self._calls} losses in a step of {self.accumulate}"
        assert self._mean is not None
        assert self._prototypes is not None
        if self._reduction is not None:
            self._reduction.wait()
        moved = torch.lerp(self._prototypes.float() @ self._mean, self.center, self.momentum)
        self.center.copy_(torch.where(applied, moved, self.center))
        self.abandon()

    def abandon(self) -> None:
        """Forgets the means of the calls since the last step."""
        self._calls, self._mean, self._prototypes, self._reduction = 0, None, None, None

    def state(self) -> dict[str, Tensor]:
        """The center."""
        return {"center": self.center}


class Sinkhorn:
    """The center with which the samples of all ranks use every prototype equally, solved anew at each call.

    Rows are samples, columns prototypes: each iteration makes the columns' sums equal, then the rows'. What scales a
    row is the softmax's own denominator, so what scales the columns is all that a loss needs. With accumulation every
    micro batch is balanced on its own. Source: Caron et al. 2020 (SwAV); DINOv2 (Oquab et al. 2024).

    Args:
        ranks: the samples are theirs together.
    """

    ITERATIONS = 3

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, points: Tensor, prototypes: Tensor, temp: float | Tensor) -> Tensor:
        """-temp times the columns' scaling; each iteration reduces K numbers over the ranks."""
        logits = F.linear(points, prototypes)
        _, column = sinkhorn(logits, temp=temp, iterations=self.ITERATIONS, all_reduce=self.ranks.logsumexp)
        return -temp * column

    def after_step(self, applied: Tensor) -> None:
        """Nothing is remembered."""

    def abandon(self) -> None:
        """Nothing is remembered."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def build_targets(config: Config, ranks: Ranks) -> tuple[Target, Target | None]:
    """The target of views and, if patches are predicted, that of patches: two centers even when they share a head.

    Raises ConfigError for Sinkhorn over so few samples that it has nothing to balance.
    """
    loss, views = config.loss, config.views

    def build(setting: str, head: HeadConfig, num_samples: int) -> Target:
        if getattr(loss, setting) == "center":
            return Centering(head.num_prototypes, loss.center_momentum, config.engine.accumulate, ranks)
        _check_samples(setting, num_samples, ranks)
        return Sinkhorn(ranks)

    num_views = 2 * config.run.local_batch * ranks.world_size
    target = build("targets", config.head, num_views)
    if not loss.patch_weight:
        return target, None
    side = views.global_size // config.model.patch_size
    num_patches = num_hidden(config.run.local_batch, views, (side, side)) * ranks.world_size
    setting = "patch_targets" if loss.patch_targets else "targets"
    return target, build(setting, config.patch_head or config.head, num_patches)


def _check_samples(setting: str, num_samples: int, ranks: Ranks) -> None:
    """A target is one sample's share of all prototypes' use, so among n samples it can tell at most ln n nats."""
    said = f"loss.{setting}=sinkhorn balances {num_samples} samples of a micro batch over all ranks"
    remedy = f"raise run.local_batch or take more ranks, or use loss.{setting}=center"
    if num_samples < 8:
        raise ConfigError(f"{said}, too few to tell anything apart: {remedy}")
    if num_samples < 64 and ranks.is_main:
        log.warning("%s, which is few: %s", said, remedy)

"""What the student is asked to predict: softmax((teacher logits - center) / temperature), with a center per target."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.distributed import Ranks


class Target(Protocol):
    """Makes the center of a micro batch; K prototypes, R rows of points of width P."""

    def __call__(self, points: Tensor, prototypes: Tensor, temp: float) -> Tensor:
        """The teacher's (R, P) points and (K, P) prototypes -> (K,) fp32 center that the loss subtracts."""

    def after_step(self, applied: Tensor) -> None:
        """Called once per step; ``applied``, 0-d bool on the device, is False for a step that was skipped."""

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

    def __call__(self, points: Tensor, prototypes: Tensor, temp: float) -> Tensor:
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
        self._calls, self._mean, self._prototypes, self._reduction = 0, None, None, None

    def state(self) -> dict[str, Tensor]:
        """The center."""
        return {"center": self.center}

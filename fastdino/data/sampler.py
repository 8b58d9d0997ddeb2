"""Which image comes when: a pure function of seed and step, so that a run resumes exactly with no state to save."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastdino.config import ConfigError
from fastdino.data.draws import Purpose, random_bits

Key = tuple[int, int]  # (epoch, index of the image): what a worker needs to make an image's views


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """(num_images,) int64, a random permutation: the order of the images in ``epoch``."""
    order = np.argsort(random_bits(Purpose.ORDER, seed, epoch, 0, num_images), kind="stable")
    order.setflags(write=False)  # the cache hands out this very array
    return order


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the images of an epoch are dealt to steps, micro batches and ranks.

    Step s of an epoch takes positions ``[s * global_batch, (s + 1) * global_batch)`` of the epoch's order, its micro
    batch j the j-th ``world_size * local_batch`` of them, rank r the r-th ``local_batch`` of those. So a step trains on
    the same images however a global batch is split. A step lies within one epoch: what does not fill a global batch is
    left out, as in DINO v1.

    Raises ConfigError when the images do not fill one global batch.
    """

    num_images: int
    local_batch: int
    world_size: int = 1
    accumulate: int = 1
    seed: int = 0
    order: Callable[[int, int], np.ndarray] | None = None
    """(seed, epoch) -> (num_images,) int64, the order of an epoch; None: a random permutation of the images."""

    def __post_init__(self) -> None:
        if self.num_images < self.global_batch:
            raise ConfigError(
                f"{self.num_images} images do not fill one global batch of {self.global_batch} "
                f"(run.local_batch={self.local_batch} * {self.world_size} ranks * engine.accumulate={self.accumulate}):"
                f" lower run.local_batch or engine.accumulate, or train on more images"
            )

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all ranks."""
        return self.local_batch * self.world_size * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, at least 1."""
        return self.num_images // self.global_batch

    def micro_batch(self, step: int, micro: int, rank: int) -> list[Key]:
        """The ``local_batch`` images of a micro batch of ``step``, counted from the run's start, on ``rank``."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.global_batch + (micro * self.world_size + rank) * self.local_batch
        order = self.order(self.seed, epoch) if self.order else epoch_order(self.seed, epoch, self.num_images)
        return [(epoch, index) for index in order[start : start + self.local_batch].tolist()]

    def micro_batches(self, rank: int, start_step: int) -> Iterator[list[Key]]:
        """Every micro batch of ``rank`` from ``start_step`` on, without end."""
        step = start_step
        while True:
            for micro in range(self.accumulate):
                yield self.micro_batch(step, micro, rank)
            step += 1

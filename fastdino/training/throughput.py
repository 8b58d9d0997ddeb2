"""How fast a recipe trains on this machine, and whether the input pipeline or the step holds it back."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdino import distributed
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.data.workers import affordable
from fastdino.training.trainer import Trainer

WARMUP_STEPS = 3
SECONDS = 20.0  # at least three steps, then until this much time has passed


@dataclass(frozen=True)
class Throughput:
    """Images per second over all ranks."""

    training: float
    """The real thing: input pipeline and step together."""
    step: float
    """The step alone, on views that are already on the device."""
    pipeline: float
    """The input pipeline alone, nothing consuming it."""
    num_workers: int
    """Workers per rank that the pipeline had; 0 worked in the training process."""
    peak_memory_gb: float
    """Largest allocation on the device, in 1e9 bytes; 0 on a CPU, where it is not counted."""

    @property
    def workers_needed(self) -> int:
        """Workers per rank with which the pipeline would keep up with the step, if each does what one does now."""
        return math.ceil(self.step / (self.pipeline / max(self.num_workers, 1)))

    def table(self) -> str:
        """The figures in a few lines, with what to do."""
        lines = [
            f"training           {self.training:10.1f} images/s",
            f"step alone         {self.step:10.1f} images/s",
            f"pipeline alone     {self.pipeline:10.1f} images/s with {self.num_workers} workers per rank",
            f"peak device memory {self.peak_memory_gb:10.2f} GB",
        ]
        if self.pipeline < self.step:
            lines.append(
                f"the pipeline holds the step back: it needs --data.num-workers {self.workers_needed} and as many cores"
            )
        else:
            lines.append("the pipeline keeps up with the step")
        return "\n".join(lines)


def measure(config: Config) -> Throughput:
    """Trains for about a minute; nothing is kept.

    Every rank calls it, under any launcher. Raises what :func:`fastdino.training.trainer.train` raises.
    """
    with distributed.init(config.engine.device) as ranks:
        trainer = Trainer(config, ranks)

        def fetch() -> list[Batch]:
            return [next(trainer.batches) for _ in range(config.engine.accumulate)]

        training = _rate(lambda: trainer.train_step(fetch()), trainer)
        views = fetch()
        step = _rate(lambda: trainer.train_step(views), trainer)
        pipeline = _rate(fetch, trainer)
        memory = torch.cuda.max_memory_allocated() / 1e9 if ranks.device.type == "cuda" else 0.0
        return Throughput(training, step, pipeline, affordable(config.data.num_workers), memory)


def _rate(work: Callable[[], object], trainer: Trainer) -> float:
    """Images per second of ``work``, which handles one global batch."""
    for _ in range(WARMUP_STEPS):
        work()
    _wait(trainer)
    started, steps = time.perf_counter(), 0
    while steps < 3 or trainer.ranks.any(time.perf_counter() - started < SECONDS):
        work()
        steps += 1
    _wait(trainer)
    return steps * trainer.global_batch / (time.perf_counter() - started)


def _wait(trainer: Trainer) -> None:
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.ranks.barrier()

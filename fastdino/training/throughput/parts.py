"""Where the time of a step goes: the parts of a step as ranges, of a stopwatch or of a trace.

The trainer is watched from outside. It runs the code of any run, but for a function around each part.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from fastdino.data import Batch
from fastdino.training.throughput.timing import wait
from fastdino.training.trainer import Trainer

PARTS = {
    "data": "images and their copy to the device",
    "teacher": "",
    "student forward": "",
    "losses": "logits, centers and losses",
    "backward": "",
    "optimizer and EMA": "",
    "communication": "waiting for other ranks included",
    "other": "normalising views",
}
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "alltoall", "alltoall_base",
)  # fmt: skip
TRACED_STEPS = 3

Range = Callable[[str], AbstractContextManager[Any]]
"""Of a part's name: what is entered before it and left after it."""


class Stopwatch:
    """Seconds by part. Within a part that lies in another, time goes to the inner one alone.

    The device is waited for at both ends of each, so nothing of one part runs beside another.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._open, self._since = device, list[str](), 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The range of a part."""
        self._lap()
        self._open.append(part)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        wait(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def in_ranges(trainer: Trainer, in_range: Range, finish: Callable[[dist.Work], object]) -> Iterator[None]:
    """Within it each part of the trainer's steps runs in its range, also of a trainer that would replay a graph of all.

    Args:
        finish: called with what a collective has begun, within its range.
    """
    engine, method = trainer.engine, trainer.method
    places = [
        (trainer, "train_step", "other"),
        (engine.teacher, "forward", "teacher"),
        (engine.student, "forward", "student forward"),
        (method, "loss", "losses"),
        (method, "after_step", "losses"),
        (engine, "backward", "backward"),
        (engine, "step", "optimizer and EMA"),
        *((dist.ProcessGroup, collective, "communication") for collective in COLLECTIVES),
    ]

    def within(original: Callable[..., Any], part: str) -> Callable[..., Any]:
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with in_range(part):
                done = original(*args, **kwargs)
                if part == "communication":
                    finish(done)
                return done

        return ranged

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "_take", trainer._update))
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, within(getattr(owner, name), part)))
        yield


def breakdown(trainer: Trainer, fetch: Callable[[], list[Batch]], steps: int) -> dict[str, float]:
    """Seconds of a step by part, a mean over steps and ranks; the names are those of PARTS.

    Every rank calls it with as many ``steps``. Collectives are waited for where they begin.
    """
    watch = Stopwatch(trainer.ranks.device)
    with in_ranges(trainer, watch, lambda work: work.wait()):
        for _ in range(steps):
            with watch("data"):
                batches = fetch()
            trainer.train_step(batches)
    found = trainer.ranks.gather(dict(watch.seconds))
    return {part: sum(seconds.get(part, 0.0) for seconds in found) / len(found) / steps for part in PARTS}


def trace(trainer: Trainer, fetch: Callable[[], list[Batch]], path: Path) -> None:
    """Writes a trace of a few steps, with the parts as ranges, for Perfetto or chrome://tracing; of rank 0.

    Every rank calls it. Nothing waits, so a part's kernels may run after its range.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.ranks.device.type == "cuda")
    profiler = profile(activities=activities, acc_events=True)
    with profiler, in_ranges(trainer, record_function, lambda _: None):
        for _ in range(TRACED_STEPS):
            with record_function("data"):
                batches = fetch()
            trainer.train_step(batches)
        wait(trainer.ranks.device)
    if trainer.ranks.is_main:
        profiler.export_chrome_trace(str(path))

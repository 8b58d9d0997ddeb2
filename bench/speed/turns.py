"""How pytest-benchmark times a case here: on the device's clock, in turns with what its ratios are taken of."""

import gc
import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch

from bench.kernels.case import OURS, first_line
from bench.timing import Clock, Moment, Work, paired_ratio

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARMUP = 3  # calls
MOST_ROUNDS = 200
Seconds = dict[str, list[float]]


def device_seconds() -> float | Moment:
    """pytest-benchmark's timer.

    On a GPU the difference of two waits until the work between them is done, and is the GPU's own time. On a CPU it is
    the processor's time, in which waiting for other programs does not count.
    """
    return Moment() if DEVICE.type == "cuda" else time.process_time()


@dataclass
class Turns:
    """Times one case by pytest-benchmark.

    Attributes:
        benchmark: its fixture, whose ``extra_info`` says what the case is.
        alternatives: of the whole session, by group and name, how many times as long as ours each takes.
    """

    benchmark: Any
    max_time: float
    min_rounds: int
    alternatives: dict[str, dict[str, Any]]

    def begin(self, group: str, name: str) -> None:
        """Puts the case into a group: pytest-benchmark shows those of one group side by side."""
        self.benchmark.group = group
        self.benchmark.extra_info.update(variant=name, device=str(DEVICE))

    def __call__(self, name: str, works: dict[str, Work], clock: Clock, *, hide_launches: bool = True) -> Seconds:
        """pytest-benchmark times ``works[name]``; right before each of its rounds ``clock`` times each other one.

        As many rounds as fit into --benchmark-max-time with the others in it, but --benchmark-min-rounds at least.

        Returns the seconds of each work in every round. Under --benchmark-disable it runs once: nothing is returned.
        """
        if self.benchmark.disabled:
            self.benchmark.pedantic(works[name].run, args=(0,))
            return {}
        host, rounds = self._warm_up(works, clock, hide_launches)
        others: Seconds = {other: [] for other in works if other != name}
        order = itertools.count()

        def setup() -> tuple[tuple[int], dict[str, Any]]:
            index = next(order)
            for other, series in others.items():
                series.append(clock(partial(works[other].run, index), host[other]))
                works[other].after(index)
            clock.pause(host[name])
            return (index,), {}

        self.benchmark.pedantic(works[name].run, setup=setup, teardown=works[name].after, rounds=rounds)
        return self.end(name, others)

    def end(self, name: str, others: Seconds) -> Seconds:
        """``others`` and what pytest-benchmark has timed beside them; the ratio to ours goes into extra_info."""
        timed = self.benchmark.stats["data"]
        seconds = {other: series[: len(timed)] for other, series in others.items()}  # --benchmark-cprofile calls more
        seconds[name] = timed
        info, alternatives = self.benchmark.extra_info, self.alternatives.setdefault(self.benchmark.group, {})
        if name == OURS:
            info["alternatives"] = alternatives  # those that come later enter it
        else:
            info["times_ours"] = alternatives[name] = asdict(paired_ratio(timed, seconds[OURS]))
        return seconds

    def _warm_up(self, works: dict[str, Work], clock: Clock, hide_launches: bool) -> tuple[dict[str, float], int]:
        """The host's seconds to queue each work, 0 where launches count; and the rounds that there is time for."""
        host, turn = {}, 0.0
        for name, work in works.items():
            for index in range(WARMUP):
                seconds = clock.host_seconds(partial(work.run, index))
                work.after(index)
            host[name] = seconds if hide_launches else 0.0
            turn += max(seconds, clock(partial(work.run, WARMUP)))
            work.after(WARMUP)
        return host, max(self.min_rounds, min(MOST_ROUNDS, int(self.max_time / turn)))


@contextmanager
def room(name: str) -> Iterator[None]:
    """Skips what does not fit into the device's memory, if it is not ours."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        if name == OURS:
            raise
        why = first_line(error)
    gc.collect()
    torch.cuda.empty_cache()
    pytest.skip(f"{name} does not fit: {why}")


def label(name: str) -> str:
    """A name as part of a case's id, without spaces: ``fastdino, torch engine`` is ``fastdino,torch_engine``."""
    return re.sub(r"\s*([,+])\s*|\s+", lambda match: match[1] or "_", name)

"""Times alternatives against each other: interleaved round by round, judged by the median of paired ratios."""

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, with the bootstrap's 95 % interval of that median."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratio of two series whose entries were measured one right after the other."""
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def unpaired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratio of the medians of two series that were measured one after the other: a drift between them is in it."""
    random = np.random.default_rng(0)
    series = [np.asarray(x, dtype=np.float64) for x in (numerator, denominator)]
    above, below = (np.median(x[random.integers(0, len(x), (RESAMPLES, len(x)))], axis=1) for x in series)
    low, high = np.quantile(above / below, [0.025, 0.975])
    return Ratio(float(np.median(series[0]) / np.median(series[1])), float(low), float(high))


class Moment:
    """A point in the GPU's queue. The difference of two are the seconds between them, once the GPU has passed both."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) * 1e-3


class Clock:
    """Seconds that a piece of work takes on the device.

    On a CPU: the processor's time, in which waiting for other programs does not count; use one thread. On a GPU: the
    device's own time, when work is queued behind a pause that covers the host's time to queue it, so that the gaps
    between launches do not count. What launching costs shows in :meth:`host_seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            for cycles in (10**6, 10**7):  # the first one warms up
                self._cycles_per_second = cycles / self._on_gpu(lambda n=cycles: torch.cuda._sleep(n))  # type: ignore[misc]

    def __call__(self, work: Callable[[], object], host_seconds: float = 0.0) -> float:
        """Seconds of ``work``; ``host_seconds`` is what the host needs to queue it, 0 to let launches count."""
        if self.device.type == "cuda":
            return self._on_gpu(work, host_seconds)
        started = time.process_time()
        work()
        return time.process_time() - started

    def host_seconds(self, work: Callable[[], object]) -> float:
        """Seconds until the host has queued ``work`` on an idle device; on a CPU, all of it."""
        self.synchronize()
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        self.synchronize()
        return seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def pause(self, host_seconds: float) -> None:
        """Waits for a GPU, then queues a pause that covers ``host_seconds``, if there are any; on a CPU nothing."""
        self.synchronize()
        if self.device.type == "cuda" and host_seconds:
            torch.cuda._sleep(int(self._cycles_per_second * (1.5 * host_seconds + 20e-6)))

    def _on_gpu(self, work: Callable[[], object], host_seconds: float = 0.0) -> float:
        self.pause(host_seconds)
        start = Moment()
        work()
        return Moment() - start


WARM_UP = 3  # rounds before those that count


@dataclass(frozen=True)
class Work:
    """What one variant runs in round ``index``; ``after`` it, untimed, whatever makes its inputs fit for use again."""

    run: Callable[[int], object]
    after: Callable[[int], object] = lambda index: None


def interleave(
    works: dict[str, Work],
    rounds: int,
    clock: Clock,
    warmup: int = WARM_UP,
    hide_launches: bool = True,
    after_round: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every variant in every round; and the host's seconds to queue each.

    A round runs every variant once, in an order that is drawn anew, so that none always follows the same other.

    Args:
        warmup: rounds that are not kept, at least 1; the last one tells the host's seconds.
        hide_launches: on a GPU, time the device alone; False times what a user waits for.
        after_round: is given the seconds so far.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    host: dict[str, float] = {}
    shuffle = np.random.default_rng(0)
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            for name in shuffle.permutation(list(works)):
                work = works[name]
                run = functools.partial(work.run, index)
                if index < 0:
                    host[name] = clock.host_seconds(run)
                else:
                    seconds[name].append(clock(run, host[name] if hide_launches else 0.0))
                work.after(index)
            if index >= 0:
                after_round(seconds)
    finally:
        gc.enable()
    return seconds, host

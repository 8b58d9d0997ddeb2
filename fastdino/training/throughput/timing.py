"""Seconds: of a step that is repeated for a while, and of work that a device does."""

import time
from collections.abc import Callable

import torch

from fastdino.distributed import Ranks

WARM_UP = 4  # steps in which kernels are compiled, memory is found and graphs are captured


def wait(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Until the device has done ``work``, from when it had nothing else to do."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def warm_up(step: Callable[[], object], ranks: Ranks, seconds: float) -> float:
    """Takes the steps that are not like those after them; after the first one no longer than so many seconds.

    Returns the seconds of the first one, in which the network is compiled.
    """
    first = wall_seconds(step, ranks.device)
    _repeat(step, ranks, seconds, WARM_UP - 1)
    return first


def step_seconds(step: Callable[[], object], ranks: Ranks, seconds: float) -> float:
    """Mean seconds of a step, repeated for so many seconds, as often on every rank."""
    taken = 0

    def steps() -> None:
        nonlocal taken
        taken = _repeat(step, ranks, seconds)

    return wall_seconds(steps, ranks.device) / taken


def _repeat(step: Callable[[], object], ranks: Ranks, seconds: float, most: int = 10**9) -> int:
    """Takes steps until the time is over on any rank; returns how many."""
    started, taken = time.perf_counter(), 0
    while True:
        over = ranks.ask(taken + 1 >= most or time.perf_counter() - started > seconds)
        step()
        taken += 1
        if over()[0]:  # asked before the step, so that no host waits for another
            return taken

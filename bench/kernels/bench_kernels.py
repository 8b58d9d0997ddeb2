"""What ``python -m bench.kernels`` collects: one benchmark for each variant of each case."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.kernels.case import Case
from bench.kernels.measure import COPY, Failed, Measured, NoRoom


class _Replay:
    """pytest-benchmark's timer: the seconds of a round that was measured already, interleaved with the others."""

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self.now, self.running = 0.0, False

    def __call__(self) -> float:
        if self.running:
            self.now += self.rounds.pop(0)
        self.running = not self.running
        return self.now


REPLAY = _Replay()


@pytest.mark.benchmark(timer=REPLAY)
def bench_kernel(benchmark: Any, measured: Callable[[Case], Measured], case: Case, variant: str) -> None:
    try:
        found = measured(case)
    except NoRoom as error:
        benchmark.skipped = True
        pytest.skip(str(error))
    except AssertionError as error:
        benchmark.skipped, message = True, f"no figure, because a result is wrong: {error}"
    except Failed as error:
        benchmark.skipped, message = True, f"no figure, because a call failed: {error}"
    else:
        message = ""
    if message:
        pytest.fail(message, pytrace=False)
    if why := found.left_out.get(variant):
        benchmark.skipped = True
        pytest.skip(f"{case.name}: {variant} is left out: {why}")
    REPLAY.rounds = list(found.seconds[variant])
    benchmark.group = case.name
    if variant != COPY:
        named = {"operation": case.operation, "shape": case.shape, "variant": variant}
        benchmark.extra_info.update(named, **found.figures[variant])
    benchmark.pedantic(lambda: None, rounds=len(found.seconds[variant]))

"""pytest-benchmark over every operation at its headline size, ours beside its alternatives: ``pytest bench/kernels``.

Its own options apply, such as ``-k dino_loss``, ``--benchmark-json FILE`` and ``--benchmark-compare``. The figures of
the result files come from ``python -m bench.kernels``, which interleaves the alternatives.
"""

import functools
import time
from typing import Any

import pytest
import torch

from bench.kernels.case import Case, check, without_failing
from bench.kernels.measure import BENCHES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {name: bench.case(bench.shapes[DEVICE.type][0], DEVICE, compiled=False) for name, bench in BENCHES.items()}


def synchronized() -> float:
    """Seconds, once the device is done with what was queued."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def judged(operation: str) -> tuple[Case, dict[str, str]]:
    """The case, once all its variants are right, and why others are left out."""
    case, left_out = without_failing(CASES[operation])
    check(case)
    return case, left_out


@pytest.mark.benchmark(timer=synchronized)
@pytest.mark.parametrize(("operation", "name"), [(key, name) for key, case in CASES.items() for name in case.variants])
def test_speed(benchmark: Any, operation: str, name: str) -> None:
    case, left_out = judged(operation)
    if name in left_out:
        pytest.skip(left_out[name])
    variant, inputs = case.variants[name], case.make(1)
    benchmark.group = case.name
    benchmark.extra_info.update(operation=operation, shape=case.shape, variant=name)
    call = variant.bind(inputs)

    def restore() -> None:
        if variant.restore is not None:
            variant.restore(inputs)

    benchmark.pedantic(call, setup=restore, rounds=20, warmup_rounds=3)

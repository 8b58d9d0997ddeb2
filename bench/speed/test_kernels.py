"""Every kernel, and attention, at its headline size beside its alternatives.

On a CPU these are the references, which is what a CPU runs, without torch.compile.
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.kernels import attention
from bench.kernels.case import COMPILED, OURS, PLAIN, Case, check, without_failing
from bench.kernels.measure import BENCHES, COPY, COPY_BYTES, copy_work, counted, make_work, num_inputs
from bench.speed.turns import DEVICE, Turns, device_seconds, label, room
from bench.timing import Clock, Work, paired_ratio

pytestmark = pytest.mark.benchmark(timer=device_seconds, disable_gc=True)
CASES = {
    name: bench.case(bench.shapes[DEVICE.type][0], DEVICE, DEVICE.type == "cuda") for name, bench in BENCHES.items()
}
CASES["attention"] = attention.make_case(DEVICE, attention.SHAPES[DEVICE.type][0])
IDS = [
    pytest.param(operation, name, id=f"{operation}-{label(case.shape)}-{label(name)}")
    for operation, case in CASES.items()
    for name in case.variants
]


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(DEVICE)


@pytest.fixture(scope="module")
def copy() -> Work:
    return copy_work(DEVICE)


@functools.lru_cache(maxsize=1)  # the variants of a case come one after another
def rotated(operation: str) -> list[Any]:
    """So many inputs of a case that none is in a cache when its turn comes."""
    case = CASES[operation]
    return [case.make(1 + i) for i in range(num_inputs(case, DEVICE))]


@pytest.mark.parametrize(("operation", "name"), IDS)
def test_kernel(operation: str, name: str, timed: Turns, clock: Clock, copy: Work) -> None:
    case, errors = judged(CASES[operation], name)
    inputs = rotated(operation)
    order = itertools.count()
    works = {OURS: make_work(case.variants[OURS], inputs, order)}
    works[name] = make_work(case.variants[name], inputs, order)
    with room(name):
        timed.begin(case.name, name)
        seconds = timed(name, {**works, COPY: copy}, clock)
        timed.benchmark.extra_info.update(
            operation=case.operation, shape=case.shape, bytes=case.bytes, error=errors[name],
            **counted(case, name, DEVICE),
        )  # fmt: skip
    if seconds:
        copies = paired_ratio(seconds[COPY], seconds[name]).median
        timed.benchmark.extra_info["copy_fraction"] = case.bytes / (2 * COPY_BYTES[DEVICE.type]) * copies


def judged(case: Case, name: str) -> tuple[Case, dict[str, float]]:
    """The case with this variant and ours, and their errors. Nothing is timed before, and no other variant is run.

    Raises AssertionError where a result is wrong; skips a peer that raises.
    """
    if name == COMPILED:
        torch.compiler.reset()  # a function that one process compiles for many sizes would at last run uncompiled
    with room(name):
        case = replace(case, variants={key: case.variants[key] for key in (OURS, PLAIN, name)})
        case, left_out = without_failing(case)
        if name not in left_out:
            return case, check(case)
    pytest.skip(f"{name} is left out: {left_out[name]}")

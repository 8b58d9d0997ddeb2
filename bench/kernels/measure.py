"""Measures one case: correct first, then all variants interleaved, beside a copy in the same rounds."""

import importlib
import itertools
import statistics
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.counters import launches, peak_bytes
from bench.kernels.case import COMPILED, OURS, Bench, Bound, Case, Variant, check, without_failing
from bench.timing import WARM_UP, Clock, Work, interleave, paired_ratio


class Benches(UserDict[str, Bench]):
    """By name. A file is imported when it is asked for: a base of bench.compare may lack what another one needs."""

    def __getitem__(self, name: str) -> Bench:
        if self.data[name] is None:
            self.data[name] = importlib.import_module(f"bench.kernels.{name.rstrip('_')}").BENCH
        return self.data[name]


BENCHES = Benches(dict.fromkeys((
    "dino_loss", "ibot_loss", "linear_ibot_loss", "sinkhorn", "koleo_loss", "adamw_ema_", "ema_update_",
    "segment_squares", "prototype_weight", "fp8_linear", "gather_layer_norm", "scatter_add_scaled", "multi_crop",
)))  # fmt: skip
COPY = "copy"  # the yardstick of bandwidth
ROUNDS = {"cuda": 200, "cpu": 25}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # of the tensor that is copied
CPU_CACHE = 2**25  # bytes; a GPU is asked


@dataclass(frozen=True)
class Measured:
    """Seconds of every round and the figures derived from them, by variant."""

    seconds: dict[str, list[float]]
    figures: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    """Peers that raised, and why."""


class NoRoom(Exception):
    """A case does not fit into the device's memory."""


def make_cases(operations: list[str], shapes: list[str], device: torch.device, compiled: bool) -> Iterator[Case]:
    """The cases of these operations, every operation's headline before any other shape.

    ``shapes``: instead of those that each operation names for the device.
    """
    rows = [[(name, shape) for shape in shapes or BENCHES[name].shapes[device.type]] for name in operations]
    for name, shape in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*rows))):
        yield BENCHES[name].case(shape, device, compiled)


def measure(case: Case, device: torch.device, rounds: int) -> Measured:
    """Raises AssertionError, and times nothing, when a result is wrong; NoRoom when memory is too small."""
    rounds = min(rounds, case.rounds or rounds)
    if COMPILED in case.variants:
        torch.compiler.reset()  # a function that one process compiles for many sizes would at last run uncompiled
    try:
        return _measure(case, device, rounds)
    except torch.OutOfMemoryError as error:
        message = f"{case.name}: {str(error).splitlines()[0]}"
    if device.type == "cuda":  # here, because the error held the tensors
        torch.cuda.empty_cache()
    raise NoRoom(message)


def _measure(case: Case, device: torch.device, rounds: int) -> Measured:
    case.make(0)  # what does not fit here is no peer's fault
    case, left_out = without_failing(case)
    for name, why in left_out.items():
        print(f"{case.name}: {name} is left out: {why}")
    errors = check(case)
    calls = (WARM_UP + rounds) * len(case.variants)
    inputs = [case.make(1 + i) for i in range(min(calls, num_inputs(case, device)))]
    order = itertools.count()
    works = {name: make_work(variant, inputs, order) for name, variant in case.variants.items()}
    works[COPY] = copy_work(device)
    seconds, host = interleave(works, rounds, Clock(device))
    copy_bytes = 2 * COPY_BYTES[device.type]
    copy_bandwidth = copy_bytes / statistics.median(seconds[COPY])
    figures = {}
    for name in case.variants:
        median = statistics.median(seconds[name])
        alone, beside_copy = (
            paired_ratio(*x) for x in ((seconds[name], [1e-3] * rounds), (seconds[COPY], seconds[name]))
        )
        figures[name] = {
            "milliseconds": 1e3 * median,
            "times_ours": asdict(paired_ratio(seconds[name], seconds[OURS])),
            "copy_fraction": case.bytes / median / copy_bandwidth,
            "interval": {
                "milliseconds": [alone.low, alone.high],
                "copy_fraction": [x * case.bytes / copy_bytes for x in (beside_copy.low, beside_copy.high)],
            },
            **counted(case, name, device),
            "host_milliseconds": 1e3 * host[name],
            "error": errors[name],
        }
    return Measured(seconds, figures, left_out)


def copy_work(device: torch.device) -> Work:
    """Copies COPY_BYTES, which are read once and written once."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return Work(lambda index: target.copy_(source))


def counted(case: Case, name: str, device: torch.device) -> dict[str, int | None]:
    """Peak memory and launches of a variant; None where a CPU's counters do not see what torch.compile made of it."""
    if device.type != "cuda" and name == COMPILED:
        return {"peak_bytes": None, "launches": None}
    bind = case.variants[name].bind
    return {"peak_bytes": peak_bytes(bind(case.make(0)), device), "launches": launches(bind(case.make(0)), device)}


def num_inputs(case: Case, device: torch.device) -> int:
    """So many that between two uses of the same inputs three caches full of others are touched."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    return 1 + max(1, -(-3 * cache // case.bytes))


def make_work(variant: Variant, inputs: list[Any], order: Iterator[int]) -> Work:
    """Takes the next inputs at every call of any variant, since ``order`` is common to them."""
    calls: list[Bound] = [variant.bind(x) for x in inputs]
    last = 0

    def run(index: int) -> list[Tensor]:
        nonlocal last
        last = next(order) % len(calls)
        return calls[last]()

    restore: Callable[[Any], object] = variant.restore or (lambda x: None)
    return Work(run, lambda index: restore(inputs[last]))

"""What this device can do at best: the ceilings that the other benchmarks' figures stand under.

Copies, matrix products, exponentials, host to device, launches. ``python -m bench.kernels.ceilings`` writes
bench/results/ceilings-DEVICE.json. On a CPU: one thread's copy and products alone.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.record import device_here, positive, provenance, result_path, write
from bench.timing import Clock, Work, interleave, paired_ratio

ROUNDS = {"cuda": 100, "cpu": 15}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # of the tensor that is copied: many times any cache
UPLOAD_BYTES = 2**28
PRODUCTS = {  # rows, inner, columns
    "cuda": {"square": (8192, 8192, 8192), "prototypes": (640, 256, 65536)},
    "cpu": {"square": (1024, 1024, 1024), "prototypes": (40, 256, 4096)},
}
EXP_BLOCK, EXP_PROGRAMS, EXP_CHAIN = 1024, 4096, 512
LAUNCHES = 1000


@dataclass(frozen=True)
class Ceiling:
    """``work`` does ``amount`` of ``unit`` times a second, once; it returns what is compared with ``exact``."""

    work: Callable[[], Tensor]
    amount: float
    unit: str
    exact: Callable[[], Tensor]
    tolerance: float = 0.0


@triton.jit
def _exp2_kernel(x_ptr, chain, BLOCK: tl.constexpr):
    # x -> 2^(-x), ``chain`` times: each step waits for the one before, and BLOCK chains run side by side.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    for _ in range(chain):
        x = tl.exp2(-x)
    tl.store(x_ptr + i, x)


@triton.jit
def _empty_kernel():
    pass


def exp2_chain_(x: Tensor, chain: int) -> Tensor:
    """x becomes 2^(-x), ``chain`` times, in place; x is fp32, on a GPU, a multiple of EXP_BLOCK long."""
    _exp2_kernel[(x.numel() // EXP_BLOCK,)](x, chain, BLOCK=EXP_BLOCK, num_warps=4)
    return x


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.ceilings", description=__doc__)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=positive)
    parser.add_argument("--out", type=Path, help="default: bench/results/ceilings-DEVICE.json")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    rates = measure(ceilings(device), device, options.rounds or ROUNDS[device.type])
    if device.type == "cuda":
        rates |= launch_microseconds()
    write(options.out or result_path("ceilings", device), {
        "provenance": provenance(device, "bench.kernels.ceilings"), "ceilings": rates,
    })  # fmt: skip
    for name, f in rates.items():
        print(f"{name:34} {f['median']:10.4g} {f['unit']:8} [{f['low']:.4g}, {f['high']:.4g}]")
    return 0


def ceilings(device: torch.device) -> dict[str, Ceiling]:
    """The rates of ``device``, by name."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    found = {
        "copy, read and written": Ceiling(lambda: target.copy_(source), 2e-9 * source.nbytes, "GB/s", lambda: source)
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, sizes in PRODUCTS[device.type].items():
        shown = f"{str(dtype).removeprefix('torch.')} product, {name} {' x '.join(map(str, sizes))}"
        found[shown] = _product(sizes, dtype, device)
    if device.type == "cuda":
        found["exp2"] = _exp2(device)
        pinned = torch.randint(256, (UPLOAD_BYTES,), dtype=torch.uint8).pin_memory()
        here = torch.empty_like(pinned, device=device)
        found["pinned host to device"] = Ceiling(
            lambda: here.copy_(pinned, non_blocking=True), 1e-9 * UPLOAD_BYTES, "GB/s", lambda: pinned.to(device)
        )
    return found


def _product(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Ceiling:
    rows, inner, columns = sizes
    a, b = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))  # as a layer has them
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    return Ceiling(
        lambda: torch.mm(a, b.t(), out=out), 2e-12 * rows * inner * columns, "TFLOP/s",
        lambda: a.double() @ b.double().t(), tolerance,
    )  # fmt: skip


def _exp2(device: torch.device) -> Ceiling:
    start = torch.rand(EXP_BLOCK * EXP_PROGRAMS, device=device)
    x = start.clone()

    def exact() -> Tensor:
        want = start.double()
        for _ in range(EXP_CHAIN):
            want = torch.exp2(-want)
        return want

    return Ceiling(lambda: exp2_chain_(x, EXP_CHAIN), 1e-12 * EXP_CHAIN * x.numel(), "Texp/s", exact, 1e-5)


def measure(found: dict[str, Ceiling], device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Rates with the 95 % interval of their median. Raises AssertionError, and times nothing, on a wrong result."""
    for name, ceiling in found.items():
        got, want = ceiling.work().double(), ceiling.exact().double()
        error = float((got - want).norm() / want.norm())
        assert error <= ceiling.tolerance, f"{name} is off by {error:.2g}: no figure"
        del got, want
    works = {name: Work(lambda index, c=c: c.work()) for name, c in found.items()}  # type: ignore[misc]
    seconds, _ = interleave(works, rounds, Clock(device))
    rates = {name: paired_ratio([c.amount] * rounds, seconds[name]) for name, c in found.items()}
    return {name: {**asdict(rate), "unit": found[name].unit} for name, rate in rates.items()}


def launch_microseconds(repeats: int = 20) -> dict[str, dict[str, Any]]:
    """Of a kernel that does nothing: from launch to launch when many are queued, and when each is waited for."""
    launchers = {"torch": lambda: torch.cuda._sleep(0), "Triton": lambda: _empty_kernel[(1,)]()}
    found = {}
    for origin, launch in launchers.items():
        for name, wait in (("one after another", False), ("each waited for", True)):
            series = [_seconds_per_launch(launch, wait) for _ in range(repeats + 1)][1:]
            found[f"launch by {origin}, {name}"] = {**asdict(paired_ratio(series, [1e-6] * repeats)), "unit": "us"}
    return found


def _seconds_per_launch(launch: Callable[[], object], wait: bool) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        launch()
        if wait:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / LAUNCHES


if __name__ == "__main__":
    sys.exit(main())

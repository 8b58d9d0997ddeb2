"""Every kernel beside its reference, torch.compile and the best public alternative.

Correct first, then timed; the headline shape of every kernel before any other. ``python -m bench.kernels`` writes
bench/results/kernels-DEVICE.json after every case, so that what stops it costs no figure. On a GPU these are the
kernels; on a CPU the references, which is what a CPU runs.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.kernels.case import OURS, Case, check, first_line
from bench.kernels.measure import BENCHES, ROUNDS, NoRoom, make_cases, measure
from bench.record import add, device_here, may_add, positive, provenance, result_path


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.shape and len(options.only or ()) != 1:
        parser.error("--shape is of one operation, which --only names")
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        cases = list(make_cases(options.only or list(BENCHES), options.shape, device, not options.no_compile))
    except ValueError:
        usual = " or ".join(BENCHES[options.only[0]].shapes[device.type])
        parser.error(f"--shape {' '.join(options.shape)}: {options.only[0]} takes such as {usual}")
    if options.profile:
        for case in cases:
            profile(case, device)
        return 0
    here = provenance(device, "bench.kernels")
    path, rounds = _file(options, device, here), options.rounds or ROUNDS[device.type]
    until, failed = time.monotonic() + options.seconds, False
    for i, case in enumerate(cases):
        if time.monotonic() > until:
            print(f"no time left for {', '.join(case.name for case in cases[i:])}")
            break
        if (entry := _measured(case, device, rounds)) is None:
            failed = True
        elif entry and path is not None:
            add(path, {"provenance": here, "cases": [entry]}, lambda case: (case["operation"], case["shape"]))
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, help="operations; they are added to a file of this code")
    parser.add_argument("--shape", nargs="+", default=[], help="of one operation, such as 10,2,64,65536,bf16")
    parser.add_argument("--rounds", type=positive, help="pairs of measurements")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time nothing: one warm call of each case in the profiler's range, for ncu --profile-from-start off",
    )
    parser.add_argument("--out", type=Path, help="default: as above, if nothing is left out")
    return parser


def _file(options: argparse.Namespace, device: torch.device, here: dict[str, Any]) -> Path | None:
    """Where figures go: a file that may take them, or a new one in its place where everything is measured."""
    if options.out is not None:
        options.out.unlink(missing_ok=True)
        return options.out
    path = result_path("kernels", device)
    if options.shape or options.rounds or options.no_compile or (options.only and not may_add(path, here)):
        return None
    if not options.only:
        path.unlink(missing_ok=True)
    return path


def _measured(case: Case, device: torch.device, rounds: int) -> dict[str, Any] | None:
    """The case's entry in a result file, empty where it does not fit; None, and no figure, where it is wrong."""
    try:
        found = measure(case, device, rounds)
    except NoRoom as error:
        print(error)
        return {}
    except AssertionError as error:
        print(f"{case.name}: no figure, because a result is wrong: {error}")
        return None
    except Exception as error:
        traceback.print_exc()
        print(f"{case.name}: no figure, because a call failed: {first_line(error)}")
        return None
    for name, f in found.figures.items():
        print(f"{case.name:40} {name:40} {f['milliseconds']:9.4g} ms  {f['times_ours']['median']:6.2f}x")
    return {"operation": case.operation, "shape": case.shape, "rounds": rounds, "variants": found.figures}


def profile(case: Case, device: torch.device) -> None:
    """One call of ours after a first one that judges and compiles, between cudaProfilerStart and cudaProfilerStop."""
    check(case)
    call = case.variants[OURS].bind(case.make(1))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"{case.name}: profiled")


if __name__ == "__main__":
    sys.exit(main())

"""What the compiler made of every kernel, and the time that the H200 cannot beat with it. Needs no GPU.

``python -m bench.static`` writes bench/results/static.json; ``--check`` compares with it and writes nothing.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from fastdino_kernels.cases import CASES, NARROW, Case
from fastdino_kernels.offline import TARGETS, Report, compile_reports

RESULTS = Path(__file__).parent / "results" / "static.json"
# H200: copy bandwidth as measured (of 4.8 TB/s), SMs, clock, warp instructions and exps per clock and SM.
COPY_BYTES_PER_S = 4.3e12
SMS, CLOCK_HZ, WARPS_PER_CLOCK, EXPS_PER_CLOCK = 132, 1.98e9, 4, 16
# Figures that may not rise, and those that may not fall.
LOWER_IS_BETTER = ("registers", "spills", "local_accesses", "shared", "instructions_per_16_bytes")
HIGHER_IS_BETTER = ("loads_128", "stores_128")


def measure() -> dict[str, Any]:
    """{case: {kernel: {target: figures}}}, and the roofline of each kernel on the H200."""
    cases: dict[str, Any] = {}
    for name, case in CASES.items():
        for target in TARGETS:
            for report in compile_reports(case.call, target):
                if problems := report.problems(NARROW.get(report.kernel, frozenset())):
                    raise SystemExit("\n".join(problems))
                figures = {key: value for key, value in asdict(report).items() if key not in ("kernel", "target")}
                figures["instructions_per_16_bytes"] = round(16 * report.hot_instructions / report.hot_bytes, 2)
                kernel = cases.setdefault(name, {}).setdefault(report.kernel, {})
                kernel[target] = figures
                if target == "sm_90":
                    kernel["h200"] = roofline(report, case)
    return cases


def roofline(report: Report, case: Case) -> dict[str, Any]:
    """Least microseconds by memory, by instruction issue and by the exp unit; the largest is the kernel's bound.

    A thread that executes the hot part once moves ``hot_bytes``, so bytes tell how often it is executed.
    """
    num_bytes = case.bytes[report.kernel]
    passes = num_bytes / report.hot_bytes
    issue = passes * report.hot_instructions / 32 / (SMS * CLOCK_HZ * WARPS_PER_CLOCK)
    exp = passes * report.hot_exps / (SMS * CLOCK_HZ * EXPS_PER_CLOCK)
    times = {"memory": num_bytes / COPY_BYTES_PER_S, "issue": issue, "exp": exp}
    return {
        "instructions_per_element": round(report.hot_instructions * passes / case.elements, 2),
        **{f"{name}_us": round(1e6 * seconds, 1) for name, seconds in times.items()},
        "bound": max(times, key=lambda name: times[name]),
    }


def regressions(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for every figure that is worse than recorded, and for every kernel that is missing on either side."""
    found = []
    for case, kernel in sorted({(c, k) for side in (recorded, now) for c in side for k in side[c]}):
        before, after = recorded.get(case, {}).get(kernel), now.get(case, {}).get(kernel)
        if before is None or after is None:
            found.append(f"{case}, {kernel}: {'not recorded' if before is None else 'recorded, but launched no more'}")
            continue
        for target in TARGETS:
            for figure, sign in [*((f, 1) for f in LOWER_IS_BETTER), *((f, -1) for f in HIGHER_IS_BETTER)]:
                old, new = before[target][figure], after[target][figure]
                if sign * (new - old) > 0:
                    found.append(f"{case}, {kernel} on {target}: {figure} was {old}, is {new}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail on a figure worse than recorded; write nothing")
    check = parser.parse_args().check
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    cases = measure()
    if check:
        recorded = json.loads(RESULTS.read_text())
        found = regressions(recorded["cases"], cases)
        print("\n".join(found) or f"{len(cases)} cases, no figure worse than recorded")
        if found and recorded["versions"] != versions:
            print(f"recorded with {recorded['versions']}, compared with {versions}: the compiler may be why")
        return bool(found)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=RESULTS.parent)
    RESULTS.parent.mkdir(exist_ok=True)
    command = "python -m bench.static"
    document = {"commit": git.stdout.strip(), "command": command, "versions": versions, "cases": cases}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

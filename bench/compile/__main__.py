"""What the compiler made of every kernel, and the time that the H200 cannot beat with it. Needs no GPU.

``python -m bench.compile`` writes bench/results/compile.json; ``--check`` compares with it and writes nothing.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from bench.compile.cases import CASES, Case
from bench.compile.offline import TARGETS, Report, compile_cases
from bench.record import RESULTS, commit, write

RECORD = RESULTS / "compile.json"
# H200: copy bandwidth as measured (of 4.8 TB/s), SMs, clock, warp instructions and exps per clock and SM.
COPY_BYTES_PER_S = 4.3e12
SMS, CLOCK_HZ, WARPS_PER_CLOCK, EXPS_PER_CLOCK = 132, 1.98e9, 4, 16
# Figures that may not rise, and those that may not fall.
LOWER_IS_BETTER = ("registers", "spills", "local_accesses", "shared", "instructions_per_element")
HIGHER_IS_BETTER = ("loads_128", "stores_128")


def figures(reports: dict[str, list[Report]]) -> dict[str, Any]:
    """{case: {kernel: {target: figures}}}, and under "h200" the roofline of each kernel there."""
    cases: dict[str, Any] = {}
    for name, found in reports.items():
        for report in found:
            if problems := report.problems(CASES[name].narrow_accesses(report.kernel)):
                raise SystemExit("\n".join(problems))
            kernel = cases.setdefault(name, {}).setdefault(report.kernel, {})
            kernel[report.target] = {
                key: x for key, x in asdict(report).items() if key not in ("kernel", "target", "unwritten")
            }
            per_element = report.hot_instructions * passes(report, CASES[name]) / CASES[name].elements
            kernel[report.target]["instructions_per_element"] = round(per_element, 3)
            if report.target == "sm_90":
                kernel["h200"] = roofline(report, CASES[name])
    return cases


def passes(report: Report, case: Case) -> float:
    """How often threads execute the hot part: each time it moves ``hot_bytes`` of what the kernel moves."""
    return (case.bytes[report.kernel] + case.cached.get(report.kernel, 0)) / report.hot_bytes


def roofline(report: Report, case: Case) -> dict[str, Any]:
    """Least microseconds by memory, by instruction issue and by the exp unit; the largest is the kernel's bound."""
    issue = passes(report, case) * report.hot_instructions / 32 / (SMS * CLOCK_HZ * WARPS_PER_CLOCK)
    exp = passes(report, case) * report.hot_exps / (SMS * CLOCK_HZ * EXPS_PER_CLOCK)
    times = {"memory": case.bytes[report.kernel] / COPY_BYTES_PER_S, "issue": issue, "exp": exp}
    bound = max(times, key=lambda name: times[name])
    return {**{f"{name}_us": round(1e6 * seconds, 1) for name, seconds in times.items()}, "bound": bound}


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
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail on a figure worse than recorded; write nothing")
    parser.add_argument("--reports", type=Path, help="what bench.compile.offline printed; default: compile")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if args.reports:
        printed = json.loads(args.reports.read_text())
        reports = {name: [Report(**report) for report in found] for name, found in printed.items()}
    else:
        reports = compile_cases()
    cases = figures(reports)
    if args.check:
        recorded = json.loads(RECORD.read_text())
        found = regressions(recorded["cases"], cases)
        print("\n".join(found) or f"{len(cases)} cases, no figure worse than recorded")
        if found and recorded["versions"] != versions:
            print(f"recorded with {recorded['versions']}, compared with {versions}: the compiler may be why")
        return bool(found)
    command = "python -m bench.compile"
    write(RECORD, {"commit": commit(), "command": command, "versions": versions, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())

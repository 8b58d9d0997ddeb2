"""A GPU for some minutes: right, then fast, then why, in order of value.

First, side by side, what needs no quiet machine: tests, sanitizers, a training run, and what fills the compilers'
caches. Then every benchmark alone; what compiles for long begins before its turn. A stage is stopped at its limit, the
next one runs all the same, and one for which too little time is left is skipped. FOLDER/summary.txt and
FOLDER/visit.tar.gz are whole after every stage; unpack the latter in a checkout, where its bench/results/*.json belong.
Exit code 0: no stage has failed or was stopped.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch

from bench.record import ROOT
from bench.visit.stages import SECONDS, SPARE, STAGES, longest
from bench.visit.visit import Visit

OUT = ROOT / "runs" / "visit"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", nargs="?", type=float, default=SECONDS, help=f"in all; default: {SECONDS}")
    parser.add_argument("--only", metavar="A,B", help="these stages")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=OUT, help="default: runs/visit")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [stage.name for stage in STAGES]
    if unknown := set(names) - {stage.name for stage in STAGES}:
        known = ", ".join(stage.name for stage in STAGES)
        parser.error(f"--only: no stage {', '.join(sorted(unknown))}; there are {known}")
    if options.seconds <= SPARE:
        parser.error(f"{SPARE} seconds are needed for the report alone")
    stages = [stage for stage in STAGES if stage.name in names]
    if options.list:
        for stage in stages:
            where = "side by side" if stage.lane else "alone"
            print(f"{stage.name:15} {stage.limit:4} s at most, {where:13} {stage.command}")
        print(f"{longest(stages)} s if each takes all of its limit")
        return 0
    if not torch.cuda.is_available():
        parser.exit(2, "python -m bench.visit: torch sees no GPU, and every stage needs one; --list needs none\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stages end with the visit
    visit = Visit(stages, options.seconds, options.out)
    right = visit.run()
    print(f"\n{visit.summary()}\nin {visit.out}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())

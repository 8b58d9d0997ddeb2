"""What gates of recipes share: a run for each seed, with other settings or none, whose figures stand in one file."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.record import ROOT, add, may_add, provenance, write

Case = dict[str, Any]


def arguments(gate: str, about: str | None) -> argparse.ArgumentParser:
    """The flags that :func:`record` reads but ``--out``."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.gates.{gate}", description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs, one after another")
    parser.add_argument("--trial", default="", help="flags of fastdino train that differ from the recipe's")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs", help="the run folders are in it")
    return parser


def record(
    gate: str,
    options: argparse.Namespace,
    out: Path,
    baselines: Callable[[], list[Case]],
    run: Callable[[list[str], int, Path], list[Case]],
) -> int:
    """Starts the file ``out``, or with ``options.trial`` adds to it where code and device are those of its figures.

    Args:
        baselines: figures that need no run, with which the file starts.
        run: flags, seed and folder -> figures by "features".

    Returns the exit status.
    """
    where = provenance(torch.device("cpu"), f"bench.gates.{gate}")
    flags = shlex.split(options.trial)
    if flags and not may_add(out, where):
        return 1
    if not flags:
        write(out, {"provenance": where, "cases": baselines()})
    settings = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8] if flags else "recipe"
    for seed in options.seeds:
        found = run(flags, seed, options.dir / f"{out.stem}-{settings}-{seed}")
        cases = [{"flags": shlex.join(flags), "seed": seed, **case} for case in found]
        add(out, {"provenance": where, "cases": cases}, _name)
        print(*(json.dumps(case) for case in cases), sep="\n")
    return 0


def _name(case: Case) -> tuple[Any, ...]:
    return case["features"], case["flags"], case["seed"]

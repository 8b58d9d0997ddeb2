"""This tree against another commit, on this machine, in one run.

``python -m bench.compare --base main`` checks the base out beside this tree, keeps one process of each alive and lets
them take turns, one call at a time. First the base runs against itself: when that is not even, the machine is unfit.
Exit code 0: as fast, faster or AMBIGUOUS. 1: slower, in two runs. 2: unfit, or a result is wrong.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench.record import ROOT, python_path
from bench.timing import Ratio, paired_ratio

SLOWER = 1.05  # the interval's lower end above it is a regression, if a second run agrees
UNFIT = {"cuda": 0.02, "cpu": 0.05}  # half-width of the base against itself
ROUNDS = {"cuda": 200, "cpu": 60}


class Side:
    """A process that runs one case in one tree, a call at a time."""

    def __init__(self, tree: Path, device: str, case: str) -> None:
        command = [sys.executable, "-m", "bench.compare_side", device, case]
        env = os.environ | {"PYTHONPATH": python_path(tree)}
        self.process = subprocess.Popen(
            command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait()

    def ready(self) -> str | None:
        """Waits until it has judged its results; what is wrong, if anything is."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        return json.loads(line)["wrong"] if line else "the process died; its message is above"

    def seconds(self) -> float:
        """Of one call, made now."""
        self.process.stdin.write("go\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return float(self.process.stdout.readline())  # type: ignore[union-attr]


class Wrong(Exception):
    """A result is wrong, so that no time is taken."""


class NoBase(Exception):
    """git cannot check the base out."""


def compare(first: Path, second: Path, device: str, case: str, rounds: int) -> Ratio:
    """Seconds of ``second`` over those of ``first``, A B A B. Raises Wrong when either gives wrong results."""
    with Side(first, device, case) as a, Side(second, device, case) as b:
        for name, side in (("base", a), ("this tree", b)):
            if wrong := side.ready():
                raise Wrong(f"{case}, {name}: {wrong}")
        pairs = [(a.seconds(), b.seconds()) for _ in range(rounds)]
    return paired_ratio([b for _, b in pairs], [a for a, _ in pairs])


def verdict(ratio: Ratio, again: Ratio | None) -> str:
    """SLOWER needs two runs that agree; a slower median without that is AMBIGUOUS."""
    if ratio.low > SLOWER:
        return "SLOWER" if again is not None and again.low > SLOWER else "AMBIGUOUS"
    if ratio.high < 1 / SLOWER:
        return "FASTER"
    return "AMBIGUOUS" if ratio.median > SLOWER else "SAME"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--base", required=True, help="commit to compare with")
    parser.add_argument("--device", choices=list(ROUNDS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="+", default=["dino_loss", "adamw_ema_", "ema_update_", "center_mean", "step"])
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rounds, worst = options.rounds or ROUNDS[options.device], 0
    try:
        with worktree(options.base) as base:
            for case in options.case:
                worst = max(worst, judge(base, options.device, case, rounds))
    except NoBase as error:
        parser.error(f"--base {options.base}: {error}")
    return worst


def judge(base: Path, device: str, case: str, rounds: int) -> int:
    """Prints what is seen of one case; the exit code it asks for."""
    try:
        even = compare(base, base, device, case, rounds)
        if max(1 - even.low, even.high - 1) > UNFIT[device]:
            print(f"{case}: UNFIT, the base against itself is {even}: this machine cannot tell 5 %")
            return 2
        ratio = compare(base, ROOT, device, case, rounds)
        again = compare(base, ROOT, device, case, rounds) if ratio.low > SLOWER else None
    except Wrong as wrong:
        print(f"{case}: WRONG, no time was taken. {wrong}")
        return 2
    found = verdict(ratio, again)
    print(f"{case}: {found}, {ratio} times the base{f', then {again}' if again else ''}; base against itself {even}")
    return int(found == "SLOWER")


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` with this tree's bench/, so that both sides are measured alike.

    Raises NoBase where there is no git, no repository or no such revision.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git: Any = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
        try:
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], **git)
        except subprocess.CalledProcessError as error:
            raise NoBase(error.stderr.strip()) from None
        except OSError as error:
            raise NoBase(str(error)) from None
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("__pycache__"))
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], **git)


if __name__ == "__main__":
    sys.exit(main())

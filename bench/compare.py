"""This tree against another commit, on this machine, in one run: for a verdict where other work disturbs the clock.

The base is checked out beside this tree, with this tree's bench/. One process of each stays alive, and they take turns,
one call at a time: A B A B. First the base runs against itself: when that is not even, the machine is unfit.

  SAME, FASTER   said with the median of the paired ratios and its 95 % interval
  SLOWER         the whole interval is above 1.05, in two runs
  AMBIGUOUS      the median is above 1.05, and not all of that: take more --rounds, or a quieter machine
  UNFIT          the base against itself is off by more than 5 % on a CPU, 2 % on a GPU
  WRONG          no time was taken: a result is not what float64 or the public peer says, the base does not have what
                 the case times, or a side died

Exit code 0: SAME, FASTER or AMBIGUOUS. 1: SLOWER. 2: UNFIT, WRONG, or no such base.

  python -m bench.compare --base HEAD~1 --case dino_loss
  python -m bench.compare --base $(git merge-base main HEAD)
"""

import argparse
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

import fastdino_kernels
from bench.kernels.case import OURS, PLAIN, check
from bench.kernels.measure import BENCHES, make_work, num_inputs
from bench.record import ROOT, device_here, positive, python_path
from bench.timing import Clock, Ratio, Work, paired_ratio

SLOWER = 1.05  # the interval's lower end above it is a regression, if a second run agrees
UNFIT = {"cuda": 0.02, "cpu": 0.05}  # half-width of the base against itself
WARMUP = 3  # calls
ROUNDS = {"cuda": 200, "cpu": 60}
CASES = [*BENCHES, "step"]
DIED = "the process died; its message is above"


class Side:
    """A process that runs one case in one tree, a call at a time."""

    def __init__(self, tree: Path, device: str, case: str) -> None:
        command = [sys.executable, "-m", "bench.compare", "--serve", "--device", device, "--case", case]
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
        return json.loads(line)["wrong"] if line else DIED

    def seconds(self) -> float:
        """Of one call, made now. Raises Wrong when the process has died."""
        try:
            self.process.stdin.write("go\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if not line:
            raise Wrong(DIED)
        return float(line)


class Wrong(Exception):
    """A result is wrong, so that no time is taken."""


class NoBase(Exception):
    """git does not give the files of the base."""


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
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with: anything that git knows")
    parser.add_argument("--serve", action="store_true", help="be one side: time a call of --case for every line read")
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        metavar="CASE",
        default=["dino_loss", "adamw_ema_", "ema_update_", "step"],
        help=f"of {', '.join(CASES)}, at its headline size; default: %(default)s",
    )
    parser.add_argument(
        "--rounds", type=positive, help=f"pairs of calls; default: {ROUNDS['cuda']} on a GPU, else {ROUNDS['cpu']}"
    )
    options = parser.parse_args()
    if options.serve:
        return serve(options.device, options.case[0])
    if not options.base:
        parser.error("--base COMMIT is missing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the base's files and both sides go with it
    rounds, worst = options.rounds or ROUNDS[options.device.type], 0
    try:
        with checkout(options.base) as base:
            for case in options.case:
                worst = max(worst, judge(base, options.device.type, case, rounds))
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
def checkout(revision: str) -> Iterator[Path]:
    """The files of ``revision`` with this tree's bench/, so that both sides are measured alike.

    Raises NoBase where there is no git, no repository or no such revision.
    """
    command = ["git", "archive", "--", f"{revision}^{{commit}}"]
    try:
        archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        raise NoBase(error.stderr.decode().strip()) from None
    except OSError as error:
        raise NoBase(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        shutil.rmtree(Path(folder, "bench"), ignore_errors=True)
        shutil.copytree(ROOT / "bench", Path(folder, "bench"), ignore=shutil.ignore_patterns("__pycache__"))
        yield Path(folder)


def serve(device: torch.device, name: str) -> int:
    """Judges the case, says so, then times one call for every line it reads."""
    assert Path.cwd() in Path(fastdino_kernels.__file__).parents, "another tree is installed over this one"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = _step(device, Path(folder)) if name == "step" else _kernel(name, device)
        except (AssertionError, ImportError) as error:
            told = "it does not have what bench/ of this tree times: " if isinstance(error, ImportError) else ""
            print(json.dumps({"wrong": f"{told}{error}"}), flush=True)
            return 1
        clock = Clock(device)  # calibrates its pause, which wants a device that is awake
        host = 0.0
        for _ in range(WARMUP):
            host = clock.host_seconds(lambda: work.run(0))
            work.after(0)
        print(json.dumps({"wrong": None}), flush=True)
        for _ in sys.stdin:
            print(_alone(work, clock, 0.0 if name == "step" else host), flush=True)
    return 0


def _alone(work: Work, clock: Clock, host_seconds: float) -> float:
    """Seconds of one call. Whoever reads them lets the other side run, so the device must be done with this one."""
    seconds = clock(lambda: work.run(0), host_seconds)
    work.after(0)
    clock.synchronize()
    return seconds


def _kernel(name: str, device: torch.device) -> Work:
    """Ours at the operation's first shape, judged against float64; every call has other inputs."""
    case = BENCHES[name].case(BENCHES[name].shapes[device.type][0], device, compiled=False)
    for other in case.variants.keys() - {OURS, PLAIN}:
        del case.variants[other]
    check(case)
    inputs = [case.make(1 + i) for i in range(num_inputs(case, device))]
    return make_work(case.variants[OURS], inputs, itertools.count())


def _step(device: torch.device, folder: Path) -> Work:
    """A training step, whose losses must be those of the public peer."""
    from bench.peers.contenders import build  # here, because a base that lacks what a step needs may have a kernel
    from bench.peers.contenders import check as check_step
    from bench.step import NUM_BATCHES
    from bench.workload import random_batch, step_config
    from fastdino import distributed

    config = step_config("vit_small" if device.type == "cuda" else "vit_nano", device)
    ranks = distributed.init("cuda" if device.type == "cuda" else "cpu")
    batches = [random_batch(config, device, seed) for seed in range(NUM_BATCHES)]
    contenders = build(config, ranks, folder, [OURS, "lightly + timm"])
    check_step(contenders, batches, config.engine.precision)
    ours, order = contenders[OURS].work(batches), itertools.count()
    return Work(lambda index: ours.run(next(order)))


if __name__ == "__main__":
    sys.exit(main())

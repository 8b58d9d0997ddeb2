"""Runs stages within a number of seconds and keeps what they found, whatever ends the visit."""

import contextlib
import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from bench.record import RESULTS, ROOT, commit, python_path
from bench.visit.stages import SPARE, Stage, lanes, stretch

LAST_WORDS = 10  # seconds of a stage's, for a command that is told when to end
TOOLS = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*")  # where ncu and compute-sanitizer may be
NOT_FOUND = 127  # a shell's code, and env's
OK, SKIPPED = "ok", "skipped"
ABSENT = f"{SKIPPED}, its tool is not on this machine"
SHOWN = 25  # lines of a stage in the summary


class Visit:
    """Begins when it is made.

    Args:
        stages: to run; those with a lane side by side, then the others one by one. The first that begins early does so
            at once, each other one when the one before it is over: two would not share a GPU's memory.
        seconds: in which all of it has to end.
        out: folder for summary.txt and visit.tar.gz (logs, and the files of bench/results/ that were written), which
            are whole after every stage.
    """

    def __init__(self, stages: Sequence[Stage], seconds: float, out: Path) -> None:
        self.stages, self.seconds, self.out = stages, seconds, out.resolve()
        self.stretch, self.started = stretch(stages, seconds), time.monotonic()
        self.end = self.started + seconds - SPARE
        self.work = Path(tempfile.mkdtemp(prefix="fastdino-visit-"))
        self.before = {path: path.read_bytes() for path in RESULTS.glob("*.json")}
        self.reports: list[str] = []
        self.states: dict[str, str] = {}
        self._early: dict[str, subprocess.Popen[bytes] | str] = {}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)
        self._pack()

    def run(self) -> bool:
        """Runs the stages; True when none has failed or was stopped."""
        side_by_side = lanes(self.stages)
        with ThreadPoolExecutor(max_workers=max(1, len(side_by_side))) as pool:
            try:
                self._begin_early()
                running = [pool.submit(self._one_by_one, lane) for lane in side_by_side]
                while wait(running, timeout=0.5).not_done:
                    pass  # a signal that comes as a wait begins is heard when it ends
                for future in running:
                    future.result()
                self._one_by_one([stage for stage in self.stages if not stage.lane])
            except BaseException:
                with self._lock:
                    self.end = self.started  # no stage begins any more
                    for child in self._running:
                        _stop(child)
                raise
        return all(state.startswith((OK, SKIPPED)) for state in self.states.values())

    def _begin_early(self) -> None:
        """Begins the first stage that can and has not."""
        if rest := [stage for stage in self.stages if stage.early and stage.name not in self._early]:
            self._early[rest[0].name] = self._begin(rest[0], rest[0].limit)

    def _one_by_one(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            began, left = time.monotonic(), self.end - time.monotonic()
            seconds, state = min(stage.limit * self.stretch, left), f"{SKIPPED}, {max(0, left):.0f} s are left"
            if stage.early:
                self._turn(stage).touch()
            if left < stage.limit / 3:
                self._end(self._early.get(stage.name, state), 0)
            else:
                state = self._end(self._early.get(stage.name) or self._begin(stage, seconds), seconds)
            if stage.early:
                self._begin_early()
            self._report(stage, state, time.monotonic() - began)

    def _turn(self, stage: Stage) -> Path:
        return self.work / f"{stage.name}.turn"

    def _begin(self, stage: Stage, seconds: float) -> "subprocess.Popen[bytes] | str":
        """The stage's command, started, or the state of one that cannot be."""
        inside = max(1, int(0.8 * seconds))  # for a command that ends by itself: it finishes what it has begun
        given = {"seconds": inside, "end": max(1, int(seconds) - LAST_WORDS), "work": self.work, "out": self.out}
        given["turn"] = self._turn(stage)
        command = [part.format(**given) for part in shlex.split(stage.command)]
        command = [sys.executable if part == "python" else part for part in command]
        tools = [folder for pattern in TOOLS for folder in glob.glob(pattern)]
        env = {**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
        env["PATH"] = os.pathsep.join([os.environ["PATH"], *tools])
        with self._log(stage).open("w") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            with self._lock:  # whoever ends the visit finds every child
                if time.monotonic() > self.end:
                    return f"{SKIPPED}, the visit has ended"
                try:
                    child = subprocess.Popen(
                        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,
                    )  # fmt: skip
                except FileNotFoundError:
                    return ABSENT
                self._running.add(child)
        return child

    def _end(self, child: "subprocess.Popen[bytes] | str", seconds: float) -> str:
        """The state in which what :meth:`_begin` gave ended, within ``seconds`` from now."""
        if isinstance(child, str):
            return child
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"STOPPED at {seconds:.0f} s"
        finally:
            _stop(child)
            with self._lock:
                self._running.discard(child)
        return {0: OK, NOT_FOUND: ABSENT}.get(code, f"FAILED with code {code}")

    def _log(self, stage: Stage) -> Path:
        return self.work / f"{stage.name}.log"

    def _report(self, stage: Stage, state: str, seconds: float) -> None:
        """Says how a stage ended, and packs everything anew."""
        with self._lock:
            self.states[stage.name] = state
            elapsed = time.monotonic() - self.started
            print(f"[{elapsed:4.0f} s] {stage.name}: {state}, {seconds:.0f} s", flush=True)
            self.reports.append(f"== {stage.name}: {state}, {seconds:.0f} s")
            if not state.startswith(SKIPPED):
                self.reports += [f"   {line[:160]}" for line in telling(self._log(stage), stage, state)]
            self._pack()

    def summary(self) -> str:
        """What has been found so far."""
        return "\n".join([f"commit {commit()}, {self.seconds:.0f} s", *self.reports]) + "\n"

    def _pack(self) -> None:
        (self.out / "summary.txt").write_text(self.summary())
        part = self.out / "visit.part"
        with tarfile.open(part, "w:gz") as tar:
            for log in sorted(self.work.glob("*.log")):
                tar.add(log, f"logs/{log.name}")
            for path in sorted(RESULTS.glob("*.json")):
                if self.before.get(path) != path.read_bytes():
                    tar.add(path, path.relative_to(ROOT))
        part.replace(self.out / "visit.tar.gz")


def telling(log: Path, stage: Stage, state: str) -> list[str]:
    """The lines that a summary repeats: what the stage shows, and the end of a log that tells of a failure."""
    lines = [line for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()]
    shown = [line for line in lines if re.search(stage.shows, line)]
    if len(shown) > SHOWN:  # the first, and the last, which counts the tests
        shown = [*shown[: SHOWN - 1], shown[-1]]
    return shown if state == OK else [*shown, "...", *lines[-12:]]


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Ends a child and all that it has started, which share its session."""
    for number, patience in ((signal.SIGTERM, 4), (signal.SIGKILL, 4)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(patience)

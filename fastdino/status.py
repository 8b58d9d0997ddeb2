"""Where a run stands: ``status.json`` in its folder, which rank 0 keeps fresh, and what it tells a person."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastdino.config import ConfigError, UserError
from fastdino.host import lives, may_live, this_process

NAME = "status.json"
EVERY = 15.0  # seconds between two writings of a run that goes on
SILENT = 120.0  # seconds without one after which a run has stopped talking; clocks of two hosts differ by less
FIELDS = (
    "state", "step", "steps", "step_time", "images_per_second", "step_seconds", "eta_seconds", "checkpoint", "exit",
    "reason", "ranks", "host", "pid", "namespace", "started", "start_time", "time",
)  # fmt: skip
ENDS = {0: "finished", 85: "preempted", 86: "hung", 130: "stopped"}  # by exit code; any other is a failure
RESTARTS = 3  # of a run that fails, hangs or is killed, until it has a newer checkpoint


class Status:
    """Writes a run's status.json, from a thread of its own: no step waits for the disk. A context manager of rank 0.

    Whoever reads the file finds a whole one. A disk that refuses changes nothing for the run. On leaving, the file says
    how the run ended; that of a run that was killed goes on saying that it runs, and :func:`read` knows better.

    Args:
        folder: the run folder.
        step: at which it stands.
        steps: at which the run will end.
        ranks: how many processes train.
    """

    def __init__(self, folder: Path, step: int, steps: int, ranks: int) -> None:
        self.folder = folder
        begun = {"state": "running", "step": step, "steps": steps, "ranks": ranks, "start_time": time.time()}
        self._values: dict[str, Any] = {**dict.fromkeys(FIELDS), **begun, **this_process()}
        self._left, self._lock = threading.Event(), threading.Lock()
        self._writer = threading.Thread(target=self._write_on, name="status", daemon=True)

    def tell(self, **values: Any) -> None:
        """What has changed, by the names of FIELDS; others are left out."""
        self._values |= {name: value for name, value in values.items() if name in FIELDS}

    def end(self, code: int, reason: str = "") -> None:
        """Writes how the run ended. The first end counts, but for a hang, which other errors may follow."""
        if self._values["exit"] is None or code == 86:
            self.tell(state=ENDS.get(code, "failed"), exit=code, reason=reason)
            self._write()

    def __enter__(self) -> Self:
        self._write()
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._writer.join(EVERY)
        if isinstance(error, UserError):
            self.end(error.exit_code, str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.end(130, "Ctrl-C")
        else:
            self.end(int(kind is not None), f"{kind.__name__}: {error}" if kind else "")

    def _write_on(self) -> None:
        while not self._left.wait(EVERY):
            self._write()

    def _write(self) -> None:
        temporary = self.folder / f".{NAME}"
        with self._lock, contextlib.suppress(OSError):
            text = json.dumps({**self._values, "time": time.time()}, indent=2)
            try:
                temporary.write_text(text + "\n")
                os.replace(temporary, self.folder / NAME)
            finally:
                temporary.unlink(missing_ok=True)  # what a full disk has cut off


def read(folder: Path, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """What the run in ``folder`` said last, and in ``state`` what is the case.

    ``state`` is one of starting, running, silent (it should have spoken since; its host cannot be asked from here),
    killed (its process is gone without a word), finished, preempted, hung, stopped, failed, and unknown for a run that
    never wrote a status. ``age`` is how long ago it spoke.

    Raises ConfigError when the folder is that of no run, and when its status cannot be read.
    """
    path = folder / NAME
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} is not a run folder: it {what}. Give the folder that --run.dir named")
    try:
        found = dict.fromkeys(FIELDS) | json.loads(path.read_text())
        found["age"] = max(clock() - found["time"], 0.0)
    except FileNotFoundError:
        found = {**dict.fromkeys(FIELDS), "state": "unknown", "age": None}
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is no status that fastdino wrote"
        raise ConfigError(f"{path} cannot be read: {reason}. A run that goes on writes it anew") from error
    holder = _holder(folder)
    if holder and any(holder.get(name) != found[name] for name in ("host", "pid", "started")):
        found |= {"state": "starting", "reason": f"since {holder.get('since')}"}
        found |= {name: holder.get(name) for name in ("host", "pid", "namespace", "started")}
    elif found["state"] == "running" and not may_live(found):
        found["state"] = "killed"
    elif found["state"] == "running" and found["age"] > SILENT:
        found["state"] = "silent"
    return found


def _holder(folder: Path) -> dict[str, Any] | None:
    """The process that has the folder and may live. That of another host counts: it removes its lock when it ends."""
    try:
        holder = json.loads((folder / ".lock").read_text())
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and may_live(holder) else None


def requeue(folder: Path) -> tuple[bool, str]:
    """Whether to start the run in ``folder`` again, and why: for who started it and saw its processes end.

    Yes after a notice (exit code 85). No when it is finished, was stopped by Ctrl-C, or ended with 2, which has to be
    mended first. Anything else is worth RESTARTS starts until there is a newer checkpoint: a failure, a hang, a kill,
    an end that came before the run wrote a status. This host counts them in a file in the run folder.

    Raises ConfigError as :func:`read` does, and when they cannot be counted.
    """
    found = read(folder)
    state, saved, code = found["state"], found["checkpoint"], found["exit"]
    if state in ("starting", "running", "silent") and lives(found):
        return False, f"it goes on: process {found['pid']}"
    told = [found[name] for name in ("host", "pid", "started", "time")]
    why = " ".join([state, *([f"({code})"] if code else []), *(found["reason"] or "").splitlines()[:1]])
    if state in ("finished", "stopped") or code == 2:
        return False, why
    path = folder / f".restarts-{socket.gethostname()}.json"
    before = _counted(path)
    if before.get("told") == told:  # what the status says is of the start before
        state = why = "ended before it began to train"
    starts = before.get("starts", 0) if before.get("checkpoint") == saved else 0
    again = state == "preempted" or starts < RESTARTS
    if state != "preempted":
        since = "at the start" if saved is None else f"at the checkpoint of step {saved}"
        why += (
            f"; start {starts + 1} of {RESTARTS} {since}" if again else f"; {RESTARTS} starts {since} came no further"
        )
        starts += again
    _count(path, {"checkpoint": saved, "starts": starts, "told": told})
    return again, why


def answer(folder: Path) -> int:
    """Prints what :func:`requeue` says; the exit code of a command that was asked: 0 for yes, 1 for no."""
    again, why = requeue(folder)
    print(f"{folder}: {'start it again' if again else 'do not start it again'}: {why}")
    return 0 if again else 1


def _counted(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # no restart yet
        return {}
    return found if isinstance(found, dict) else {}


def _count(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(values))
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Restarts are counted there") from error


def describe(folder: Path, found: dict[str, Any]) -> str:
    """What :func:`read` found, for a person: three lines at most, the state first."""
    state, place = found["state"], f"process {found['pid']} on {found['host']}"
    ago = "" if found["age"] is None else f"{_span(found['age'])} ago"
    meaning = {
        "starting": f"{place} has the folder, {found['reason']}, and has not begun to train",
        "running": f"{place}, {found['ranks']} ranks",
        "silent": f"the run has stopped talking: its last word is {ago}, and {place} may be gone",
        "killed": f"{place} is gone without a word, its last is {ago}: the same command resumes",
        "finished": f"{ago}",
        "preempted": f"{ago}, exit code 85: the same command resumes",
        "hung": f"{ago}, exit code 86: {found['reason']}",
        "unknown": f"no {NAME}: an older fastdino trained here, or the run has not begun",
    }.get(state, f"{ago}, exit code {found['exit']}: {found['reason']}")
    lines = [f"{folder}: {state}, {meaning}"]
    if found["step"] is not None:
        progress = f"step {found['step']} of {found['steps']}"
        if state == "running" and found["step_time"]:
            progress += f", the last one {_span(found['age'] + found['time'] - found['step_time'])} ago"
        if state == "running" and found["images_per_second"]:
            progress += f", {found['images_per_second']:.0f} images/s, {_span(found['eta_seconds'])} to go"
        saved = found["checkpoint"]
        lines += [progress, "no checkpoint yet" if saved is None else f"newest checkpoint: step {saved}"]
    return "\n".join(lines)


def _span(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole % 60} s"

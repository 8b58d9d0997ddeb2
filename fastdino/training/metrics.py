"""What a run reports: a progress bar, metrics.jsonl and TensorBoard."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdino.training.monitoring.monitors import Monitors

log = logging.getLogger(__name__)

SILENCE = 60.0  # seconds after which a log file gets a line, however far the next report is
WEEKS = 14 * 86400.0  # seconds; a longer run is likely a mistake, and says so
UNITS = (("year", 365 * 86400.0), ("week", 7 * 86400.0), ("day", 86400.0), ("hour", 3600.0), ("minute", 60.0))


class Metrics:
    """Writes one JSON line per report and the same numbers to TensorBoard; rank 0 only.

    A disk that refuses a line is warned of once; training goes on.

    Args:
        folder: the run folder. Lines of steps after ``start_step`` are dropped: a killed run wrote them, and this one
            will write them again.
        start_step, total_steps: of the run; the progress bar goes from one to the other.
        global_batch: images per step over all ranks.
        compiles: the first step compiles kernels, so its time says nothing about those after it.
        meter: what a pace in images/s means for a device, by name; see :class:`fastdino.training.flops.Meter`.
        monitors: are told the same.

    Attributes:
        last: the newest value of each name in metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        total_steps: int,
        global_batch: int,
        compiles: bool = False,
        meter: Callable[[float], dict[str, float]] = lambda images_per_second: {},
        monitors: Monitors | None = None,
    ) -> None:
        self.path, self._meter, self._monitors = folder / "metrics.jsonl", meter, monitors
        self._warned: set[str] = set()
        self.last: dict[str, Any] = {}
        self._drop_after(start_step)
        self._board = self._open_board(folder / "tensorboard", start_step)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None)
        self._clock = _Clock(start_step, total_steps, global_batch)
        self._outlook = _Outlook(start_step, total_steps, compiles)
        self._spoke = time.monotonic()

    def restart_clock(self, step: int) -> None:
        """Leaves what happened since the last report out of the pace: an evaluation, a checkpoint, a compiler."""
        self._clock = _Clock(step, self._clock.total_steps, self._clock.global_batch)

    def times(self, step: int) -> bool:
        """Whether the time of ``step`` tells how long the run takes, so that it is worth waiting for the device."""
        return step <= self._outlook.start_step + 2

    def compiled(self, step: int) -> bool:
        """Whether kernels were compiled in ``step``, so that its time says nothing about those after it."""
        return self._outlook.compiles and step == self._outlook.start_step + 1

    def advance(self, step: int, seconds: float, waited: float) -> None:
        """One step is done: number ``step``, in so many seconds, of which it waited some for views."""
        self._bar.update()
        self._clock.waiting += waited
        for text, alarming in self._outlook.lines(step, seconds, waited):
            self.say(text, logging.WARNING if alarming else logging.INFO)
        if self._bar.disable and time.monotonic() - self._spoke > SILENCE:
            self.say(f"step {step} of {self._clock.total_steps}", logging.INFO)

    def report(self, step: int, values: dict[str, float], **more: float | int | str) -> dict[str, float]:
        """Writes ``values`` and the pace since the last report; returns both."""
        values = {**values, **self._clock.lap(step)}
        values |= self._meter(values["images_per_second"])
        self.write(step, {**more, **values})
        parts = [name for name in values if name.startswith("loss_")]
        more_to_say = [*parts, "patch_cos"] if len(parts) > 1 else []
        shown = {
            "loss": f"{values['loss']:.3f}",
            **{name.removeprefix("loss_"): f"{values[name]:.3f}" for name in more_to_say if name in values},
            **_pace(values),
        }
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:  # not a terminal: a log file wants lines
            pace = f"{_pairs(shown)}  eta {_hms(values['eta_seconds'])}"
            self.say(f"step {step} of {self._clock.total_steps}  {pace}", logging.INFO)
        return values

    def write(self, step: int, values: dict[str, float | int | str]) -> None:
        """Writes ``values`` as one line and to TensorBoard, keeps them in ``last`` and tells the monitors."""
        self.last |= values
        try:
            _append(self.path, json.dumps({"step": step, **values}).encode() + b"\n")
        except OSError as error:
            self._warn(str(self.path), error, "lines are missing there")
        if self._monitors:
            self._monitors.write(step, values)
        if self._board is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            self._warn("TensorBoard's events", error, "they end here")
            self._board = None

    def say(self, text: str, level: int = logging.WARNING) -> None:
        """A line above the progress bar."""
        self._spoke = time.monotonic()
        with tqdm.external_write_mode():
            log.log(level, text)

    def close(self) -> None:
        """Ends the bar and TensorBoard's file."""
        self._bar.close()
        try:
            if self._board is not None:
                self._board.close()
        except OSError as error:
            self._warn("TensorBoard's events", error, "their end is missing")

    def _open_board(self, folder: Path, start_step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        try:
            # It is flushed at every report: what its own thread fails to write would be a traceback there.
            return SummaryWriter(str(folder), purge_step=start_step, flush_secs=10**9)
        except OSError as error:
            self._warn("TensorBoard's events", error, "this run has none")
            return None

    def _drop_after(self, step: int) -> None:
        """Keeps the whole lines of steps up to ``step``; a killed run or a power cut leaves others."""
        temporary = self.path.with_name(f".{self.path.name}")
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            parsed = [_parse(line) for line in lines]
            broken = [line for line, values in zip(lines, parsed, strict=True) if values is None]
            kept = [line for line, values in zip(lines, parsed, strict=True) if values and values["step"] <= step]
            if broken:
                log.warning("%s: dropped %d lines that are not whole: %.60r", self.path, len(broken), broken[0])
            self.last = {k: v for values in parsed if values and values["step"] <= step for k, v in values.items()}
            if len(kept) < len(lines):
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
                os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._warn(str(self.path), error, "lines of steps to come may stand there twice")

    def _warn(self, what: str, error: OSError, meaning: str) -> None:
        """Once for each file."""
        if what not in self._warned:
            self._warned.add(what)
            reason = error.strerror or str(error)
            log.warning("%s cannot be written (%s): training goes on, %s", what, reason, meaning)


class _Clock:
    """Pace between two reports."""

    def __init__(self, step: int, total_steps: int, global_batch: int) -> None:
        self.step, self.total_steps, self.global_batch = step, total_steps, global_batch
        self.started = time.perf_counter()
        self.waiting = 0.0

    def lap(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed, steps = now - self.started, max(step - self.step, 1)
        pace = {
            "images_per_second": steps * self.global_batch / elapsed,
            "data_wait": self.waiting / elapsed,
            "step_seconds": elapsed / steps,
            "eta_seconds": (self.total_steps - step) * elapsed / steps,
        }
        self.step, self.started, self.waiting = step, now, 0.0
        return pace


class _Outlook:
    """How long the run will take, as soon as a step has been seen: the first, or the second if it differs."""

    def __init__(self, start_step: int, total_steps: int, compiles: bool) -> None:
        self.start_step, self.total_steps, self.compiles = start_step, total_steps, compiles
        self._first = 0.0
        self._alarmed = False

    def lines(self, step: int, seconds: float, waited: float) -> list[tuple[str, bool]]:
        """What there is to say after ``step``, and whether it is a warning."""
        left, taken = self.total_steps - step, f"step {step} took {seconds:.3g} s"
        if step == self.start_step + 1:
            self._first = seconds
            taken += f", {waited:.3g} s of it waiting for images"
            if self.compiles:
                return [(f"{taken}. It compiled the kernels: the next one tells the pace", False)]
        elif step > self.start_step + 2 or not (self.compiles or seconds < self._first / 2):
            return []
        remaining = left * seconds
        lines = [(f"{taken}: about {about(remaining)} for the {left} steps to the end", False)]
        if remaining > WEEKS and not self._alarmed:
            self._alarmed = True
            remedy = "lower run.epochs, views.num_local or views.global_size, or take a smaller model.arch"
            lines.append(
                (f"this machine would train for {about(remaining)}: use a GPU or more ranks, or {remedy}", True)
            )
        return lines


def about(seconds: float) -> str:
    """A duration in the unit that a person would use."""
    for name, size in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}s"
    return f"{seconds:.0f} seconds"


def _append(path: Path, line: bytes) -> None:
    """Adds a line whole or not at all. The file is opened anew each time: it may be gone, or its server back."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _parse(line: bytes) -> dict[str, Any] | None:
    """The numbers of a line; None when it is not whole."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or bytes that are no UTF-8
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _pace(values: dict[str, float]) -> dict[str, str]:
    """The pace as a line shows it, and what is known of the devices."""
    total, each = values["images_per_second"], values.get("images_per_second_per_device")
    shown = {"img/s": f"{total:.0f}", "data": f"{values['data_wait']:.0%}"}
    if each is not None and each != total:
        shown["img/s"] += f" ({each:.0f} each)"
    if "mfu" in values:
        shown["mfu"] = f"{values['mfu']:.0%}"
    if "peak_memory_gb" in values:
        shown["mem"] = f"{values['peak_memory_gb']:.1f}G"
    return shown


def _pairs(values: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _hms(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

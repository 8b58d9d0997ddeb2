"""What a run reports: a progress bar, metrics.jsonl and TensorBoard."""

import json
import logging
import time
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger(__name__)


class Metrics:
    """Writes one JSON line per report and the same numbers to TensorBoard; rank 0 only.

    Args:
        folder: the run folder. Lines of steps after ``start_step`` are dropped: a killed run wrote them, and this one
            will write them again.
        start_step, total_steps: of the run; the progress bar goes from one to the other.
        global_batch: images per step over all ranks.
    """

    def __init__(self, folder: Path, start_step: int, total_steps: int, global_batch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.path = folder / "metrics.jsonl"
        kept = _lines_until(self.path, start_step)
        self.path.write_text("".join(kept))
        self._file = self.path.open("a", buffering=1)  # by line, so that a killed run loses none
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None)
        self._clock = _Clock(start_step, total_steps, global_batch)

    def waited(self, seconds: float) -> None:
        """Adds time that the step spent waiting for views."""
        self._clock.waiting += seconds

    def restart_clock(self, step: int) -> None:
        """Leaves what happened since the last report out of the pace: an evaluation, a checkpoint."""
        self._clock = _Clock(step, self._clock.total_steps, self._clock.global_batch)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def report(self, step: int, values: dict[str, float], **more: float | int | str) -> dict[str, float]:
        """Writes ``values`` and the pace since the last report; returns both."""
        values = {**values, **self._clock.lap(step)}
        self.write(step, {**more, **values})
        shown = {
            "loss": f"{values['loss']:.3f}",
            "img/s": f"{values['images_per_second']:.0f}",
            "data": f"{values['data_wait']:.0%}",
        }
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:  # not a terminal: a log file wants lines
            log.info(
                "step %d of %d  %s  eta %s", step, self._bar.total or 0, _pairs(shown), _hms(values["eta_seconds"])
            )
        return values

    def write(self, step: int, values: dict[str, float | int | str]) -> None:
        """Writes ``values`` as one line and to TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        with tqdm.external_write_mode():
            log.warning(text)

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        self._file.close()
        self._board.close()


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


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines of ``path`` of steps up to ``step``; the last line of a killed run may be cut."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            log.warning("%s: dropped a line that is not whole: %.60r", path, line)
    return kept


def _pairs(values: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _hms(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

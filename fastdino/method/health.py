"""Alarms: what a log line shows when training has collapsed, and what to change."""

import math
from collections import deque

PATIENCE = 10  # log lines in a row: one line is noise, ten are a state
NEAR = 0.005  # share of ln K that counts as sitting at 0 or at ln K


class Health:
    """Watches the logged statistics of the teacher; :meth:`check` returns the alarms to raise, each once.

    Args:
        num_prototypes: K; a loss or entropy of ln K is that of a uniform distribution.
    """

    def __init__(self, num_prototypes: int) -> None:
        self.uniform = math.log(num_prototypes)
        self._recent: deque[dict[str, float]] = deque(maxlen=PATIENCE)
        self._raised: set[str] = set()

    def check(self, statistics: dict[str, float], first_epoch: bool) -> list[str]:
        """Alarms that this log line raises.

        Args:
            statistics: floats under the names of :meth:`fastdino.method.dino.Dino.statistics`.
            first_epoch: no alarm is raised, because every run starts near ln K.
        """
        self._recent.append(statistics)
        if first_epoch or len(self._recent) < PATIENCE:
            return []
        states = {
            f"the loss sits at ln K = {self.uniform:.3f}: the student predicts the uniform distribution. "
            "Lower loss.teacher_temp or optim.lr, or freeze the prototypes longer": self._sits("loss", self.uniform),
            f"the teacher's entropy sits at ln K = {self.uniform:.3f}: its targets are uniform and teach nothing. "
            "Lower loss.teacher_temp": self._sits("teacher_entropy", self.uniform),
            "all views have the same target: the teacher has collapsed to one prototype. Lower optim.lr, and check "
            "that loss.center_momentum is below 1": self._sits("usage_entropy", 0.0),
            "the features of all images are the same: the backbone has collapsed. Lower optim.lr": (
                all(line["feature_std"] < NEAR for line in self._recent)
            ),
        }
        new = [text for text, holds in states.items() if holds and text not in self._raised]
        self._raised.update(new)
        return new

    def _sits(self, name: str, value: float) -> bool:
        return all(abs(line[name] - value) < NEAR * self.uniform for line in self._recent)

"""Alarms: what a log line shows when training has collapsed, and what to change."""

import math
from collections import deque
from typing import Any

PATIENCE = 10  # log lines in a row: one line is noise, ten are a state
NEAR = 0.005  # share of ln K that counts as sitting at 0 or at ln K
ALIKE = 0.97  # cosine of patches with their CLS token from which on they tell nothing of their own


class Health:
    """Watches the logged statistics of the teacher; :meth:`check` returns the alarms to raise, each once.

    Args:
        num_prototypes: K; a loss or entropy of ln K is that of a uniform distribution.
        num_patch_prototypes: K' of the patches; None: as many. Their statistics are watched where there are any.
    """

    def __init__(self, num_prototypes: int, num_patch_prototypes: int | None = None) -> None:
        self.uniform, self.patch_uniform = math.log(num_prototypes), math.log(num_patch_prototypes or num_prototypes)
        self._recent: deque[dict[str, float]] = deque(maxlen=PATIENCE)
        self._raised: set[str] = set()

    def check(self, statistics: dict[str, float], first_epoch: bool) -> list[str]:
        """Alarms that this log line raises.

        Args:
            statistics: floats under the names of :meth:`fastdino.method.dino.Dino.statistics`, and ``loss_dino``.
            first_epoch: no alarm of a loss or an entropy is raised, because every run starts near ln K. No run starts
                with patches like their CLS token, and a short one is over soon after its first epoch.
        """
        self._recent.append(statistics)
        if len(self._recent) < PATIENCE:
            return []
        states = self._patches_alike() | ({} if first_epoch else self._targets_collapsed())
        new = [text for text, holds in states.items() if holds and text not in self._raised]
        self._raised.update(new)
        return new

    def check_rank(self, evaluation: dict[str, Any]) -> list[str]:
        """The alarm that an evaluation raises whose ``rankme`` is below ``rankme_at_start``, where it has that."""
        rank, start = evaluation["rankme"], evaluation.get("rankme_at_start")
        if start is None or rank >= start or "rankme" in self._raised:
            return []
        self._raised.add("rankme")
        return [
            f"RankMe of the teacher is {rank:.1f}, and was {start:.1f} before the first step: its features use fewer "
            "directions than it began with. If it stays there, use loss.koleo_weight=0.1 or lower optim.lr"
        ]

    def _patches_alike(self) -> dict[str, bool]:
        alike = all(line.get("patch_cos", 0.0) > ALIKE for line in self._recent)
        text = (
            f"the patches have become the CLS token (their cosine with it is above {ALIKE}): use "
            "loss.patch_targets=sinkhorn with loss.koleo_weight=0.1, or lower loss.patch_weight"
        )
        return {text: alike}

    def _targets_collapsed(self) -> dict[str, bool]:
        return {
            f"the loss sits at ln K = {self.uniform:.3f}: the student predicts the uniform distribution. "
            "Lower loss.teacher_temp or optim.lr, or freeze the prototypes longer": self._sit(
                "loss_dino", self.uniform
            ),
            f"the teacher's entropy sits at ln K = {self.uniform:.3f}: its targets are uniform and teach nothing. "
            "Lower loss.teacher_temp": self._sit("teacher_entropy", self.uniform),
            "all views have the same target: the teacher has collapsed to one prototype. Lower optim.lr, and check "
            "that loss.center_momentum is below 1": self._sit("usage_entropy", 0.0),
            "the features of all images are the same: the backbone has collapsed. Lower optim.lr": (
                all(line["feature_std"] < NEAR for line in self._recent)
            ),
            f"the entropy of the patches' targets sits at ln K = {self.patch_uniform:.3f}: they are uniform and teach "
            "nothing. Lower loss.teacher_temp": self._sit("patch_entropy", self.patch_uniform),
            "all patches have the same target: the teacher has collapsed to one prototype for them. Use "
            "loss.patch_targets=sinkhorn, or lower optim.lr": self._sit("patch_usage_entropy", 0.0),
        }

    def _sit(self, name: str, value: float) -> bool:
        """True when the entropy or loss ``name`` has been at ``value`` in every line; False for one that is absent."""
        return all(abs(line.get(name, math.inf) - value) < NEAR * self.uniform for line in self._recent)

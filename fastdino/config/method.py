"""Settings of the loss."""

from dataclasses import dataclass
from typing import Literal

from fastdino.config.group import Group


@dataclass(frozen=True, kw_only=True)
class LossConfig(Group):
    """Temperatures and centering of the self-distillation loss."""

    student_temp: float = 0.1
    """Divides the student's logits; constant."""
    teacher_temp: float = 0.04
    """After the warm-up. DINO's authors found values over 0.07 unstable."""
    warmup_teacher_temp: float = 0.04
    """Where the warm-up starts; lower it when the loss does not fall at first."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs over which the teacher's temperature rises linearly to teacher_temp; DINO's longer runs use 30."""
    temp_warmup_by: Literal["epoch", "step"] = "epoch"
    """The teacher's temperature rises once per epoch as in DINO v1, or at every step as in DINOv2."""
    center_momentum: float = 0.9
    """Weight of the center's old value in its moving average over steps."""
    patch_weight: float = 0.0
    """Weight of iBOT's loss on masked patches; 0: no masks."""

    def check(self) -> None:
        self.require(self.student_temp > 0, "student_temp", "positive", "it divides the logits")
        bounds = f"in (0, loss.student_temp={self.student_temp}]"
        for name in ("teacher_temp", "warmup_teacher_temp"):
            sharper = 0 < getattr(self, name) <= self.student_temp
            self.require(sharper, name, bounds, "the teacher has to be sharper than the student")
        self.require(self.warmup_teacher_temp_epochs >= 0, "warmup_teacher_temp_epochs", "0 or more")
        moves = 0 <= self.center_momentum < 1
        self.require(moves, "center_momentum", "in [0, 1)", "at 1 the center never moves and training collapses")
        self.require(self.patch_weight >= 0, "patch_weight", "0 or more")

"""Settings of the loss."""

from dataclasses import dataclass

from fastdino.config.errors import require


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Temperatures and centering of the self-distillation loss."""

    student_temp: float = 0.1
    """Divides the student's logits; constant."""
    teacher_temp: float = 0.04
    """After the warm-up. DINO's authors found values over 0.07 unstable."""
    warmup_teacher_temp: float = 0.04
    """Where the warm-up starts; lower it when the loss does not fall at first."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs over which the teacher's temperature rises linearly to teacher_temp; DINO's longer runs use 30."""
    center_momentum: float = 0.9
    """Weight of the center's old value in its moving average over steps."""

    def __post_init__(self) -> None:
        require(self.student_temp > 0, "loss.student_temp", self.student_temp, "positive", "it divides the logits")
        for name in ("teacher_temp", "warmup_teacher_temp"):
            require(
                0 < getattr(self, name) <= self.student_temp, f"loss.{name}", getattr(self, name),
                f"in (0, loss.student_temp={self.student_temp}]", "the teacher has to be sharper than the student",
            )  # fmt: skip
        warmup = self.warmup_teacher_temp_epochs
        require(warmup >= 0, "loss.warmup_teacher_temp_epochs", warmup, "0 or more", "it is a count")
        require(
            0 <= self.center_momentum < 1, "loss.center_momentum", self.center_momentum, "in [0, 1)",
            "at 1 the center never moves and training collapses",
        )  # fmt: skip

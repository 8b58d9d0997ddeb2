"""Settings of the loss."""

from dataclasses import dataclass
from typing import Literal

from fastdino.config.group import Group


@dataclass(frozen=True, kw_only=True)
class LossConfig(Group):
    """What the student is asked to predict, and the weights of the losses beside DINO's own, which is 1."""

    student_temp: float = 0.1
    """Divides the student's logits; constant."""
    teacher_temp: float = 0.04
    """After the warm-up. DINO's authors found values over 0.07 unstable."""
    warmup_teacher_temp: float = 0.04
    """Where the warm-up starts; lower it when the loss does not fall at first."""
    warmup_teacher_temp_epochs: float = 0
    """Epochs over which the teacher's temperature rises linearly to teacher_temp; DINO's longer runs use 30."""
    temp_warmup_by: Literal["epoch", "step"] = "epoch"
    """The teacher's temperature rises once per epoch as in DINO v1, or at every step as in DINOv2."""
    targets: Literal["center", "sinkhorn"] = "center"
    """What keeps the teacher from one prototype for all images: center subtracts the mean logits of the steps before
    (DINO v1), sinkhorn makes the samples of a batch use every prototype equally. With accumulation each micro batch is
    balanced on its own."""
    patch_targets: Literal["center", "sinkhorn"] | None = None
    """The same for patches; None: as targets. In short runs sinkhorn keeps patches from becoming copies of the CLS."""
    center_momentum: float = 0.9
    """Weight of the center's old value in its moving average over steps."""
    patch_weight: float = 0.0
    """iBOT's loss: the student predicts the teacher's output at patches that are hidden from it. ViT only."""
    koleo_weight: float = 0.0
    """KoLeo's loss, summed over the two global views: features keep away from their nearest neighbour among a rank's
    images of a micro batch. DINOv2 uses 0.1."""

    def check(self) -> None:
        self.require(self.student_temp > 0, "student_temp", "positive", "it divides the logits")
        bounds = f"in (0, loss.student_temp={self.student_temp}]"
        for name in ("teacher_temp", "warmup_teacher_temp"):
            sharper = 0 < getattr(self, name) <= self.student_temp
            self.require(sharper, name, bounds, "the teacher has to be sharper than the student")
        self.require(self.warmup_teacher_temp_epochs >= 0, "warmup_teacher_temp_epochs", "0 or more")
        for name in ("patch_weight", "koleo_weight"):
            self.require(getattr(self, name) >= 0, name, "0 or more", "0 leaves the loss out")
        moves = 0 <= self.center_momentum < 1
        self.require(moves, "center_momentum", "in [0, 1)", "at 1 the center never moves and training collapses")

    @property
    def uses(self) -> set[str]:
        """The kinds of targets that are made: "center", "sinkhorn" or both."""
        return {self.targets} | ({self.patch_targets or self.targets} if self.patch_weight else set())

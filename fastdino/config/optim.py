"""Settings of the optimizer, its schedules and the engine that runs the step."""

from dataclasses import dataclass
from typing import Literal

from fastdino.config.group import Group


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Group):
    """Optimizer, schedules and the teacher's momentum."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw for ViTs, sgd for convolutional networks, lars for very large batches."""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 256; scaled linearly by global batch / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end; not scaled, as in DINO v1."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start; biases and norms have none."""
    weight_decay_end: float = 0.4
    """Weight decay at the end of its cosine schedule."""
    clip: float = 3.0
    """Largest gradient norm; 0 does not clip."""
    clip_mode: Literal["tensor", "global"] = "tensor"
    """Clip each parameter tensor by its own norm as DINO v1 does, or all of them by their common norm."""
    freeze_last_layer: int = 1
    """Epochs during which the prototypes do not move. Try more when the loss does not fall."""
    teacher_momentum: float = 0.996
    """Weight of the teacher's old value at the start; DINO's authors use 0.9995 with a global batch of 256."""
    teacher_momentum_end: float = 1.0
    """Weight of the teacher's old value at the end of its cosine schedule."""

    def check(self) -> None:
        for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "freeze_last_layer"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        start, end = self.teacher_momentum, self.teacher_momentum_end
        self.require(0 <= start <= 1, "teacher_momentum", "in [0, 1]", "it is the weight of the teacher's old value")
        self.require(start <= end <= 1, "teacher_momentum_end", f"in [{start}, 1]", "the momentum only rises")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Group):
    """What runs the step, in which precision, sharded how."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """torch is the reference: nothing is sharded."""
    zero_stage: Literal["auto", 0, 1, 2] = "auto"
    """DeepSpeed ZeRO: 0 shards nothing, 1 the optimizer and the teacher, 2 the gradients too. auto: 1, or 0 for a
    single process, which has nobody to share with."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. Master weights, moments, teacher, center and loss are fp32 always.
    Under fp32 torch's own settings hold: matrix products are exact, convolutions TF32."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step; teacher, center and schedules move once per step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""

    def check(self) -> None:
        self.require(self.accumulate >= 1, "accumulate", "at least 1")

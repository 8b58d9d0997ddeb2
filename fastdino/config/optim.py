"""Settings of the optimizer, its schedules and the engine that runs the step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdino.config.group import Group


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Group):
    """Optimizer, schedules and the teacher's momentum."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw for ViTs, sgd for convolutional networks, lars for very large batches."""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 256, or of 1024 under lr_rule=sqrt_1024."""
    lr_rule: Literal["linear_256", "sqrt_1024"] = "linear_256"
    """The peak is lr times global batch / 256 as in DINO v1, or times sqrt(global batch / 1024) as in DINOv2."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """constant: learning rate (after its warm-up), weight decay and momentum stay at their start, so that a run may be
    made longer at any time."""
    min_lr: float = 1e-6
    """Learning rate at the end; not scaled, as in DINO v1."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start; biases and norms have none."""
    weight_decay_end: float = 0.4
    """Weight decay at the end of its cosine schedule."""
    layer_decay: float = 1.0
    """The learning rate of each block is this times that of the next one, the last block's this times the final norm's;
    DINOv2 has 0.9 at lr 4e-3, and 1 at lr 2e-4. adamw and our ViT only."""
    patch_embed_lr: float = 1.0
    """Multiplies the patch embedding's learning rate once more (DINOv2: 0.2); 0 freezes it. adamw and our ViT only."""
    beta2: float = 0.999
    """adamw's weight of the old mean of squared gradients."""
    clip: float = 3.0
    """Largest gradient norm; 0 does not clip."""
    clip_mode: Literal["tensor", "module", "global"] = "tensor"
    """What is clipped by its norm: each parameter tensor as in DINO v1; backbone and heads, each as a whole, as in
    DINOv2; or all parameters together."""
    freeze_last_layer: float = 1
    """Epochs during which the prototypes do not move. Try more when the loss does not fall."""
    freeze_how: Literal["skip", "lr"] = "skip"
    """skip: frozen prototypes have no moments yet, as in DINO v1. lr: their learning rate is 0 while their moments run,
    as in DINOv2; adamw only."""
    teacher_momentum: float = 0.996
    """Weight of the teacher's old value at the start; DINO's authors use 0.9995 with a global batch of 256."""
    teacher_momentum_end: float = 1.0
    """Weight of the teacher's old value at the end of its cosine schedule."""

    def check(self) -> None:
        for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "freeze_last_layer"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        self.require(0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]", "a later block never learns more slowly")
        self.require(self.patch_embed_lr >= 0, "patch_embed_lr", "0 or more")
        self.require(0 <= self.beta2 < 1, "beta2", "in [0, 1)")
        for name, usual in {"layer_decay": 1, "patch_embed_lr": 1, "freeze_how": "skip"}.items():
            works = self.name == "adamw" or getattr(self, name) == usual
            self.require(works, name, f"{usual} with optim.name={self.name}", "only adamw has a rate per parameter")
        start, end = self.teacher_momentum, self.teacher_momentum_end
        self.require(0 <= start <= 1, "teacher_momentum", "in [0, 1]", "it is the weight of the teacher's old value")
        self.require(start <= end <= 1, "teacher_momentum_end", f"in [{start}, 1]", "the momentum only rises")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Group):
    """What runs the step, in which precision, sharded how."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """torch is the reference: nothing is sharded."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO: 0 shards nothing, 1 the optimizer and the teacher, 2 the gradients too, 3 also the weights, which
    are gathered block by block. auto: 1, or 0 for a single process, which has nobody to share with."""
    deepspeed: Path | None = None
    """A JSON file of DeepSpeed's, for its bucket sizes, communication and profilers; what fastdino decides it may not
    set."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. Master weights, moments, teacher, center and loss are fp32 always.
    Under fp32 torch's own settings hold: matrix products are exact, convolutions TF32."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step; teacher, center and schedules move once per step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block and of the heads: faster and smaller steps after a first one that takes a minute.
    auto: on a GPU. What cannot be compiled runs eagerly, with a warning."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replays whole steps as one launch each, where kernels are launched more slowly than they run: small models on
    fast GPUs. adamw, and ZeRO 0 or engine.name=torch; what cannot be captured is launched as ever, with a warning.
    auto: where it can be, for a single process."""
    teacher_stream: bool = False
    """The teacher works beside the student on the GPU, where either alone leaves room; it takes more memory."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What the student's blocks compute again in the backward pass rather than keep. selective: norms and the MLP's
    hidden layer, most of what a block keeps for a sixth of its work; our ViT only. full: everything but its input."""
    fp8: bool = False
    """The blocks' linear layers multiply in fp8, but for the weights' gradients, as in DINOv3: of our ViTs of width
    1024 and more, in bf16, on GPUs of compute capability 8.9 and more, compiled, which fuses the rounding."""

    def uses_bf16(self, device: str) -> bool:
        """True when weights and gradients of the forward and backward passes are bf16 on a device of this type."""
        return self.precision == "bf16" or (self.precision == "auto" and device == "cuda")

    def check(self) -> None:
        self.require(self.accumulate >= 1, "accumulate", "at least 1")
        if self.fp8:
            beside = "with engine.fp8=True"
            self.require(self.precision != "fp32", "precision", f"auto or bf16 {beside}")
            self.require(self.device != "cpu", "device", f"auto or cuda {beside}", "a CPU has no products in fp8")

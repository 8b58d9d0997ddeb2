"""Every setting of fastdino, with its unit, its default and the reason for its bounds.

The defaults are those of DINO v1's training command. Each group checks itself when it is made; :class:`Config` checks
what concerns two groups. A wrong value raises :class:`ConfigError`, whose message says what, where and what to do.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MAX_VIEWS = 32  # S, student views of one image that the fused loss takes
VIT_SIZES = ("nano", "tiny", "small", "base", "large", "huge", "giant")


class UserError(Exception):
    """Something that a user can mend; the message says what, where and what to do. The command exits with code 2."""


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the setting, its value and the remedy."""


def _require(condition: bool, path: str, value: object, allowed: str, reason: str) -> None:
    if not condition:
        raise ConfigError(f"{path}={value!r} must be {allowed}: {reason}")


def _require_range(path: str, low_high: tuple[float, float]) -> None:
    low, high = low_high
    _require(
        0 < low <= high <= 1, path, low_high, "two numbers with 0 < low <= high <= 1", "shares of the image's area"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: an image becomes a feature vector."""

    arch: str = "vit_small"
    """vit_tiny|small|base|large|huge|giant (vit_nano for tests and the demo), or timm:NAME for any backbone of timm."""
    patch_size: int = 16
    """Side of a patch in pixels; ViT only."""
    drop_path: float = 0.1
    """Probability of dropping a residual branch at the last block; rises linearly from 0 over depth. Student only."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """auto: xformers' memory-efficient attention over all packed views where it runs, torch's SDPA elsewhere."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """How position embeddings start: learned from noise as in DINO v1, or from sines and cosines (short runs)."""
    init: Literal["trunc_normal", "xavier"] = "trunc_normal"
    """How linear layers start: trunc_normal(0.02) as in DINO v1, or Xavier-uniform (short runs of narrow models)."""
    weights: Path | None = None
    """Backbone weights to start from (.safetensors, timm's or DINO v1's names); default: start from noise."""

    def __post_init__(self) -> None:
        vit = self.arch.removeprefix("vit_")
        known = ", ".join(f"vit_{size}" for size in VIT_SIZES)
        _require(
            self.arch.startswith("timm:") or (self.arch.startswith("vit_") and vit in VIT_SIZES),
            "model.arch", self.arch, f"one of {known} or timm:NAME", "no other backbone is known",
        )  # fmt: skip
        _require(self.patch_size > 0, "model.patch_size", self.patch_size, "a positive number of pixels", "a side")
        _require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "in [0, 1)", "it is a probability")

    @property
    def is_vit(self) -> bool:
        """True for our own ViT, which has patches and packs views of several sizes."""
        return not self.arch.startswith("timm:")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection head: a feature vector becomes K logits."""

    num_prototypes: int = 65536
    """K, width of the head's output (DINO v1: out_dim)."""
    num_layers: int = 3
    """Linear layers before the prototypes."""
    hidden_dim: int = 2048
    """Width of the MLP's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised vector that is compared with the prototypes."""
    batch_norm: bool = False
    """BatchNorm between the MLP's layers (DINO v1: use_bn_in_head). Over several GPUs each one waits for its device."""
    freeze_prototype_norm: bool = True
    """Keep each prototype at length 1 (DINO v1: norm_last_layer). False usually scores higher for ViT-S; True is safer
    for ViT-B and larger."""

    def __post_init__(self) -> None:
        for name in ("num_prototypes", "num_layers", "hidden_dim", "bottleneck_dim"):
            _require(getattr(self, name) >= 1, f"head.{name}", getattr(self, name), "at least 1", "it is a width")
        _require(self.num_prototypes >= 2, "head.num_prototypes", self.num_prototypes, "at least 2", "ln K would be 0")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Multi-crop: an image becomes 2 global and L local views. Probabilities are DINO v1's."""

    global_size: int = 224
    """Side of a global view in pixels."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global view covers. With no local views use 0.14 1."""
    local_size: int = 96
    """Side of a local view in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local view covers."""
    num_local: int = 8
    """L, local views per image; 0 trains on the two global views alone."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Largest rotation in degrees, either way."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Colour jitter of brightness, contrast, saturation and hue (hue at most 0.5, the whole circle)."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur in the first global, second global and local views."""
    solarize: float = 0.2
    """Probability of solarization in the second global view."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            _require(getattr(self, name) >= 1, f"views.{name}", getattr(self, name), "a positive size", "pixels")
        _require_range("views.global_scale", self.global_scale)
        _require_range("views.local_scale", self.local_scale)
        _require(
            0 <= self.num_local <= MAX_VIEWS - 2, "views.num_local", self.num_local, f"in [0, {MAX_VIEWS - 2}]",
            f"the fused loss holds at most {MAX_VIEWS} views of an image, two of them global",
        )  # fmt: skip
        for name in ("flip", "jitter", "grayscale", "solarize"):
            _require(0 <= getattr(self, name) <= 1, f"views.{name}", getattr(self, name), "in [0, 1]", "a probability")
        _require(all(0 <= p <= 1 for p in self.blur), "views.blur", self.blur, "in [0, 1]", "they are probabilities")
        _require(0 <= self.rotate <= 180, "views.rotate", self.rotate, "in [0, 180]", "degrees either way")
        _require(
            min(self.jitter_strength) >= 0 and self.jitter_strength[3] <= 0.5, "views.jitter_strength",
            self.jitter_strength, "four numbers >= 0, the last at most 0.5", "a hue shift of 0.5 is the whole circle",
        )  # fmt: skip

    @property
    def num_views(self) -> int:
        """S, student views per image."""
        return 2 + self.num_local


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from."""

    root: str = ""
    """A folder of images, in any nesting; or the word shapes: rendered objects that need no download."""
    num_images: int = 10000
    """Images per epoch of shapes; a folder has as many as it holds."""
    image_size: int = 256
    """Side in pixels at which shapes are rendered."""
    normalize: Literal["imagenet", "image"] = "imagenet"
    """Subtract ImageNet's mean and divide by its deviation, or those of each channel of each view (short runs)."""
    num_workers: int = 10
    """Processes per rank that decode and augment; 0 works in the training process."""
    max_bad: float = 0.01
    """Largest share of an epoch's images that may be unreadable; above it the run stops."""

    def __post_init__(self) -> None:
        _require(self.num_images >= 1, "data.num_images", self.num_images, "at least 1", "an epoch needs images")
        _require(self.image_size >= 8, "data.image_size", self.image_size, "at least 8 pixels", "objects must show")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more", "it is a count")
        _require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "in [0, 1]", "it is a share")


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
        _require(self.student_temp > 0, "loss.student_temp", self.student_temp, "positive", "it divides the logits")
        for name in ("teacher_temp", "warmup_teacher_temp"):
            _require(
                0 < getattr(self, name) <= self.student_temp, f"loss.{name}", getattr(self, name),
                f"in (0, loss.student_temp={self.student_temp}]", "the teacher has to be sharper than the student",
            )  # fmt: skip
        warmup = self.warmup_teacher_temp_epochs
        _require(warmup >= 0, "loss.warmup_teacher_temp_epochs", warmup, "0 or more", "it is a count")
        _require(
            0 <= self.center_momentum < 1, "loss.center_momentum", self.center_momentum, "in [0, 1)",
            "at 1 the center never moves and training collapses",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
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

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "freeze_last_layer"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more", "it is a magnitude")
        start, end = self.teacher_momentum, self.teacher_momentum_end
        _require(0 <= start <= 1, "optim.teacher_momentum", start, "in [0, 1]", "it is the old value's weight")
        _require(start <= end <= 1, "optim.teacher_momentum_end", end, f"in [{start}, 1]", "momentum rises")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
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

    def __post_init__(self) -> None:
        _require(self.accumulate >= 1, "engine.accumulate", self.accumulate, "at least 1", "it is a count")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length of the run, where it is kept, what it reports."""

    dir: Path = Path("runs/default")
    """The run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/."""
    epochs: int = 100
    """Passes over the images."""
    local_batch: int = 64
    """B, images per rank in one forward pass. Global batch = local batch * ranks * engine.accumulate."""
    seed: int = 0
    """Start of all randomness: initial weights, order of images, views, drop path."""
    save_every: int = 1
    """Epochs between checkpoints; the last step is always saved."""
    save_every_steps: int = 0
    """Steps between checkpoints within an epoch; 0: only at epochs' ends."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 20
    """Epochs between checkpoints that are kept for good (DINO v1: saveckp_freq); 0: none."""
    log_every: int = 10
    """Steps between log lines; only these steps read the device."""
    knn_every: int = 10
    """Epochs between k-NN evaluations of the teacher; 0: never."""
    knn_root: str = ""
    """Class folders for the k-NN, or shapes. Default: shapes when training on shapes, else no k-NN."""
    max_nonfinite: int = 10
    """Skipped steps in a row (non-finite loss or gradient) after which the run stops."""

    def __post_init__(self) -> None:
        for name in ("epochs", "local_batch", "save_every", "keep", "log_every", "max_nonfinite"):
            _require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1", "it is a count")
        for name in ("save_every_steps", "keep_every", "knn_every", "seed"):
            _require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "0 or more", "it is a count")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.model.is_vit:
            for name in ("global_size", "local_size"):
                size, patch = getattr(self.views, name), self.model.patch_size
                if size % patch and (name == "global_size" or self.views.num_local):
                    below, above = size // patch * patch, -(-size // patch) * patch
                    remedy = f"use {below} or {above}" if below else f"use {above}"
                    raise ConfigError(f"views.{name}={size} is not a multiple of model.patch_size={patch}: {remedy}")
        if self.optim.warmup_epochs > self.run.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} is longer than run.epochs={self.run.epochs}: "
                "shorten the warm-up or train longer"
            )
        if self.model.attention == "xformers" and self.engine.device == "cpu":
            raise ConfigError(
                "model.attention='xformers' needs a GPU, and engine.device='cpu': xformers has no CPU path; "
                "use model.attention=auto or sdpa"
            )

    def to_json(self) -> str:
        """The whole config as indented JSON, which :meth:`from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads :meth:`to_json`. Raises ConfigError for text that is not a config of this version."""
        try:
            groups = json.loads(text)
            return cls(**{f.name: _group(f.type, f.name, groups.pop(f.name)) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a config of this version of fastdino: {error!r}") from error


def _group(kind: type, name: str, values: dict[str, Any]) -> Any:
    """One group from JSON: lists become tuples, path strings become paths."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := values.keys() - known.keys():
        raise ConfigError(f"unknown setting {name}.{sorted(unknown)[0]}: written by another version of fastdino")
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = tuple(value)
        elif isinstance(value, str) and "Path" in str(known[key].type):
            values[key] = Path(value)
    return kind(**values)

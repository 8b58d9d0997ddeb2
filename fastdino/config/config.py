"""All settings of a run, and the checks between groups."""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from fastdino.config.data import DataConfig, ViewsConfig
from fastdino.config.errors import ConfigError, require
from fastdino.config.method import LossConfig
from fastdino.config.model import HeadConfig, ModelConfig, PatchHeadConfig
from fastdino.config.optim import EngineConfig, OptimConfig
from fastdino.config.run import RunConfig

VIT_ONLY = (
    "patch_size attention packed pos_embed drop_path_rule interpolation image_size rope_scale registers layer_scale"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    patch_head: HeadConfig | None = None
    """A head for the patches of loss.patch_weight; None: they share that of the CLS token."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if type(self.patch_head) is HeadConfig:
            object.__setattr__(self, "patch_head", PatchHeadConfig(**vars(self.patch_head)))
        for name, kind in group_kinds().items():
            value = getattr(self, name)
            fits = isinstance(value, kind) or (value is None and name == "patch_head")
            require(fits, name, value, f"a {kind.__name__}")
        self._check_views()
        self._check_channels()
        self._check_losses()
        self._check_engine()
        self._check_lengths()
        self._check_rates()

    def _check_views(self) -> None:
        """Our own ViT takes sides of whole patches."""
        if self.model.is_vit:
            for name in ("global_size", "local_size"):
                size, patch = getattr(self.views, name), self.model.patch_size
                if size % patch and (name == "global_size" or self.views.num_local):
                    below, above = size // patch * patch, -(-size // patch) * patch
                    remedy = f"use {below} or {above}" if below else f"use {above}"
                    raise ConfigError(f"views.{name}={size} is not a multiple of model.patch_size={patch}: {remedy}")

    def _check_channels(self) -> None:
        """What is defined for red, green and blue is not asked of other channels."""
        views, channels = self.views, self.data.channels
        if channels != 3 and self.data.views == "device":
            raise ConfigError(
                f"data.views='device' makes views of 3 channels, and data.channels={channels}: set data.views=reference"
            )
        changes = {"data.normalize": "image"} if self.data.normalize == "imagenet" else {}
        if views.jitter and any(views.jitter_strength):
            changes["views.jitter"] = "0"
        if views.grayscale:
            changes["views.grayscale"] = "0"
        if channels != 3 and changes:
            names, flags = ", ".join(changes), " ".join(f"--{name} {value}" for name, value in changes.items())
            raise ConfigError(
                f"data.channels={channels}, and what is set needs red, green and blue ({names}): use {flags}"
            )

    def _check_losses(self) -> None:
        """A loss that is asked for has what it reads."""
        loss, arch = self.loss, self.model.arch
        if loss.patch_weight and not self.model.is_vit:
            raise ConfigError(
                f"loss.patch_weight={loss.patch_weight:g} hides patches behind a mask token, and {arch} has none: "
                "use one of our ViTs (model.arch=vit_...), or loss.patch_weight=0"
            )
        if self.patch_head is not None and not loss.patch_weight:
            raise ConfigError(
                "patch_head is a head for patches, and loss.patch_weight=0 reads none: give loss.patch_weight a value, "
                "or leave the patch head out (--patch-head None)"
            )
        if loss.koleo_weight and self.run.local_batch < 2:
            raise ConfigError(
                f"loss.koleo_weight={loss.koleo_weight:g} keeps an image from its nearest neighbour in the batch, and "
                "run.local_batch=1 has no other: use at least 2, or loss.koleo_weight=0"
            )

    def _check_engine(self) -> None:
        """What runs the step can run this network."""
        engine, model = self.engine, self.model
        if engine.fp8:
            reason = "only our ViTs have layers for it"
            require(model.is_vit, "engine.fp8", True, f"False with model.arch={model.arch}", reason)
        if model.attention not in ("auto", "sdpa") and engine.device == "cpu":
            raise ConfigError(
                f"model.attention='{model.attention}' needs a GPU, and engine.device='cpu': {model.attention} has no "
                "CPU path; use model.attention=auto or sdpa"
            )
        if engine.compile == "on" and model.attention == "xformers":
            raise ConfigError(
                "engine.compile=on: torch.compile cannot take model.attention=xformers in: use model.attention=auto"
            )
        if engine.checkpointing == "selective" and not model.is_vit:
            raise ConfigError(
                f"engine.checkpointing=selective knows the layers of our ViTs, not {model.arch}'s: use full or none"
            )

    def _check_lengths(self) -> None:
        """What ends after some epochs ends within the run: else the rest of it would be dropped without a word."""
        optim = self.optim
        lengths = {"optim.warmup_epochs": optim.warmup_epochs, "optim.freeze_last_layer": optim.freeze_last_layer}
        if self.loss.warmup_teacher_temp != self.loss.teacher_temp:
            lengths["loss.warmup_teacher_temp_epochs"] = self.loss.warmup_teacher_temp_epochs
        too_long = [f"{name}={epochs:g}" for name, epochs in lengths.items() if epochs > self.run.epochs]
        if too_long:
            are, them = ("is", "it") if len(too_long) == 1 else ("are", "them")
            raise ConfigError(
                f"{' and '.join(too_long)} {are} longer than run.epochs={self.run.epochs}: "
                f"shorten {them} or train longer"
            )

    def _check_rates(self) -> None:
        """Depth is known of our own ViT's parameters."""
        for name in () if self.model.is_vit else ("layer_decay", "patch_embed_lr"):
            value = getattr(self.optim, name)
            reason = f"which parameter of {self.model.arch} belongs to which layer is not known"
            require(value == 1, f"optim.{name}", value, f"1 with model.arch={self.model.arch}", reason)

    def ignored(self) -> list[str]:
        """A line for each setting that is not at its default, and that others make without effect."""
        cases = [
            (not self.model.is_vit, "model", VIT_ONLY, f"{self.model.arch} has its own"),
            (self.model.drop_path == 0, "model", "drop_path_rule", "model.drop_path is 0"),
            (self.model.pos_embed == "rope", "model", "interpolation image_size", "rope has no position embeddings"),
            (self.model.pos_embed != "rope", "model", "rope_scale", f"model.pos_embed is {self.model.pos_embed}"),
            (not self.data.renders, "data", "num_images", "a folder has as many as it holds"),
            (self.data.root == "shapes", "data", "max_pixels bits range", "shapes are rendered"),
            (self.data.views != "device", "data", "max_side", f"data.views is {self.data.views}"),
            (self.views.num_local == 0, "views", "local_size local_scale", "views.num_local is 0"),
            (self.views.num_local == 0, "model", "packed", "views.num_local is 0"),
            (self.head.num_layers == 1, "head", "hidden_dim", "head.num_layers is 1"),
            (self.patch_head is not None and self.patch_head.num_layers == 1, "patch_head", "hidden_dim",
             "patch_head.num_layers is 1"),
            (self.loss.patch_weight == 0, "loss", "patch_targets", "loss.patch_weight is 0"),
            ("center" not in self.loss.uses, "loss", "center_momentum", "all targets are sinkhorn's"),
            (self.engine.device == "cpu", "engine", "teacher_stream", "a CPU does one thing after another"),
            (self.engine.name == "torch", "engine", "zero_stage deepspeed", "engine.name=torch shards nothing"),
            (self.optim.clip == 0, "optim", "clip_mode", "optim.clip is 0"),
            (self.optim.name != "adamw", "optim", "beta2", f"optim.name is {self.optim.name}"),
            (self.optim.schedule == "constant", "optim", "min_lr weight_decay_end teacher_momentum_end",
             "optim.schedule is constant"),
            (self.optim.freeze_last_layer == 0, "optim", "freeze_how", "optim.freeze_last_layer is 0"),
            (self.run.knn_every == 0, "run", "knn_root", "run.knn_every is 0"),
            (self.loss.warmup_teacher_temp_epochs == 0, "loss", "warmup_teacher_temp temp_warmup_by",
             "loss.warmup_teacher_temp_epochs is 0"),
            (self.loss.patch_weight == 0, "views", "mask_share mask_ratio", "loss.patch_weight is 0"),
        ]  # fmt: skip
        lines, kinds = dict[str, str](), group_kinds()  # one for a setting, the first reason
        for without_effect, group, names, reason in cases:
            for name in names.split() if without_effect else ():
                value = getattr(getattr(self, group), name)
                if value != getattr(kinds[group](), name):
                    lines.setdefault(f"{group}.{name}", f"{group}.{name}={value} has no effect: {reason}")
        return [*lines.values()]

    def to_json(self) -> str:
        """The whole config as indented JSON, which :meth:`from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads :meth:`to_json`. Raises ConfigError for text that is not a config of this version."""
        try:
            groups = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a config: {error}") from error
        kinds = group_kinds()
        if isinstance(groups, dict) and groups.get("patch_head") is None:  # as in every config from before it
            groups.pop("patch_head", None)
            del kinds["patch_head"]
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ConfigError("not a config of fastdino: groups of settings are missing")
        if missing := kinds.keys() - groups.keys():
            raise ConfigError(f"not a config of this version of fastdino: the group {min(missing)} is missing")
        ours = {f"{name}.{f.name}" for name, kind in kinds.items() for f in dataclasses.fields(kind)}
        for setting in (f"{name}.{key}" for name, group in groups.items() for key in group):
            if setting not in ours:
                near = difflib.get_close_matches(setting, ours, n=1)
                raise ConfigError(
                    f"unknown setting {setting}: another version of fastdino wrote it; use that one"
                    + (f", or call it {near[0]} if that is its name now" if near else "")
                )
        return cls(**{name: kind(**groups[name]) for name, kind in kinds.items()})


def group_kinds() -> dict[str, type[Any]]:
    """The kind of each group by its name. Only ``patch_head`` may be None instead."""
    return {**get_type_hints(Config), "patch_head": PatchHeadConfig}

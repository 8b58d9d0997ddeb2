"""All settings of a run, and the checks between groups."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdino.config.data import DataConfig, ViewsConfig
from fastdino.config.errors import ConfigError
from fastdino.config.method import LossConfig
from fastdino.config.model import HeadConfig, ModelConfig
from fastdino.config.optim import EngineConfig, OptimConfig
from fastdino.config.run import RunConfig


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

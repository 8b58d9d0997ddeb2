"""What every evaluation is: a frozen dataclass whose fields are its flags and whose docstring is its help."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastdino.config import Config, ConfigError
from fastdino.config.errors import require
from fastdino.eval.features import Reading


@dataclass(frozen=True)
class Subject:
    """The weights that are evaluated."""

    backbone: nn.Module
    """Maps (B, C, s, s) normalised images to (B, D); it runs where its parameters are."""
    config: Config
    """Of the run that made it: how it was shown images."""
    folder: Path
    """Where the weights lie, and where a picture goes that has no other place."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """The base of all evaluations: which images are read, and how."""

    data: str = "shapes"
    """Images, as --data.root of fastdino train takes them but for mixtures; or shapes."""
    size: int | None = None
    """Side in pixels that the backbone sees; default: that of its global views."""
    normalize: Literal["imagenet", "image"] | None = None
    """Subtract ImageNet's mean and divide by its deviation, or those of the image; default: as it was trained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast."""
    batch: int = 64
    """Images per forward pass."""

    def __post_init__(self) -> None:
        require(self.size is None or self.size >= 1, "--size", self.size, "at least 1", "a side in pixels")
        require(self.batch >= 1, "--batch", self.batch, "at least 1", "a count of images")

    def reading(self, config: Config) -> Reading:
        """How the images are read: as the weights were trained, but for what the flags say."""
        size = config.views.global_size if self.size is None else self.size
        normalize = self.normalize or config.data.normalize
        channels = config.data.channels
        if channels != 3 and normalize == "imagenet":
            raise ConfigError(
                f"--normalize imagenet needs red, green and blue, and data.channels={channels}: leave it out"
            )
        crop = config.data.eval_crop
        return Reading(size=size, crop=crop, normalize=normalize, precision=self.precision, channels=channels)

    @abstractmethod
    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Figures by name, with the protocol that they were found by. Raises EvaluationError and ConfigError."""

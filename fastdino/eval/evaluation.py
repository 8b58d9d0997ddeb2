"""What every evaluation is: a frozen dataclass whose fields are its flags and whose docstring is its help."""

import dataclasses
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastdino.config import Config, ConfigError
from fastdino.config.errors import require
from fastdino.data.sources.source import Source
from fastdino.distributed import Ranks
from fastdino.eval.cache import Cache, Work, uncached, weights_digest
from fastdino.eval.controls import RawPixels, fresh
from fastdino.eval.features import Features, Reading, Tokens, device_and_dtype, has_weights
from fastdino.eval.published import published
from fastdino.eval.result import Found, Result

log = logging.getLogger(__name__)

MANY = 50_000  # images of a data set, above which baselines have to be asked for


def alone() -> Ranks:
    """A group of one, on the CPU's side."""
    return Ranks(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Subject:
    """The weights that are evaluated."""

    backbone: nn.Module
    """Maps (B, C, s, s) normalised images to (B, D); it runs where its parameters are."""
    config: Config
    """Of the run that made it: how it was shown images."""
    folder: Path
    """Where the weights lie, and where results go that have no other place."""
    told: dict[str, Any] = field(default_factory=dict)
    """What a result says of the weights: path, step, role."""
    ranks: Ranks = field(default_factory=alone)
    """Which make features together; each of them has its own subject."""

    @cached_property
    def digest(self) -> str:
        """:func:`fastdino.eval.cache.weights_digest`, made once: large weights take seconds, and no evaluation changes
        those of its subject."""
        return weights_digest(self.backbone)


@dataclass(frozen=True, kw_only=True)
class Common:
    """The flags that all evaluations have."""

    data: str = "shapes"
    """Images, as --data.root of fastdino train takes them but for mixtures; or shapes."""
    size: int | None = None
    """Side in pixels that the backbone sees; default: that of its global views."""
    crop_ratio: float | None = None
    """Share of the shorter side that it sees, in the middle; default: as its run, 0.875 for published weights."""
    normalize: Literal["imagenet", "image"] | None = None
    """Subtract ImageNet's mean and divide by its deviation, or those of the image; default: as it was trained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast."""
    batch: int = 64
    """Images per forward pass."""
    num_workers: int = 8
    """Processes that decode; at most as many as there are cores."""
    baselines: Literal["auto", "yes", "no"] = "auto"
    """Judge raw pixels and a random start of the same architecture too; auto: up to 50,000 images."""
    cache: bool = True
    """Keep features on the disk, and take those that are there."""
    cache_dir: Path | None = None
    """Folder where they are kept; default: FASTDINO_CACHE, or ~/.cache/fastdino/features."""
    cache_gb: float = 50.0
    """What it may take; the features that were not used for the longest time are removed."""
    seed: int = 0
    """Of what is drawn: the random start, parts that are held out, shots."""
    out: Path | None = None
    """Folder for KIND.json, pictures and predictions; default: eval/KIND-DATA beside the weights."""

    def __post_init__(self) -> None:
        require(self.size is None or self.size >= 1, "--size", self.size, "at least 1", "a side in pixels")
        ratio = self.crop_ratio
        require(ratio is None or 0 < ratio <= 1, "--crop-ratio", ratio, "in (0, 1]", "a share of the shorter side")
        require(self.batch >= 1, "--batch", self.batch, "at least 1", "a count of images")
        require(self.num_workers >= 0, "--num-workers", self.num_workers, "0 or more", "a count of processes")
        require(self.cache_gb > 0, "--cache-gb", self.cache_gb, "positive", "a size")


def cache_folder(asked: Path | None) -> Path:
    """Where features are kept unless another place is ``asked`` for."""
    return Path(asked or os.environ.get("FASTDINO_CACHE") or "~/.cache/fastdino/features").expanduser()


def results_folder(flags: Common, subject: Subject, kind: str) -> Path:
    """--out, or eval/KIND-DATA beside the weights."""
    if flags.out is not None:
        return flags.out.expanduser()
    words = [word for word in Path(flags.data).parts if word.strip("/.~")][-2:]
    name = "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in word) for word in words)
    return subject.folder / "eval" / f"{kind}-{name or 'data'}"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Common, ABC):
    """The base of all evaluations: which images are read, and how."""

    kind: ClassVar[str]
    """Its name in ``fastdino eval KIND``, and of its files."""
    needs: ClassVar[str] = "class folders"
    """What --data has to hold, for a list of the kinds."""
    controls: ClassVar[tuple[str, ...]] = ("pixels", "random_init")
    """Baselines that the same judge makes."""
    in_suite: ClassVar[bool] = True
    """It is a part of ``fastdino eval suite``: it needs no flag of its own, and minutes at most."""

    @abstractmethod
    def open(self, subject: Subject) -> Any:
        """The data, checked: what can be refused is refused here, before hours of features. Raises ConfigError."""

    @abstractmethod
    def judge(self, subject: Subject, data: Any) -> Found:
        """What one backbone's features are worth on ``data``. It is called for the baselines too, and on every rank,
        which all find the same. Raises EvaluationError and ConfigError."""

    def __call__(self, subject: Subject) -> Result:
        """What the backbone is worth, beside its baselines. Raises EvaluationError and ConfigError."""
        started = time.time()
        data = subject.ranks.everywhere(lambda: self.open(subject))
        found = self.judge(subject, data)
        baselines = {name: self.judge(other, data) for name, other in self.baseline_subjects(subject, found)}
        path = Path(str(subject.told.get("path", "")))
        expected = published(self.kind, found.headline, path.name, found.data.get("name", ""))
        weights = {**subject.told, "sha256": subject.digest}
        return Result(
            kind=self.kind,
            found=found,
            baselines=baselines,
            published=expected,
            weights=weights,
            root=self.data,
            started=started,
        )

    def baseline_subjects(self, subject: Subject, found: Found) -> Iterator[tuple[str, Subject]]:
        """What else is judged, by its name in the result."""
        images = sum(found.data.get(name, 0) for name in ("bank", "test", "images"))
        if self.baselines == "no" or (self.baselines == "auto" and images > MANY):
            return
        if "pixels" in self.controls and not isinstance(subject.backbone, RawPixels):
            pixels = RawPixels().to(device_and_dtype(subject.backbone)[0])
            yield "pixels", dataclasses.replace(subject, backbone=pixels, told={"path": "pixels"})
        if "random_init" in self.controls and has_weights(subject.backbone):
            size = self.reading(subject.config).size
            start = fresh(subject.backbone, subject.config.model, size, self.seed)
            told = {"path": f"random:{subject.config.model.arch}"}
            yield "random_init", dataclasses.replace(subject, backbone=start, told=told)

    def reading(self, config: Config, tokens: Tokens = "cls") -> Reading:
        """How the images are read: as the weights were trained, but for what the flags say."""
        size = config.views.global_size if self.size is None else self.size
        normalize = self.normalize or config.data.normalize
        channels = config.data.channels
        if channels != 3 and normalize == "imagenet":
            raise ConfigError(
                f"--normalize imagenet needs red, green and blue, and data.channels={channels}: leave it out"
            )
        crop = config.data.eval_crop if self.crop_ratio is None else self.crop_ratio
        precision = self.precision
        return Reading(size=size, crop=crop, normalize=normalize, precision=precision, channels=channels, tokens=tokens)

    def features(self, subject: Subject, source: Source, tokens: Tokens = "cls") -> Features:
        """Features of every image of ``source`` that can be read, on the backbone's device; from the cache if they are
        there. All ranks call it, and each has all rows."""
        reading = self.reading(subject.config, tokens)
        work = Work(self.batch, self.num_workers, subject.ranks)
        if self.cache:
            told = {"weights": str(subject.told.get("path", "")), "data": self.data}
            cache = Cache(cache_folder(self.cache_dir), self.cache_gb)
            found = cache.features(subject.backbone, lambda: subject.digest, source, reading, work, told)
        else:
            found = uncached(subject.backbone, source, reading, work)
        device, _ = device_and_dtype(subject.backbone)
        return Features(*(x.to(device) for x in found))

    def protocol(self, subject: Subject, tokens: Tokens = "cls") -> dict[str, Any]:
        """How images are read, for a result."""
        reading = self.reading(subject.config, tokens)
        return {name: getattr(reading, name) for name in ("size", "crop", "normalize", "precision", "tokens")}

"""What is searched in what, what is true of it, and how its rankings are judged."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks import class_folders
from fastdino.data.benchmarks.copydays import is_copydays
from fastdino.data.benchmarks.landmarks import Cropped, Landmarks, is_landmarks, open_landmarks
from fastdino.data.sources.folder import split_folders
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.shapes import ShapesSource, check_shows_shapes
from fastdino.data.sources.source import Source
from fastdino.eval.retrieve.ranking import (
    HARD,
    JUNK,
    RIGHT,
    Truth,
    average_precision,
    found_in,
    in_setup,
    precision_at,
    precision_of_hits,
)

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """Queries and the images that they search. Places are in these sources, of images that could be read."""

    rule: ClassVar[str]
    """By which rankings are judged."""
    name: str
    """Of the data set; empty where it has none."""
    queries: Source
    database: Source
    split: str = ""
    """Which images these are."""

    @abstractmethod
    def truth(self, queries: Tensor, database: Tensor) -> Truth:
        """Of the queries and images at these places, int64 on the CPU."""

    @abstractmethod
    def scores(self, ranked: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """fp64 (q,) in [0, 1] by name, the headline first; NaN for a query that is left out.

        Args:
            ranked: see :mod:`fastdino.eval.retrieve.ranking`.
            queries: (q,) int64 places.
        """

    def shown(self, ranked: Tensor) -> Tensor:
        """``ranked`` as the headline has it: RIGHT, JUNK and WRONG."""
        return ranked


@dataclass(frozen=True, kw_only=True)
class InstanceSearch(Search):
    """Every image searches the others for those of its class."""

    rule: ClassVar[str] = "every image queries the rest; map is the mean precision at the right images"

    def truth(self, queries: Tensor, database: Tensor) -> Truth:
        """The image itself is junk."""
        labels = torch.tensor([self.database.label(i) for i in database.tolist()])

        def of(block: range) -> Tensor:
            mine = labels[block.start : block.stop].unsqueeze(1)
            kinds = (mine == labels).to(torch.uint8) * RIGHT
            kinds[torch.arange(len(block)), torch.arange(block.start, block.stop)] = JUNK
            return kinds

        return of

    def scores(self, ranked: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """map, recall at those of KS that leave a choice, and mAP@R."""
        ks = [k for k in KS if k < ranked.shape[1] - 1] or [1]
        found = {"map": precision_of_hits(ranked)} | {f"recall_{k}": found_in(ranked, k) for k in ks}
        return found | {"map_at_r": precision_of_hits(ranked, (ranked == RIGHT).sum(1))}


@dataclass(frozen=True, kw_only=True)
class LandmarkSearch(Search):
    """The revisited Oxford or Paris."""

    rule: ClassVar[str] = "revisited protocol; average precision by trapezoids"
    data: Landmarks

    def truth(self, queries: Tensor, database: Tensor) -> Truth:
        """Easy, hard and junk by the ground truth; distractors are wrong."""

        def of(block: range) -> Tensor:
            kinds = torch.zeros(len(block), len(self.database), dtype=torch.uint8)
            for row, place in zip(kinds, queries[block.start : block.stop].tolist(), strict=True):
                relevant = self.data.relevant[place]
                for kind, places in ((JUNK, relevant.junk), (HARD, relevant.hard), (RIGHT, relevant.easy)):
                    row[torch.from_numpy(places)] = kind
            return kinds[:, database]

        return of

    def scores(self, ranked: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """map_medium, map_hard, map_easy, and mP@k of the first two."""
        seen = {setup: in_setup(ranked, setup) for setup in ("medium", "hard", "easy")}
        found = {f"map_{setup}": average_precision(x) for setup, x in seen.items()}
        for setup in ("medium", "hard"):
            found |= {f"mp_{k}_{setup}": precision_at(seen[setup], k) for k in KS}
        return found

    def shown(self, ranked: Tensor) -> Tensor:
        """The setup medium."""
        return in_setup(ranked, "medium")


@dataclass(frozen=True, kw_only=True)
class GoogleSearch(LandmarkSearch):
    """Google Landmarks v2."""

    rule: ClassVar[str] = "mean of the precision at the right ones of the first 100 / min(right images, 100)"

    def scores(self, ranked: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """map_100 of the private queries, which are what is reported, and of the public ones."""
        found, parts = precision_of_hits(ranked, 100), self.data.parts or []
        private = torch.tensor([parts[place] == "Private" for place in queries.tolist()])
        both = {"map_100": found.where(private, torch.nan), "map_100_public": found.where(~private, torch.nan)}
        return both if private.any() else {"map_100_public": found}

    def shown(self, ranked: Tensor) -> Tensor:
        """As it is: nothing is hard or junk."""
        return ranked


def open_search(root: str, config: DataConfig, distractors: Path | None, crop: bool) -> Search:
    """What ``root`` holds: landmarks by their layout, else images whose class is what they show.

    Args:
        root: see ``--data``.
        config: how images are decoded.
        distractors: the folder revisitop1m/.
        crop: queries of Oxford and Paris are seen within their box.

    Raises ConfigError for what is neither, and where no two images are of a class, or all are of one.
    """
    if root != "shapes" and is_copydays(root):
        raise ConfigError(
            f"{root} is laid out as Copydays, whose folders are not instances: use fastdino eval copydetect"
        )
    if root == "shapes" or not is_landmarks(root):
        if distractors is not None:
            raise ConfigError(f"--distractors go with roxford5k and rparis6k, and {root} is neither")
        return _instances(root, config)
    data = open_landmarks(root, config, distractors)
    queries = data.queries if data.boxes is None or not crop else Cropped(data.queries, data.boxes)
    kind = GoogleSearch if data.parts else LandmarkSearch
    return kind(name=data.name, queries=queries, database=data.database, data=data)


def open_images(root: str, config: DataConfig, judged: bool = True) -> tuple[Source, str]:
    """The images of ``root``, and which these are: where it has splits, those that are ``judged``, or the others."""
    if root == "shapes":
        check_shows_shapes(config)
        seed = class_folders.TEST_SEED if judged else class_folders.BANK_SEED
        return ShapesSource(class_folders.NUM_SHAPES, config.image_size, seed), "rendered shapes"
    folders = split_folders(root)
    order = ("val", "test", "train") if judged else ("train", "val", "test")
    folder = next((folders[split] for split in order if split in folders), None)
    return (open_part(folder, config), f"{folder.name}/") if folder else (open_part(root, config), "all images")


def _instances(root: str, config: DataConfig) -> Search:
    source, split = open_images(root, config)
    classes = torch.tensor([source.label(i) for i in range(len(source))])
    if astray := (classes < 0).nonzero().flatten().tolist():
        raise ConfigError(
            f"{root} has {len(astray)} images of no class, such as {source.name(astray[0])}: retrieval needs a folder "
            "per instance, that is, per thing that is shown, or landmarks in their own layout"
        )
    counts = classes.bincount()
    if counts.max() == len(classes):
        raise ConfigError(f"all images of {root} are of one class, so any ranking is right: two or more are needed")
    if counts.max() < 2:
        raise ConfigError(f"no class of {root} has two images: there is nothing to find")
    return InstanceSearch(name="", queries=source, database=source, split=split)

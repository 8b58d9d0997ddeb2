"""What an evaluation finds, and the files in which it is kept."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch

from fastdino import __version__
from fastdino.agreement import what_runs
from fastdino.eval.features import EvaluationError
from fastdino.eval.intervals import Score, Shares
from fastdino.eval.published import Published
from fastdino.files import whole_file


class Picture(NamedTuple):
    """A PNG that is drawn when the result is written."""

    name: str
    """What follows KIND in the file's name, such as -confusion; empty for KIND.png."""
    draw: Callable[[Path], None]
    """Writes it to a path."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the features of one backbone are found to be worth."""

    scores: dict[str, Score]
    """Figures with their intervals, the headline first."""
    protocol: dict[str, Any]
    """Everything that the figures depend on, beside weights and data."""
    data: dict[str, Any]
    """What was judged: counts, classes, the rule of the split."""
    also: dict[str, Any] = field(default_factory=dict)
    """Figures and names without an interval."""
    notes: list[str] = field(default_factory=list)
    """Sentences for a person: what was left out, what is unusual."""
    shares: Shares | None = None
    """What each item adds to the headline, for a comparison with another result."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Predictions and the like, an entry per image, by name; no objects."""
    pictures: list[Picture] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """Name of the first score; empty where a kind makes pictures alone."""
        return next(iter(self.scores), "")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A judged backbone beside what the score is compared with."""

    kind: str
    found: Found
    baselines: dict[str, Found]
    """The same judge's findings of pixels and of a random start."""
    published: Published | None
    weights: dict[str, Any]
    root: str
    """--data."""
    started: float
    """time.time()."""

    def json(self) -> dict[str, Any]:
        """Everything but arrays and pictures."""
        found = self.found
        published = self.published and {"score": self.published.score, "source": self.published.source}
        made_by = {"fastdino": __version__, "code": what_runs()["code"], "torch": torch.__version__}
        return {
            "kind": self.kind,
            "headline": found.headline,
            "scores": {name: score.json() for name, score in found.scores.items()},
            "baselines": {name: score.json() for name, score in self._compared().items()},
            "published": published,
            "also": found.also,
            "notes": self.notes(),
            "protocol": found.protocol,
            "data": {"root": self.root, **found.data},
            "weights": self.weights,
            "made_by": {**made_by, "seconds": round(time.time() - self.started, 1)},
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """KIND.json, which names the files beside it: pictures, and KIND.npz. Returns what it holds.

        The JSON is written last: with it, all of them are there. Raises ConfigError when one cannot be written.
        """
        files = []
        for name, draw in self.found.pictures:
            with whole_file(folder / f"{self.kind}{name}.png") as path:
                draw(path)
            files.append(f"{self.kind}{name}.png")
        if arrays := self.arrays():
            with whole_file(folder / f"{self.kind}.npz") as path, path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            files.append(f"{self.kind}.npz")
        told = self.json() | {"files": files}
        with whole_file(folder / f"{self.kind}.json") as path:
            path.write_text(json.dumps(told, indent=2) + "\n")
        return told

    def arrays(self) -> dict[str, np.ndarray]:
        """Per image, and what :func:`read_shares` reads."""
        shares = self.found.shares
        if shares is None:
            return self.found.arrays
        rows = {name: getattr(shares, name) for name in ("item", "group", "part", "whole")}
        return {**self.found.arrays, "items": np.array(shares.items, dtype=np.str_), **rows}

    def table(self) -> str:
        """For a person: the scores, what they are compared with, and notes."""
        rows = [(f"{self.kind} {name}", str(score)) for name, score in self.found.scores.items()]
        rows += [(f"  {name.replace('_', ' ')}", str(score)) for name, score in self._compared().items()]
        if self.published:
            rows.append((f"  published ({self.published.source})", f"{self.published.score:.1f}"))
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([*(f"{name:{width}}  {text}" for name, text in rows), *(f"  {x}" for x in self.notes())])

    def notes(self) -> list[str]:
        """Those of the judge, and whether the features beat the baselines."""
        found = self.found.scores.get(self.found.headline)
        above = [name for name, other in self._compared().items() if found and other.value >= found.value]
        said = [f"{name.replace('_', ' ')} does as well or better: these features help nothing here" for name in above]
        return [*self.found.notes, *said]

    def _compared(self) -> dict[str, Score]:
        """The baselines' scores by their names."""
        headline = self.found.headline
        return {name: found.scores[headline] for name, found in self.baselines.items() if headline in found.scores}


def read_result(path: Path) -> dict[str, Any]:
    """A KIND.json. Raises EvaluationError for a file that is none."""
    try:
        told = json.loads(path.read_text())
        assert {"kind", "headline", "scores", "protocol", "data", "weights"} <= told.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise EvaluationError(f"{path} is no result of fastdino eval: {type(error).__name__} {error}") from error
    return told


def read_shares(path: Path) -> Shares:
    """What each item added to the headline of the result ``path``, from the .npz beside it. Raises EvaluationError."""
    file = path.with_suffix(".npz")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Shares(arrays["items"].tolist(), *(arrays[name] for name in ("item", "group", "part", "whole")))
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise EvaluationError(
            f"{file} does not say what each image adds to the score ({error}): a kind without per-image results, or "
            "the file was moved away from the JSON"
        ) from error

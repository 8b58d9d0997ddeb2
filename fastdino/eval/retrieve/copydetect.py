"""Copy detection: of which image an altered copy was made, among the originals and others."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.copies import NAME as SYNTHETIC
from fastdino.data.benchmarks.copies import make_copies
from fastdino.data.benchmarks.copydays import ORIGINALS, SIZES, CopySets, open_copydays
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.source import Source
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError
from fastdino.eval.published import COPYDAYS
from fastdino.eval.result import Found, Picture
from fastdino.eval.retrieve.pooling import Look, Tokens
from fastdino.eval.retrieve.ranking import RIGHT, average_precision, rankings
from fastdino.eval.retrieve.retrieval import Describing, mean_over, opened_whitening, said, unit
from fastdino.eval.retrieve.searches import open_images
from fastdino.eval.retrieve.strips import Tops, draw_strips, tops
from fastdino.eval.retrieve.whitening import Whitening

SIZE, POWER, TOP = 320, 4.0, 20  # of DINO v1's eval_copy_detection.py


class Opened(NamedTuple):
    """What is read before features are made."""

    copies: CopySets
    database: Source
    """The originals, then distractors."""
    whiten: Source | None


class Judged(NamedTuple):
    """What a block of copies came to."""

    names: list[str]
    """Of the copies that could be read."""
    queries: list[tuple[Source, int]]
    """They."""
    scores: np.ndarray
    """(q,) fp64 average precision; NaN for a copy whose original cannot be read."""
    first: Tops
    """Places in the database."""


@dataclass(frozen=True, kw_only=True)
class CopyDetection(Describing):
    """Mean average precision of copy detection: altered copies find their originals, in the first 20 images.

    --data is laid out as Copydays is (original/, strong/, jpegqual/N/, crops/N/); --make-copies FOLDER makes copies of
    any images instead, whose score is one of synthetic copies. As DINO v1 does it, images are squeezed to 320 x 320 and
    the CLS token and the generalised mean of the patches (power 4) are compared.
    """

    kind: ClassVar[str] = "copydetect"
    needs: ClassVar[str] = "Copydays, or any images with --make-copies"

    tokens: Tokens = "cls+gem"
    """The CLS token, the generalised mean of the patches (GeM), or both one after the other."""
    size: int | None = SIZE
    """Side in pixels that images are squeezed to."""
    make_copies: str = ""
    """Images that copies are made of, as --data takes them: JPEG 10, half of the area, rotation, text, blur, a quarter
    of the size, the mirror image."""
    distractors: str = ""
    """More images that are searched, as --data takes them; none of them may show an original."""
    second_moment: bool = False
    """--whiten as DINO v1's script does it: by the moments about 0, where the covariance is about the mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.make_copies:
            given = self.data not in ("shapes", self.make_copies)
            require(not given, "--data", self.data, "left out", "--make-copies names the images")
            object.__setattr__(self, "data", self.make_copies)
        require(self.crop_ratio is None, "--crop-ratio", self.crop_ratio, "left out", "images are seen whole")
        reason = "there is nothing to learn whitening from"
        require(not self.second_moment or bool(self.whiten), "--second-moment", True, "beside --whiten", reason)

    def open(self, subject: Subject) -> Opened:
        """Copies and originals. Raises ConfigError."""
        config = subject.config.data
        if self.make_copies:
            copies = make_copies(open_images(self.make_copies, config)[0], self.seed)
        elif self.data == "shapes":
            raise ConfigError("shapes have no copies: name Copydays with --data, or --make-copies shapes")
        else:
            copies = open_copydays(self.data, config)
        database = copies.originals
        if self.distractors:
            more = open_images(self.distractors, config, judged=False)[0]
            database = Mixture({"originals": database, "distractors": more}, [1, 1])
        return Opened(copies, database, opened_whitening(self.whiten, subject))

    def judge(self, subject: Subject, data: Opened) -> Found:
        """Scores of every block of copies."""
        look, copies = self.look(subject), data.copies
        whitening = None
        if data.whiten is not None:
            learned = self.described(subject, data.whiten, look)
            whitening = Whitening.fit(learned.vectors, centered=not self.second_moment)
        database = self.described(subject, data.database, look)
        images, unreadable = unit(database, whitening), len(data.database) - len(database.places)
        judged = dict[str, Judged]()
        for name, block in copies.blocks.items():
            queries = self.described(subject, block, look)
            places, of = queries.places.cpu(), copies.original[name]
            found = _ranked(unit(queries, whitening), images, of[places], database.places.cpu())
            names = [f"{name}/{block.name(i)}" for i in places.tolist()]
            judged[name] = Judged(names, [(block, i) for i in places.tolist()], *found)
            unreadable += len(block) - len(places)
        return self._found(look, data, judged, unreadable)

    def look(self, subject: Subject) -> Look:
        """How images are shown; at SIZE also where a suite gives no size."""
        reading = self.reading(subject.config)
        shown = Look(side=self.size or SIZE, squeezed=True, tokens=self.tokens, power=POWER)
        return replace(shown, normalize=reading.normalize, precision=reading.precision)

    def _found(self, look: Look, data: Opened, judged: dict[str, Judged], unreadable: int) -> Found:
        """The headline is all blocks of synthetic copies together, or the first, which is the hardest, of Copydays."""
        copies = data.copies
        blocks = {f"map_{name.replace(' ', '_').replace('/', '_')}": block for name, block in judged.items()}
        if copies.name == SYNTHETIC:  # by a name that nobody takes for a score of Copydays
            blocks = {"map_synthetic_copies": _joined([*judged.values()])} | blocks
        shares = {name: mean_over(block.names, block.scores) for name, block in blocks.items()}
        if empty := [name for name, x in shares.items() if not x.items]:
            raise EvaluationError(f"no original of {empty[0]} could be read: there is nothing to find")
        main = next(iter(blocks.values()))
        every = np.concatenate([block.scores for block in judged.values()])
        counts = {
            "queries": int(np.isfinite(every).sum()),
            "images": sum(map(len, copies.blocks.values())) + len(data.database),
            "originals": len(copies.originals),
            "distractors": len(data.database) - len(copies.originals),
            "left_out": int(np.isnan(every).sum()),
            "unreadable": unreadable,
        }
        return Found(
            scores={name: x.score() for name, x in shares.items()},
            protocol=self._protocol(look),
            data={"name": COPYDAYS if self._is_v1(copies, look) else copies.name, **counts},
            notes=[*said(counts), *_other_sizes(copies)],
            shares=next(iter(shares.values())),
            arrays={"queries": np.array(main.names, np.str_), "score": main.scores},
            pictures=[
                Picture("", lambda path: draw_strips(path, main.scores, main.first, main.queries, data.database))
            ],
        )

    def _is_v1(self, copies: CopySets, look: Look) -> bool:
        """Whether all is as in the README of DINO v1, whose score a result may be held against."""
        shown = (look.side, look.tokens, look.normalize) == (SIZE, "cls+gem", "imagenet")
        return copies.name == "copydays" and shown and self.second_moment and bool(self.distractors)

    def _protocol(self, look: Look) -> dict[str, Any]:
        told = {name: getattr(look, name) for name in ("squeezed", "normalize", "precision", "tokens")}
        told |= {"size": look.side, "gem_power": POWER if "gem" in look.tokens else None, "top": TOP}
        return told | {"whiten": self.whiten or None, "second_moment": self.second_moment}


def _ranked(queries: Tensor, images: Tensor, original: np.ndarray, places: Tensor) -> tuple[np.ndarray, Tops]:
    """Scores, and what was found first, of (q, D) queries whose originals are at ``original`` (q,) of the database.

    Args:
        queries: normalised.
        images: (n, D), likewise.
        original: int64.
        places: (n,) of the images in the database.
    """
    right = torch.from_numpy(original).unsqueeze(1)

    def truth(block: range) -> Tensor:
        return (right[block.start : block.stop] == places).to(torch.uint8) * RIGHT

    scores, found = list[Tensor](), list[Tops]()
    for block, order, ranked in rankings(queries, images, truth, TOP):
        scores.append(average_precision(ranked, truth(block).sum(1)))
        found.append(tops(order, ranked))
    first = _stacked(found)
    return torch.cat(scores).numpy(), first._replace(order=places[first.order])


def _joined(blocks: list[Judged]) -> Judged:
    return Judged(
        names=[name for block in blocks for name in block.names],
        queries=[query for block in blocks for query in block.queries],
        scores=np.concatenate([block.scores for block in blocks]),
        first=_stacked([block.first for block in blocks]),
    )


def _stacked(found: list[Tops]) -> Tops:
    return Tops(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _other_sizes(copies: CopySets) -> list[str]:
    """A note where these are not the images that published scores are of."""
    if copies.name == SYNTHETIC:
        return ["synthetic copies: not to be compared with scores of Copydays"]
    sizes = {ORIGINALS: len(copies.originals), **{name: len(block) for name, block in copies.blocks.items()}}
    others = [f"{name} {count}" for name, count in sizes.items() if count != SIZES.get(name, SIZES[ORIGINALS])]
    return [f"Copydays has 157 images in each block, and 229 in strong; here: {', '.join(others)}"] if others else []

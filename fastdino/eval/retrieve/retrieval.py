"""Image retrieval: which images of a data set show what a query shows, by the similarity of their features."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.landmarks import REVISITED, Cropped
from fastdino.data.sources.source import Source
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import GEM_POWER, EvaluationError, Part
from fastdino.eval.intervals import Shares
from fastdino.eval.result import Found, Picture
from fastdino.eval.retrieve.pooling import MULTI_SCALE, Described, Look, Tokens, describe
from fastdino.eval.retrieve.ranking import rankings
from fastdino.eval.retrieve.searches import InstanceSearch, Search, open_images, open_search
from fastdino.eval.retrieve.strips import Tops, draw_strips, tops
from fastdino.eval.retrieve.whitening import Whitening

V1 = {"roxford5k": (224, (1.0,)), "rparis6k": (512, MULTI_SCALE)}
"""Side and scales by which DINO v1 reports Oxford and Paris."""


class Opened(NamedTuple):
    """What is read before features are made."""

    search: Search
    whiten: Source | None


@dataclass(frozen=True, kw_only=True)
class Describing(Evaluation):
    """The base of evaluations that compare descriptors of whole images."""

    tokens: Tokens = "cls"
    """The CLS token, the generalised mean of the patches (GeM), or both one after the other."""
    whiten: str = ""
    """Images from which PCA whitening learns, as --data takes them (those of train/, if there is one); none by default.
    They must not be those that are judged."""

    def described(self, subject: Subject, source: Source, look: Look) -> Described:
        """Descriptors of what can be read of ``source``, on every rank. Raises EvaluationError for none."""
        ranks = subject.ranks
        part = Part(ranks.rank, ranks.world_size)
        mine = ranks.everywhere(lambda: describe(subject.backbone, source, look, self.batch, self.num_workers, part))
        if ranks.world_size > 1:
            parts = [x for x in ranks.gather(Described(mine.vectors.cpu(), mine.places.cpu())) if len(x.places)]
            both = zip(*(parts or [mine]), strict=True)
            mine = Described(*(torch.cat(x).to(mine.places.device) for x in both))
        if not len(mine.places):
            raise EvaluationError("none of the images could be read: there is nothing to evaluate")
        return mine


def unit(described: Described, whitening: Whitening | None) -> Tensor:
    """(n, D) L2-normalised, after the whitening if there is one."""
    vectors = described.vectors
    return F.normalize(vectors if whitening is None else whitening(vectors), dim=1)


def opened_whitening(whiten: str, subject: Subject) -> Source | None:
    """The images that --whiten names."""
    return open_images(whiten, subject.config.data, judged=False)[0] if whiten else None


@dataclass(frozen=True, kw_only=True)
class Retrieval(Describing):
    """Mean average precision of image retrieval: queries find the images that show the same.

    --data is roxford5k/ or rparis6k/ (jpg/ and gnd_*.mat or .pkl), Google Landmarks v2 (index/, test/, its two .csv),
    or any folder with a subfolder per instance, of which every image queries the rest; of one with train/ and val/ (or
    test/), those of the latter. Landmarks keep their shape, their longer side --size at most.
    """

    kind: ClassVar[str] = "retrieval"
    needs: ClassVar[str] = "roxford5k/, rparis6k/, Google Landmarks v2, or a folder per instance"

    crop_queries: bool = True
    """Oxford and Paris: queries are cropped to the box that holds the landmark, as the revisited protocol says."""
    multi_scale: bool = False
    """Landmarks: descriptors of the image, and of it at 1/sqrt(2) and 1/2 of its size, are averaged."""
    published: Literal["v1"] | None = None
    """v1: Oxford and Paris as DINO v1 reports them: whole queries, CLS; Oxford at 224, Paris at 512 in three scales."""
    distractors: Path | None = None
    """Oxford and Paris: the folder revisitop1m/, a million images that are searched as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published:
            why = "--published v1 says how images are shown"
            for name, default in (("size", None), ("tokens", "cls"), ("whiten", ""), ("multi_scale", False)):
                value = getattr(self, name)
                require(value == default, f"--{name.replace('_', '-')}", value, f"{default!r}, or left out", why)

    def open(self, subject: Subject) -> Opened:
        """The search. Raises ConfigError also for landmarks' flags with other data."""
        crop = self.crop_queries and not self.published
        search = open_search(self.data, subject.config.data, self.distractors, crop)
        if self.published and search.name not in REVISITED:
            raise ConfigError(f"--published v1 is of {' and '.join(REVISITED)}, and {self.data} is neither")
        if self.multi_scale and isinstance(search, InstanceSearch):
            raise ConfigError(f"--multi-scale is for landmarks, and {self.data} is a folder of instances")
        if self.crop_ratio is not None and not isinstance(search, InstanceSearch):
            raise ConfigError(f"--crop-ratio={self.crop_ratio}: landmarks are seen whole: leave it out")
        return Opened(search, opened_whitening(self.whiten, subject))

    def judge(self, subject: Subject, data: Opened) -> Found:
        """Scores over the queries to which something is right."""
        search = data.search
        see = partial(self.seen, subject, search)
        whitening = None if data.whiten is None else Whitening.fit(see(data.whiten).vectors)
        database = see(search.database)
        queries = database if search.queries is search.database else see(search.queries)
        places = queries.places.cpu(), database.places.cpu()
        values, found = dict[str, list[Tensor]](), list[Tops]()
        blocks = rankings(unit(queries, whitening), unit(database, whitening), search.truth(*places))
        for block, order, ranked in blocks:
            for name, score in search.scores(ranked, places[0][block.start : block.stop]).items():
                values.setdefault(name, []).append(score)
            found.append(tops(order, search.shown(ranked)))
        scores = {name: torch.cat(parts).numpy() for name, parts in values.items()}
        first = Tops(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        return self._found(subject, data, places, scores, first)

    def seen(self, subject: Subject, search: Search, source: Source) -> Described:
        """Of a folder of instances the same features as of every other evaluation."""
        if not isinstance(search, InstanceSearch):
            return self.described(subject, source, self.look(subject, search))
        features = self.features(subject, source, self.tokens)
        return Described(features.vectors, features.places)

    def look(self, subject: Subject, search: Search) -> Look:
        """How landmarks are shown."""
        reading = self.reading(subject.config)
        look = Look(side=reading.size, tokens=self.tokens, power=GEM_POWER, normalize=reading.normalize)
        look = replace(look, precision=reading.precision, scales=MULTI_SCALE if self.multi_scale else (1.0,))
        if self.published:
            side, scales = V1[search.name]
            look = replace(look, side=side, scales=scales)
        return look

    def _found(
        self,
        subject: Subject,
        data: Opened,
        places: tuple[Tensor, Tensor],
        scores: dict[str, np.ndarray],
        first: Tops,
    ) -> Found:
        search = data.search
        (queries, database), (headline, of_queries) = places, next(iter(scores.items()))
        names = [search.queries.name(place) for place in queries.tolist()]
        shares = {name: mean_over(names, values) for name, values in scores.items()}
        if not shares[headline].items:
            raise EvaluationError(f"nothing is right for any query of {self.data} that could be read")
        total = len(search.queries) + (0 if search.queries is search.database else len(search.database))
        read = len(queries) + (0 if search.queries is search.database else len(database))
        counts = {"queries": len(shares[headline].items), "database": len(database), "images": total}
        counts |= {"left_out": len(queries) - counts["queries"], "unreadable": total - read}
        first = first._replace(order=database[first.order])
        shown = [(search.queries, place) for place in queries.tolist()]
        return Found(
            scores={name: x.score() for name, x in shares.items() if x.items},
            protocol=self._protocol(subject, search),
            data={"name": search.name + (" v1" if self.published else ""), "split": search.split, **counts},
            also={"queries_of": {name: len(x.items) for name, x in shares.items()}},
            notes=said(counts),
            shares=shares[headline],
            arrays={"queries": np.array(names, np.str_), "score": of_queries, "top": first.order.numpy()},
            pictures=[Picture("", lambda path: draw_strips(path, of_queries, first, shown, search.database))],
        )

    def _protocol(self, subject: Subject, search: Search) -> dict[str, Any]:
        whiten = {
            "whiten": self.whiten or None,
            "gem_power": GEM_POWER if "gem" in self.tokens else None,
            "judged": search.rule,
        }
        if isinstance(search, InstanceSearch):
            return self.protocol(subject, self.tokens) | whiten
        look = self.look(subject, search)
        shown = {name: getattr(look, name) for name in ("normalize", "precision", "tokens")}
        cropped = isinstance(search.queries, Cropped)
        return {"size": look.side, "scales": [*look.scales], "crop_queries": cropped, **shown, **whiten}


def mean_over(names: list[str], values: np.ndarray) -> Shares:
    """Of the queries whose value is a number."""
    there = np.flatnonzero(np.isfinite(values))
    return Shares.mean([names[i] for i in there], values[there])


def said(counts: dict[str, int]) -> list[str]:
    """Notes for a person."""
    notes = []
    if counts["left_out"]:
        notes.append(f"{counts['left_out']} queries were left out: nothing is right for them")
    if counts["unreadable"]:
        notes.append(f"{counts['unreadable']} images could not be read and were left out")
    return notes

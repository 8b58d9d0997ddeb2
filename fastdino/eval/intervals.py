"""How far a score would move with other images: intervals, and whether two scores differ."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdino.eval.features import EvaluationError

Array = np.ndarray

RESAMPLES, SEED = 2000, 0
Z = 1.959964  # of a normal distribution, 95 % within


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    interval: str
    """How the interval was found."""

    def json(self) -> dict[str, Any]:
        """As it is written; None for what is not a number."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {name: round(x, 4) if math.isfinite(x) else None for name, x in ends.items()} | {
            "interval": self.interval
        }

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def wilson(hits: int, n: int) -> Score:
    """Percent of ``hits`` among ``n`` that are independent, with Wilson's interval (Wilson 1927).

    Raises EvaluationError for none.
    """
    if n < 1:
        raise EvaluationError("a share of no images has no value")
    share, spread = hits / n, Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Score(100 * share, 100 * low, 100 * high, f"Wilson, n={n}")


def normal(values: Sequence[float] | Array, what: str) -> Score:
    """Mean of ``values`` with 1.96 of its standard errors, by the population's deviation; ``what`` they are of."""
    x = np.asarray(values, np.float64)
    half = Z * float(x.std()) / math.sqrt(len(x))
    return Score(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, f"normal, {len(x)} {what}")


@dataclass(frozen=True)
class Shares:
    """A score as what each image adds to it: the mean over groups of sum(part) / sum(whole), in percent.

    Accuracy has one group, part 1 for a hit and whole 1; balanced accuracy a group per class; macro-F1 two parts for a
    hit (:func:`fastdino.eval.classify.metrics.macro_f1`); mIoU a group per class, pixels of the intersection and of
    the union; mean average precision one group, parts from 0 to 1.
    """

    items: list[str]
    """(n,) names of what is resampled: images, queries, objects."""
    item: Array
    """(m,) int64, the item of a row."""
    group: Array
    """(m,) int64, its group."""
    part: Array
    """(m,) fp64."""
    whole: Array
    """(m,) fp64. A group whose wholes sum to 0 is left out."""

    @classmethod
    def mean(cls, items: list[str], values: Array) -> "Shares":
        """The mean of one value in [0, 1] per item."""
        each = np.arange(len(items))
        return cls(items, each, np.zeros_like(each), np.asarray(values, np.float64), np.ones(len(items)))

    def value(self, counts: Array | None = None) -> float:
        """Percent; NaN where no group has a whole. ``counts`` (n,): how often each item is there, once by default."""
        part, whole = (x if counts is None else x * counts[self.item] for x in (self.part, self.whole))
        groups = int(self.group.max(initial=-1)) + 1
        sums = np.bincount(self.group, part, groups), np.bincount(self.group, whole, groups)
        there = sums[1] > 0
        return 100 * float((sums[0][there] / sums[1][there]).mean()) if there.any() else math.nan

    def score(self, strata: Array | None = None) -> Score:
        """With the interval of the bootstrap over items, of each of ``strata`` (n,) as many as there are."""
        values = [self.value(counts) for counts in resampled(len(self.items), strata)]
        kind = f"bootstrap, n={len(self.items)}" + ("" if strata is None else ", by class")
        return Score(self.value(), *_middle(values), kind)

    def subset(self, items: list[str]) -> "Shares":
        """Of these items alone, in this order; each has to be there."""
        place = {name: i for i, name in enumerate(self.items)}
        new = np.full(len(self.items), -1)
        new[[place[name] for name in items]] = np.arange(len(items))
        rows = new[self.item] >= 0
        return Shares(items, new[self.item[rows]], self.group[rows], self.part[rows], self.whole[rows])


def resampled(n: int, strata: Array | None = None) -> Iterator[Array]:
    """RESAMPLES times (n,) int64: how often each of n items is drawn, with replacement, within its stratum."""
    generator = np.random.default_rng(SEED)
    order = np.arange(n) if strata is None else np.argsort(strata, kind="stable")
    sizes = np.array([n]) if strata is None else np.unique(strata, return_counts=True)[1]
    size, start = np.repeat(sizes, sizes), np.repeat(sizes.cumsum() - sizes, sizes)
    for _ in range(RESAMPLES):
        drawn = start + (generator.random(n) * size).astype(np.int64)
        yield np.bincount(order[drawn], minlength=n)


def difference(one: Shares, other: Shares) -> Score:
    """Points by which ``one`` exceeds ``other`` on the items that both have, by a paired bootstrap over these.

    Raises EvaluationError for names that stand for several items, and for fewer than two in common.
    """
    for shares in (one, other):
        if len({*shares.items}) < len(shares.items):
            raise EvaluationError("names of images stand for several: the two results cannot be paired")
    both = sorted({*one.items} & {*other.items})
    if len(both) < 2:
        raise EvaluationError(
            f"the results have {len(both)} images in common of {len(one.items)} and {len(other.items)}: compare two of "
            "the same --data"
        )
    one, other = one.subset(both), other.subset(both)
    values = [one.value(counts) - other.value(counts) for counts in resampled(len(both))]
    return Score(one.value() - other.value(), *_middle(values), f"paired bootstrap, n={len(both)}")


def _middle(values: list[float]) -> tuple[float, float]:
    """The ends of the 95 % in the middle."""
    finite = [x for x in values if math.isfinite(x)]
    low, high = np.quantile(finite, [0.025, 0.975]) if finite else (math.nan, math.nan)
    return float(low), float(high)

"""Intervals and comparisons, by answers worked out by hand."""

import math

import numpy as np
import pytest

from fastdino.eval.intervals import RESAMPLES, Shares, difference, normal, resampled, wilson

NAMES = [f"{i}.png" for i in range(10)]


def test_wilson() -> None:
    score = wilson(8, 10)
    assert (score.value, score.low, score.high) == pytest.approx((80, 49.02, 94.33), abs=0.01)
    assert (wilson(0, 5).low, wilson(5, 5).high) == (0, 100)
    assert wilson(0, 5).high > 0, "no hit among five is no proof"
    with pytest.raises(ValueError, match="no images"):
        wilson(0, 0)


def test_the_interval_of_draws() -> None:
    score = normal([0.0, 1.0], "draws")
    assert score.value == 0.5
    assert score.high - score.value == pytest.approx(1.96 * 0.5 / math.sqrt(2), rel=1e-4)


def test_a_mean_over_groups_of_shares() -> None:
    """Two images with pixels of two classes: 2/3 and 1/4; a class of no pixels is left out."""
    shares = Shares(
        ["a", "b"], np.array([0, 1, 1, 0]), np.array([0, 0, 1, 2]), np.array([1.0, 1.0, 1.0, 0.0]),
        np.array([1.0, 2.0, 4.0, 0.0]),
    )  # fmt: skip
    assert shares.value() == pytest.approx(100 * (2 / 3 + 1 / 4) / 2)
    assert shares.value(np.array([2, 1])) == pytest.approx(100 * (3 / 4 + 1 / 4) / 2)
    assert math.isnan(shares.value(np.array([0, 0])))
    assert shares.subset(["b"]).value() == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)


def test_resampling_keeps_the_strata() -> None:
    strata = np.array([0, 1, 1, 2, 2, 2, 2])
    counts = np.array([*resampled(7, strata)])
    assert counts.shape == (RESAMPLES, 7)
    assert (counts[:, 0] == 1).all()
    assert (counts[:, 1:3].sum(1) == 2).all()
    assert counts[:, 1:].mean(0) == pytest.approx(np.ones(6), abs=0.1)
    assert (np.array([*resampled(7)]).sum(1) == 7).all()
    assert np.array_equal(counts, [*resampled(7, strata)]), "the same each time"


def test_the_bootstrap_is_as_wide_as_theory_says() -> None:
    hits = np.repeat([1.0, 0.0], [300, 100])
    score = Shares.mean([str(i) for i in range(400)], hits).score()
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400) * 100
    assert score.value == 75
    assert (score.low, score.high) == pytest.approx((75 - half, 75 + half), abs=0.5)


def test_a_comparison_is_paired() -> None:
    hits = np.array([1.0] * 6 + [0.0] * 4)
    one = Shares.mean(NAMES, hits)
    same = difference(one, one)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    order = np.array([3, 1, 4, 0, 2, 9, 5, 8, 6, 7])
    shuffled = Shares.mean([NAMES[i] for i in order], hits[order])
    assert difference(one, shuffled).high == 0, "by names, not by places"
    better = Shares.mean(NAMES, np.array([1.0] * 8 + [0.0] * 2))
    there, back = difference(better, one), difference(one, better)
    assert there.value == pytest.approx(20)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low == 0 < there.high, "what changed is two images of ten, all in one direction"


def test_what_cannot_be_compared() -> None:
    one = Shares.mean(["a", "b"], np.ones(2))
    with pytest.raises(ValueError, match="1 images in common of 2 and 2"):
        difference(one, Shares.mean(["b", "c"], np.ones(2)))
    with pytest.raises(ValueError, match="stand for several"):
        difference(one, Shares.mean(["a", "a"], np.ones(2)))

"""Calibration and the remedies for imbalance, by answers that are worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from fastdino.eval.classify.calibration import (
    best_of,
    brier_score,
    class_weights,
    expected_calibration_error,
    fit_temperature,
    logit_adjustment,
    negative_log_likelihood,
    reliability,
    with_calibration,
)
from fastdino.eval.result import Found


def test_class_weights() -> None:
    """n / (C n_c), as scikit-learn has it."""
    assert class_weights(torch.tensor([3, 1])).tolist() == pytest.approx([2 / 3, 2])
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 1, 0, 2])
    want = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert class_weights(labels.bincount()).tolist() == pytest.approx(want.tolist())
    assert class_weights(torch.tensor([2, 0])).tolist() == [0.5, 0]


def test_logit_adjustment() -> None:
    """Logits (.5, 0) with a prior of (.9, .1) are .6054 and 2.3026."""
    adjusted = torch.tensor([0.5, 0.0]) + logit_adjustment(torch.tensor([90, 10]))
    assert adjusted.tolist() == pytest.approx([0.6054, 2.3026], abs=1e-4)
    assert adjusted.argmax() == 1
    assert logit_adjustment(torch.tensor([90, 10]), tau=0.0).tolist() == [0, 0]
    assert logit_adjustment(torch.tensor([5, 5])).unique().numel() == 1
    assert logit_adjustment(torch.tensor([5, 0])).isfinite().all()


def test_calibration_error() -> None:
    """Four predictions at .9 of which three are right: one bin, .15."""
    nine, right = torch.full((4,), 0.9, dtype=torch.float64), torch.tensor([True, True, True, False])
    assert expected_calibration_error(nine, right) == pytest.approx(0.15)
    assert reliability(nine, right) == [(1.0, pytest.approx(0.9), 0.75)]
    # Two bins of two: (|.55 - .5| + |.95 - 1|) / 2.
    confidence, right = torch.tensor([0.9, 0.5, 1.0, 0.6]), torch.tensor([True, False, True, True])
    assert expected_calibration_error(confidence, right, bins=2) == pytest.approx(0.05)
    assert [share for share, *_ in reliability(torch.rand(150), torch.ones(150))] == pytest.approx([1 / 15] * 15)


def test_likelihood_and_brier_score() -> None:
    logits, labels = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([0, 1])
    assert negative_log_likelihood(logits, labels) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    assert brier_score(logits, labels) == pytest.approx((2 * 0.0625 + 2 * 0.25) / 2)


def test_temperature() -> None:
    """Logits of 4 of which a share of 1 / (1 + exp(-1)) is right: they should have been 1."""
    n = 10000
    wrong = round(n / (1 + math.e))
    logits, labels = torch.tensor([[4.0, 0.0]]).expand(n, 2), (torch.arange(n) < wrong).long()
    assert fit_temperature(logits, labels) == pytest.approx(4, rel=1e-3)
    assert fit_temperature(logits / 40, labels) == pytest.approx(0.1, rel=1e-3)
    found = with_calibration(Found(scores={}, protocol={}, data={}), logits, labels, 4.0).also["calibration"]
    assert found["scaled"]["ece"] == pytest.approx(0, abs=0.01)
    assert found["ece"] > 20
    assert found["scaled"]["nll"] < found["nll"]
    assert found["scaled"]["brier"] < found["brier"]


def test_few_images_that_are_all_right_are_no_proof_of_certainty() -> None:
    """Smoothed, 9 of 9 right are 19 of 20: logits ln 19 apart."""
    logits, labels = torch.tensor([[2.0, 0.0]]).expand(9, 2), torch.zeros(9, dtype=torch.int64)
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(19))


def test_the_best_of_several() -> None:
    """The most right; of equals the surest of the truth, which only then is looked at."""
    labels, asked = torch.tensor([0, 1]), list[int]()
    logits = [torch.eye(2) * scale for scale in (0.1, 1.0, 3.0, 2.0)]

    def told(index: int) -> torch.Tensor:
        asked.append(index)
        return logits[index]

    assert best_of([50.0, 100.0, 50.0, 0.0], told, labels) == 1
    assert asked == []
    assert best_of([100.0, 100.0, 50.0, 100.0], told, labels) == 3
    assert asked == [0, 1, 3]

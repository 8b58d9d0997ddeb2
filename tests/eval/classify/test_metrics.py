"""Scores of predictions by hand and beside scikit-learn; parts that are held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.eval.classify.classification import class_counts, held_out
from fastdino.eval.classify.metrics import Predictions


def predictions(truth: list[int], told: list[int], counts: list[int]) -> Predictions:
    names = [f"{i}.png" for i in range(len(truth))]
    classes = [f"class {c}" for c in range(len(counts))]
    return Predictions(np.array(truth), np.array(told), classes, np.array(counts), names)


def test_imbalance_by_hand() -> None:
    found = predictions([0, 0, 0, 1], [0, 0, 0, 0], [3, 1])
    scores = found.scores()
    assert [scores[name].value for name in ("accuracy", "balanced_accuracy", "macro_f1")] == pytest.approx(
        [75, 50, 100 * 3 / 7]
    )
    assert found.also()["worst_class"] == ["class 1", 0.0]
    assert found.data()["imbalance"] == 3
    assert found.data()["prior"] == {"class 0": 0.75, "class 1": 0.25}


def test_scikit_learn_agrees() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 7, 300)
    told = np.where(generator.random(300) < 0.6, truth, generator.integers(0, 7, 300))
    scores = predictions(truth.tolist(), told.tolist(), [5] * 7).scores()
    assert scores["accuracy"].value == pytest.approx(100 * metrics.accuracy_score(truth, told))
    assert scores["balanced_accuracy"].value == pytest.approx(100 * metrics.balanced_accuracy_score(truth, told))
    assert scores["macro_f1"].value == pytest.approx(100 * metrics.f1_score(truth, told, average="macro"))
    assert all(score.low < score.value < score.high for score in scores.values())


def test_recall_by_the_size_of_a_class() -> None:
    found = predictions([0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 0, 0], [500, 50, 5])
    also = found.also()
    assert (also["recall_many"], also["recall_medium"], also["recall_few"]) == (100, 50, 0)
    assert also["recall"]["class 1"]["value"] == 50
    even = predictions([0, 1], [0, 1], [50, 50]).also()
    assert not {"recall_many", "recall_medium", "recall_few"} & even.keys(), "all of one kind say nothing more"


def test_a_class_that_no_test_image_has() -> None:
    found = predictions([0, 0, 1], [0, 2, 1], [4, 4, 4])
    assert found.scores()["balanced_accuracy"].value == 75
    assert found.also()["recall"].keys() == {"class 0", "class 1"}
    assert found.scores()["macro_f1"].value == pytest.approx(100 * (2 / 3 + 1 + 0) / 3), "as it was told once"


def test_held_out_images_are_of_every_class_that_has_two() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2])
    train, chosen = held_out(labels)
    assert sorted([*train.tolist(), *chosen.tolist()]) == [*range(104)]
    assert class_counts(labels[chosen], 3).tolist() == [10, 1, 0]
    assert torch.equal(held_out(labels)[1], chosen)
    assert not torch.equal(held_out(labels, seed=1)[1], chosen)


def test_the_picture(tmp_path: Path) -> None:
    name, draw = predictions([0, 0, 1, 1], [0, 1, 1, 1], [9, 9]).picture()
    draw(tmp_path / "x.png")
    assert name == ""
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > picture.height > 200

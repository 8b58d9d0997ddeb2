"""Few shots: centroids by hand, draws, episodes, and what the test images may not decide."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.eval import Features, KNeighbors, intervals
from fastdino.eval.classify import fewshot as room
from fastdino.eval.classify.fewshot import FewShot, centroids, cl2n, drawn_order, episodes, nearest
from fastdino.eval.classify.logreg import fit, solver, standardized, told_by
from tests.eval.classify.class_images import CONFIG, Poisoned, folders, subject


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 20)


def clouds(n: int, classes: int, seed: int, spread: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centers = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return Features(3 + centers[y] + spread * torch.randn(n, 6, generator=generator), y, torch.arange(n))


def test_centroids_by_hand() -> None:
    """Shots (2, 0) and (0, 2), mean (1, 1): (3, 0) is of class 0, (0, 1) of class 1."""
    mean = torch.tensor([1.0, 1.0])
    points = centroids(cl2n(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), mean), torch.tensor([0, 1]), 2)
    root = math.sqrt(0.5)
    torch.testing.assert_close(points, torch.tensor([[root, -root], [-root, root]]))
    assert nearest(cl2n(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), mean), points).tolist() == [0, 1]


def test_centroids_are_scikit_learns() -> None:
    """They are not normalised again: those of spread classes are nearer to the origin."""
    bank, test = clouds(40, 4, 0), clouds(100, 4, 1)
    x, queries = (cl2n(features.vectors, bank.vectors.mean(0)) for features in (bank, test))
    points = centroids(x, bank.labels, 5)
    theirs = NearestCentroid().fit(x.numpy(), bank.labels.numpy())
    np.testing.assert_allclose(points[:4], theirs.centroids_, atol=1e-6)
    assert points[:4].norm(dim=1).max() < 0.99
    assert nearest(queries, points).tolist() == theirs.predict(queries.numpy()).tolist(), (
        "a class without images is far"
    )


def test_draws() -> None:
    """The k of each class are among the k + 1; a class that has fewer gives all; other draws are others."""
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 6)
    place = drawn_order(labels, seed=0, draw=0)
    assert [labels[place < k].bincount().tolist() for k in (1, 3, 6)] == [[1, 1, 1], [3, 2, 3], [6, 2, 6]]
    assert torch.equal(place, drawn_order(labels, 0, 0))
    for seed, draw in ((0, 1), (1, 0)):
        assert not torch.equal(place, drawn_order(labels, seed, draw))


def test_what_each_classifier_tells() -> None:
    """Of the images drawn alone; the mean and the deviation are those of all training images, without their labels."""
    bank, test = clouds(40, 4, 0), clouds(50, 4, 1)
    told = FewShot(draws=2)._told(bank, test, (2, 5), ["centroid", "knn", "logreg"])
    assert {key: len(draws) for key, draws in told.items()} == {(n, k): 2 for n in room.CLASSIFIERS for k in (2, 5)}
    few = drawn_order(bank.labels, 0, 1) < 5
    x, y = bank.vectors[few], bank.labels[few]
    mean = bank.vectors.mean(0)
    want = nearest(cl2n(test.vectors, mean), centroids(cl2n(x, mean), y, 4))
    assert told["centroid", 5][1].tolist() == want.tolist()
    assert told["knn", 5][1].tolist() == KNeighbors(5).fit(x, y).predict(test.vectors).tolist()
    model = solver()
    fit(model, standardized(x, bank.vectors), y, 1.0)
    want = told_by(model, standardized(test.vectors, bank.vectors), 4).argmax(1)
    assert told["logreg", 5][1].tolist() == want.tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("images"))


def evaluation(data: Path, **flags: Any) -> FewShot:
    return FewShot(data=str(data), num_workers=0, **{"baselines": "no", "cache": False, "draws": 3, **flags})


def test_the_whole_evaluation(data: Path, tmp_path: Path) -> None:
    result = evaluation(data, baselines="yes")(subject(tmp_path))
    told = result.write(tmp_path)
    scores, also = told["scores"], told["also"]
    names = [f"{name}_{k}" for name in ("centroid", "knn", "logreg") for k in (1, 2, 5, 10)]
    assert [*scores] == ["accuracy", "balanced_accuracy", *names, "knn_all_labels"]
    assert scores["accuracy"] == scores["centroid_5"]
    assert scores["accuracy"]["interval"] == "normal, 3 draws"
    assert scores["centroid_10"]["value"] > scores["centroid_1"]["value"] > 33
    assert scores["knn_all_labels"]["interval"] == "Wilson, n=18"
    reached = {name: [k for k in (1, 2, 5, 10) if scores[f"{name}_{k}"]["value"] >= scores["knn_all_labels"]["value"]]
               for name in room.CLASSIFIERS}  # fmt: skip
    assert also["shots_to_reach_knn_of_all_labels"] == {name: min(ks, default=None) for name, ks in reached.items()}
    assert told["baselines"].keys() == {"pixels", "random_init"}
    assert told["protocol"]["shots"] == (1, 2, 5, 10), "no class has 20 images"
    assert result.found.shares is not None
    assert result.found.shares.value() == pytest.approx(result.found.scores["accuracy"].value)
    assert "fewshot.png" in told["files"]


def test_poisoned_test_labels_change_the_score_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, told = bank_and_test(str(data), CONFIG.data), list[Any]()
    keep = FewShot._told
    monkeypatch.setattr(FewShot, "_told", lambda *given: told.append(keep(*given)) or told[-1])
    clean, poisoned = (
        evaluation(data).judge(subject(tmp_path), sets._replace(test=test)) for test in (sets.test, Poisoned(sets.test))
    )
    for key, draws in told[0].items():
        assert all(torch.equal(one, other) for one, other in zip(draws, told[1][key], strict=True))
    assert clean.protocol == poisoned.protocol
    assert clean.scores["accuracy"].value > poisoned.scores["accuracy"].value


def test_classes_of_unequal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path / "long", train=(12, 5, 1))
    found = evaluation(data, classifiers=("knn", "logreg")).judge(
        subject(tmp_path), bank_and_test(str(data), CONFIG.data)
    )
    assert found.notes == [
        "1 classes have fewer than 2 training images and gave all",
        "1 classes have fewer than 5 training images and gave all",
        "2 classes have fewer than 10 training images and gave all",
    ]
    assert found.also["headline"] == "knn, 5 shots"
    monkeypatch.setattr(room, "MOST", 1000)
    found = evaluation(data, shots=(2, 1)).judge(subject(tmp_path), bank_and_test(str(data), CONFIG.data))
    assert found.notes[0] == "logreg would take hours and is left out"
    assert [*found.scores][2:-1] == ["centroid_1", "centroid_2", "knn_1", "knn_2"]
    assert found.also["headline"] == "centroid, 2 shots"


def plain_episode(bank: Features, test: Features, generator: torch.Generator) -> float:
    """One of two classes, two shots and three queries, by loops."""
    classes = torch.randperm(4, generator=generator)[:2].tolist()
    few, asked = [], []
    for label in classes:
        for features, count, into in ((bank, 2, few), (test, 3, asked)):
            own = features.vectors[features.labels == label]
            into.append(own[torch.randperm(len(own), generator=generator)[:count]])
    hits = 0
    for true, queries in enumerate(asked):
        for query in queries:
            hits += int(np.argmin([(query - shots.mean(0)).norm() for shots in few])) == true
    return 100 * hits / 6


def test_episodes_are_those_of_loops() -> None:
    """The same mean and spread over many draws of unequal classes."""
    bank, test = (clouds(n, 4, seed, spread=1.5) for n, seed in ((43, 0), (30, 1)))
    made = torch.cat([*episodes(bank, test, torch.arange(4), (2, 2, 3), 600, seed=0)])
    generator = torch.Generator().manual_seed(1)
    plain = torch.tensor([plain_episode(bank, test, generator) for _ in range(600)])
    assert len(made) == 600
    assert made.mean().item() == pytest.approx(plain.mean().item(), abs=4 * plain.std().item() / 600**0.5 * 2**0.5)
    assert made.std().item() == pytest.approx(plain.std().item(), rel=0.1)
    again = torch.cat([*episodes(bank, test, torch.arange(4), (2, 2, 3), 70, seed=0)])
    assert torch.equal(again[:64], made[:64])


def test_an_episode_shows_an_image_once() -> None:
    """With as many shots and queries as there are, every one of them: where test is bank, all are right."""
    bank = clouds(12, 4, 0)
    seen: list[Tensor] = []
    table = room._members(bank.labels, torch.arange(4))
    for _ in range(5):
        seen.append(room._drawn(table[torch.tensor([[2, 0]])], 3, torch.Generator().manual_seed(len(seen))))
    assert {tuple(sorted(row.tolist())) for drawn in seen for row in drawn[0]} == {(2, 6, 10), (0, 4, 8)}
    ragged = torch.tensor([[4, 7, 8, 9], [5, 6, -1, -1]])
    drawn = [room._drawn(ragged, 2, torch.Generator().manual_seed(seed)).sort().values for seed in range(9)]
    assert {tuple(row[1].tolist()) for row in drawn} == {(5, 6)}, "a class with fewer images has no others"
    assert len({tuple(row[0].tolist()) for row in drawn}) > 2
    far = Features(torch.eye(4)[bank.labels], bank.labels, bank.index)
    assert torch.cat([*episodes(far, far, torch.arange(4), (3, 3, 3), 5, seed=0)]).tolist() == [100.0] * 5


def test_the_evaluation_of_episodes(data: Path, tmp_path: Path) -> None:
    told = evaluation(data, episodes=100, way=3, queries=6)(subject(tmp_path)).write(tmp_path)
    assert [*told["scores"]] == ["accuracy", "3_way_1_shot", "3_way_5_shot"]
    assert told["scores"]["accuracy"] == told["scores"]["3_way_5_shot"]
    assert told["scores"]["accuracy"]["interval"] == "normal, 100 episodes"
    assert 33 < told["scores"]["3_way_1_shot"]["value"] < told["scores"]["3_way_5_shot"]["value"]
    assert (told["protocol"]["episodes"], told["protocol"]["way"], told["protocol"]["queries"]) == (100, 3, 6)
    with pytest.raises(ConfigError, match=r"0 classes of .* have 5 training and 15 test images, .* --way 5"):
        evaluation(data, episodes=100).open(subject(tmp_path))


def test_more_shots_than_images(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shots 13: the largest class of the bank has 12 images"):
        evaluation(data, shots=(13,)).open(subject(tmp_path))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"shots": (0,)}, "--shots"),
        ({"shots": (2, 2)}, "different"),
        ({"draws": 1}, "--draws=1"),
        ({"classifiers": ()}, "--classifiers"),
        ({"episodes": 1}, "--episodes=1"),
        ({"way": 1}, "--way=1"),
        ({"queries": 0}, "--queries=0"),
    ],
    ids=str,
)
def test_flags_that_cannot_work(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FewShot(**flags)

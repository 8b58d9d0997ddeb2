"""Weighted k-NN against its definition, and the questions it refuses."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, DataConfig, ViewsConfig
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.eval import Features, KNeighbors, Knn, Subject
from fastdino.eval.classify import knn as room


def literal(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> list[int]:
    """score(c) = sum over the k most similar of class c of exp(cosine / temperature)."""
    unit = [(x / x.norm(dim=1, keepdim=True)).double().numpy() for x in (bank, queries)]
    best = []
    for query in unit[1]:
        cosine = unit[0] @ query
        votes: dict[int, float] = {}
        for i in np.argsort(-cosine)[:k]:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(cosine[i] / temperature)
        best.append(max(votes, key=lambda c: votes[c]))
    return best


def clouds(n: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Five overlapping classes, lengths that differ, labels that are not 0..4."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(5, (n,), generator=generator)
    x = centers[classes] + spread * torch.randn(n, 8, generator=generator)
    return x * torch.rand(n, 1, generator=generator).add(0.1), torch.tensor([3, 7, 8, 40, 1000])[classes]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 2, 20, 150])
def test_predictions_are_the_definitions(k: int, temperature: float) -> None:
    (bank, labels), (queries, _) = clouds(150, 0), clouds(70, 1)
    got = KNeighbors(k, temperature).fit(bank, labels).predict(queries)
    assert got.tolist() == literal(bank, labels, queries, k, temperature)


def test_weights_decide_between_one_near_and_two_far() -> None:
    bank, labels = torch.tensor([[1.0, 0.1], [1.0, 0.9], [1.0, 1.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 0.0]])
    assert KNeighbors(3, 0.07).fit(bank, labels).predict(query).item() == 0
    assert KNeighbors(3, 10.0).fit(bank, labels).predict(query).item() == 1


def test_several_k_from_one_search() -> None:
    bank, (queries, truth) = clouds(300, 0), clouds(200, 1)
    scores = KNeighbors().fit(*bank).scores(queries, truth, [10, 20, 100, 200])
    for k, score in scores.items():
        predicted = torch.tensor(literal(*bank, queries, k, 0.07))
        assert score == pytest.approx((predicted == truth).double().mean().item())
        assert score == KNeighbors(k).fit(*bank).score(queries, truth)
    assert len(set(scores.values())) > 1
    assert 0.4 < scores[20] < 0.99


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, (queries, _) = clouds(150, 0), clouds(71, 1)
    want = KNeighbors(20).fit(*bank).predict(queries)
    monkeypatch.setattr(room, "MAX_ELEMENTS", 150 * 8)  # 8 rows at a time, the last block of 7
    largest = 0
    topk = torch.Tensor.topk

    def watched(self: Tensor, k: int, dim: int) -> Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, k, dim)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    assert torch.equal(KNeighbors(20).fit(*bank).predict(queries), want)
    assert largest == 150 * 8
    monkeypatch.setattr(room, "MAX_ELEMENTS", 1)  # a bank larger than a block still works, row by row
    assert torch.equal(KNeighbors(20).fit(*bank).predict(queries[:3]), want[:3])


def test_a_small_temperature_does_not_overflow() -> None:
    bank, (queries, _) = clouds(150, 0), clouds(50, 1)
    got = KNeighbors(5, 1e-4).fit(*bank).predict(queries)  # exp(1 / 1e-4) is infinite
    assert torch.equal(got, KNeighbors(1).fit(*bank).predict(queries))


def test_what_cannot_be_asked() -> None:
    features, labels = clouds(10, 0)
    with pytest.raises(ValueError, match=r"k=20 neighbours of a bank of 10 images: choose 1 <= k <= 10"):
        KNeighbors(20).fit(features, labels)
    with pytest.raises(ValueError, match="1 classes"):
        KNeighbors(2).fit(features, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not \(10, 8\) and \(9,\)"):
        KNeighbors(2).fit(features, labels[1:])
    fitted = KNeighbors(2).fit(features, labels)
    with pytest.raises(ValueError, match="k=11"):
        fitted.scores(features, labels, [2, 11])
    with pytest.raises(ValueError, match="need a label each"):
        fitted.score(features[:0], labels[:0])


class Colours:
    """Plain images: class 0 is red, 1 green, 2 blue; ``brightness`` must not matter to a cosine."""

    labels = ("red", "green", "blue")

    def __init__(self, n: int, brightness: int, classes: Sequence[int] = (0, 1, 2)) -> None:
        self.n, self.brightness, self.classes = n, brightness, classes

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> tuple[np.ndarray, int]:
        label = self.classes[index % len(self.classes)]
        pixels = np.zeros((10, 10, 3), np.uint8)
        pixels[..., label] = self.brightness + index
        return pixels, label

    def name(self, index: int) -> str:
        return str(index)


class Means(nn.Module):
    """The mean of each channel, on pixels as they were before ImageNet's normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return x.mean((-2, -1)) * std + mean


CONFIG = Config(
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(num_workers=0, image_size=16, normalize="imagenet"),
)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is opened: 30 bright and 20 dark images; each opening is noted."""
    opened: list[object] = []

    def bank_and_test(root: str, data: DataConfig) -> Sets:
        opened.append((root, data))
        return Sets(Colours(30, 100), Colours(20, 30), "made here")

    monkeypatch.setattr(room, "bank_and_test", bank_and_test)
    return opened


def test_the_evaluation(sets: list[object], tmp_path: Path) -> None:
    """Percent, and everything that the figure depends on beside it."""
    found = Knn(data="colours", neighbors=(5, 10), num_workers=0)(Subject(Means(), CONFIG, tmp_path))
    assert found == {
        "knn_5": 100.0, "knn_10": 100.0, "data": "colours", "bank": 30, "test": 20, "size": 32, "crop": 0.875,
        "normalize": "imagenet", "precision": "fp32", "temperature": 0.07, "split": "made here",
    }  # fmt: skip
    assert sets == [("colours", CONFIG.data)]
    other = Knn(size=8, normalize="image", precision="bf16", num_workers=0)(Subject(Means(), CONFIG, tmp_path))
    assert (other["size"], other["normalize"], other["precision"]) == (8, "image", "bf16")


def test_a_run_is_evaluated_on_as_much_of_an_image_as_it_says(sets: list[object]) -> None:
    whole = replace(CONFIG, data=replace(CONFIG.data, eval_crop=1.0))
    assert Knn().reading(whole).crop == 1.0


def test_the_default_ks_fit_the_bank() -> None:
    assert Knn().ks(1000) == [10, 20, 100, 200]
    assert Knn().ks(150) == [10, 20, 100]
    assert Knn().ks(7) == [7]
    features = Features(*clouds(30, 0))
    assert Knn().accuracy(features, features).keys() == {"knn_10", "knn_20"}
    with pytest.raises(ConfigError, match=r"--neighbors 31 of a bank of 30 images: choose k <= 30"):
        Knn(neighbors=(31, 5)).accuracy(features, features)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"neighbors": ()}, "--neighbors"),
        ({"neighbors": (5, 0)}, "--neighbors"),
        ({"neighbors": (5, 5)}, "different"),
        ({"temperature": 0.0}, "--temperature"),
        ({"batch": 0}, "--batch=0 must be at least 1"),
        ({"size": -8}, "--size=-8 must be at least 1"),
        ({"num_workers": -1}, "--num-workers"),
    ],
)
def test_flags_that_cannot_work(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Knn(**flags)

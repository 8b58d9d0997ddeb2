"""Weighted k-NN against its definition, and the questions it refuses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, DataConfig, ViewsConfig
from fastdino.eval import Features, KNeighbors, Knn, Subject
from fastdino.eval.classify import knn as room
from fastdino.eval.evaluation import alone


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


CONFIG = Config(
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(num_workers=0, image_size=16, normalize="imagenet"),
)


class Means(nn.Module):
    """The mean of each channel, on pixels as they were before ImageNet's normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return x.mean((-2, -1)) * std + mean


def colours(folder: Path, **counts: int) -> Path:
    """Class folders of plain images below train/ and test/; brightness must not matter to a cosine."""
    for split, brightness in (("train", 100), ("test", 30)):
        for channel, (name, count) in enumerate(counts.items()):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((10, 10, 3), np.uint8)
                pixels[..., channel] = brightness + i
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def test_the_evaluation(tmp_path: Path) -> None:
    """Percent with its interval, and everything that the figure depends on."""
    root = colours(tmp_path / "data", red=10, green=10, blue=10)
    flags = {"data": str(root), "num_workers": 0, "cache_dir": tmp_path / "cache"}
    found = Knn(neighbors=(5, 10), **flags)(Subject(Means(), CONFIG, tmp_path)).json()
    assert (found["kind"], found["headline"]) == ("knn", "accuracy")
    assert found["scores"].keys() == {"accuracy", "balanced_accuracy", "macro_f1", "knn_5", "knn_10"}
    assert {score["value"] for score in found["scores"].values()} == {100.0}
    assert found["scores"]["accuracy"]["low"] == pytest.approx(88.65, abs=0.01)
    assert found["protocol"] == {
        "size": 32, "crop": 0.875, "normalize": "imagenet", "precision": "fp32", "tokens": "cls", "k": 10,
        "temperature": 0.07, "balance": "none",
    }  # fmt: skip
    data = found["data"]
    assert (data["bank"], data["test"], data["classes"], data["unreadable"]) == (30, 30, 3, 0)
    assert data["split"] == "train/ is the bank, test/ is judged"
    assert found["baselines"]["pixels"]["value"] == 100
    other = Knn(size=8, normalize="image", precision="bf16", **flags)(Subject(Means(), CONFIG, tmp_path)).json()
    assert [other["protocol"][name] for name in ("size", "normalize", "precision")] == [8, "image", "bf16"]


def test_a_run_is_evaluated_on_as_much_of_an_image_as_it_says() -> None:
    whole = replace(CONFIG, data=replace(CONFIG.data, eval_crop=1.0))
    assert Knn().reading(whole).crop == 1.0
    assert Knn(crop_ratio=0.5).reading(whole).crop == 0.5


def test_balanced_votes_help_small_classes() -> None:
    """One image of class 0 among nine of class 1, a little farther: alone it loses, by shares it wins."""
    bank = torch.tensor([[1.0, 0.30], *[[1.0, 0.20]] * 9])
    labels, query = torch.tensor([0] + [1] * 9), torch.tensor([[1.0, 0.27]])
    assert KNeighbors(10).fit(bank, labels).predict(query).item() == 1
    assert KNeighbors(10, balanced=True).fit(bank, labels).predict(query).item() == 0


def test_scikit_learn_agrees() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    (bank, labels), (queries, _) = clouds(300, 0), clouds(100, 1)
    theirs = neighbors.KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    want = theirs.fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
    assert KNeighbors(20).fit(bank, labels).predict(queries).tolist() == want.tolist()


def test_draws_of_some_images_per_class(tmp_path: Path) -> None:
    (bank, labels), (queries, truth) = clouds(300, 0), clouds(100, 1)
    sets = [Features(x, y, torch.arange(len(x))) for x, y in ((bank, labels), (queries, truth))]
    score = Knn(tries=3)._per_class(*sets, 4, alone())
    values = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for label in labels.unique():
            places = (labels == label).nonzero().flatten()
            drawn.append(places[torch.randperm(len(places), generator=generator)[:4]])
        few = torch.cat(drawn)
        assert labels[few].unique(return_counts=True)[1].tolist() == [4] * 5
        values.append(100 * KNeighbors(4).fit(bank[few], labels[few]).score(queries, truth))
    assert score.value == pytest.approx(np.mean(values))
    assert score.high - score.value == pytest.approx(1.96 * np.std(values) / 3**0.5, rel=1e-4)
    root = colours(tmp_path, red=3, green=5)
    with pytest.raises(ConfigError, match="--per-class 4: the bank has 3 images of red: ask for 3 or fewer"):
        Knn(data=str(root), per_class=(1, 4)).open(Subject(Means(), CONFIG, tmp_path))


def test_a_bank_in_parts_votes_as_the_whole() -> None:
    """Each rank searches its part; here two take turns, each told what the other found."""
    bank, (queries, _) = clouds(151, 0), clouds(70, 1)
    want = KNeighbors(20).fit(*bank).predictions(queries, [1, 20, 130])

    class Two:
        world_size = 2

        def __init__(self, rank: int, others: list[Any]) -> None:
            self.rank, self.mine, self.others = rank, list[Any](), others

        def gather(self, value: Any) -> list[Any]:
            self.mine.append(value)
            other = self.others[len(self.mine) - 1] if self.others else value
            return [value, other] if self.rank == 0 else [other, value]

    first = Two(1, [])
    KNeighbors(20, ranks=first).fit(*bank).predictions(queries, [1, 20, 70])  # type: ignore[arg-type]
    second = Two(0, [])
    KNeighbors(20, ranks=second).fit(*bank).predictions(queries, [1, 20, 70])  # type: ignore[arg-type]
    for rank, others in ((0, first.mine), (1, second.mine)):
        got = KNeighbors(20, ranks=Two(rank, others)).fit(*bank).predictions(queries, [1, 20, 70])  # type: ignore[arg-type]
        for k in (1, 20):
            assert torch.equal(got[k], want[k])


def test_the_default_ks_fit_the_bank() -> None:
    assert Knn().ks(1000) == [1, 5, 10, 20, 100, 200]
    assert Knn().ks(150) == [1, 5, 10, 20, 100]
    assert Knn().ks(7) == [1, 5]
    features = Features(*clouds(30, 0), torch.arange(30))
    assert Knn().accuracy(features, features).keys() == {"knn_1", "knn_5", "knn_10", "knn_20"}
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
        ({"crop_ratio": 1.5}, "--crop-ratio"),
        ({"per_class": (0,)}, "--per-class"),
        ({"cache_gb": 0.0}, "--cache-gb"),
    ],
)
def test_flags_that_cannot_work(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Knn(**flags)

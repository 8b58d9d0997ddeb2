"""Clusters against classes: worked out by hand, and the whole command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.cli import main
from fastdino.config import Config, DataConfig, ViewsConfig
from fastdino.eval import EvaluationError, Subject
from fastdino.eval.unlabelled import clusters as room
from fastdino.eval.unlabelled.clusters import Cluster, k_means, matched

pytest.importorskip("sklearn")
CONFIG = Config(views=ViewsConfig(global_size=16, local_size=16), data=DataConfig(normalize="image"))


class Means(torch.nn.Module):
    """Mean colours, which are the same for gray images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((-2, -1)) + torch.tensor([1.0, 0.0, 0.0])


def pictures(root: Path, seed: int = 0, swapped: bool = False) -> Path:
    """Three classes of stripes, 24 to learn from and 18 to judge; with ``swapped`` test labels the first two are."""
    draws = np.random.default_rng(seed)
    for split, count in (("train", 8), ("test", 6)):
        for number, name in enumerate(("flat", "rows", "columns")):
            label = ("rows", "flat", "columns")[number] if swapped and split == "test" else name
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 40, (16, 16, 3), dtype=np.uint8) + 100
                if number:
                    pixels[::2] += 100
                pixels = pixels.transpose(1, 0, 2) if name == "columns" else pixels
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def test_two_far_blobs_are_found_whatever_their_names() -> None:
    """And each keeps its own class, also where a name is missing or one cluster is of several."""
    x = torch.cat([torch.randn(10, 3) + 50, torch.randn(12, 3) - 50])
    labels = np.array([7] * 10 + [2] * 12)
    found = k_means(x, 2).labels_
    assert (matched(found, labels)[found] == labels).all()
    assert (matched(1 - found, labels)[1 - found] == labels).all()
    assert matched(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 0])).tolist() == [1, 0], "3 of 5 right, not 2"


@pytest.mark.parametrize("swapped", [False, True])
def test_the_whole_command(tmp_path: Path, swapped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Pixels tell the stripes apart. Labels of the test set are looked at when all is decided."""
    data = pictures(tmp_path / "data", swapped=swapped)
    out = str(tmp_path / "out")
    main(["eval", "cluster", "pixels", "--data", str(data), "--size", "16", "--no-cache", "--out", out])
    told = json.loads(capsys.readouterr().out)
    assert told == {**json.loads((tmp_path / "out/cluster.json").read_text()), "out": out}
    scores = {name: score["value"] for name, score in told["scores"].items()}
    assert (scores["nmi"], scores["ari"]) == (100.0, 100.0)
    assert scores["hungarian_accuracy"] == pytest.approx(100 / 3 if swapped else 100, abs=1e-3)
    assert told["headline"] == "hungarian_accuracy"
    assert told["protocol"]["clusters"] == 3
    assert told["files"] == ["cluster.png", "cluster.npz"]
    with np.load(tmp_path / "out/cluster.npz") as arrays:
        assert len(np.unique(arrays["clusters"])) == 3
        assert len(arrays["images"]) == 18


def test_scores_are_scikit_learns(tmp_path: Path) -> None:
    """With their intervals, of clusters that do not quite agree."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    class Some(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 1::2, :1].flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, 0.5]) + 1

    found = Cluster(data=str(pictures(tmp_path)), cache=False, num_workers=0, baselines="no")
    result = found(Subject(Some(), CONFIG, tmp_path)).found
    labels, clusters = result.arrays["labels"], result.arrays["clusters"]
    for name, of in (("nmi", normalized_mutual_info_score), ("ari", adjusted_rand_score)):
        score = result.scores[name]
        assert score.value == pytest.approx(100 * of(labels, clusters))
        assert 0 < score.value < 100
        assert score.low < score.value < score.high
    agreed = result.arrays["predictions"] == labels
    assert result.scores["hungarian_accuracy"].value == pytest.approx(100 * agreed.mean())


def test_many_images_are_clustered_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MANY", 20)
    found = k_means(torch.cat([torch.randn(20, 3) + 50, torch.randn(20, 3) - 50]), 2)
    assert type(found).__name__ == "MiniBatchKMeans"
    assert {*found.labels_[:20]} != {*found.labels_[20:]}


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (torch.randn(2, 4), "3 clusters of 2 images"),
        (torch.ones(9, 4), "the features of 9 images are 1 points for 3 clusters"),
        (torch.tensor([[1.0, 0], [0, 1]]).repeat(5, 1), "are 2 points for 3 clusters"),
        (torch.full((9, 4), float("nan")), "not finite"),
    ],
)
def test_features_that_do_not_cluster(features: torch.Tensor, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        k_means(features, 3)


def test_what_is_refused_before_features_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcde":
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    subject = Subject(Means(), CONFIG, tmp_path)
    with pytest.raises(EvaluationError, match="has 4 images in the bank, and 5 classes with a cluster for each"):
        Cluster(data=str(tmp_path)).open(subject)
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'fastdino\[eval\]'"):
        Cluster(data=str(tmp_path)).open(subject)

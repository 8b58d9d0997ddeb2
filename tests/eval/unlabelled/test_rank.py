"""RankMe, LiDAR and alpha-ReQ against answers worked out by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino import recipes
from fastdino.cli import main
from fastdino.config import ConfigError, ViewsConfig
from fastdino.data import FolderSource
from fastdino.data.loader import labelled_batches
from fastdino.data.views import apply, sample_params
from fastdino.eval import EvaluationError, Reading, Subject, extract
from fastdino.eval.unlabelled.jackknife import jackknife
from fastdino.eval.unlabelled.rank import Rank, Views, alpha_req, lidar, rankme, spectrum
from fastdino.model import build_backbone


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (torch.eye(8), 8.0),
        (torch.eye(8).repeat(5, 1), 8.0),
        (torch.ones(40, 8), 1.0),
        (torch.zeros(40, 8), 1.0),
        (torch.outer(torch.arange(1.0, 41), torch.arange(8.0)), 1.0),
        (torch.eye(8) * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), 4.0),
        (torch.diag(torch.tensor([3.0, 1.0])), 4 / 3**0.75),  # shares 3/4 and 1/4
        (torch.diag(torch.tensor([3.0, 1.0]))[:, [1, 0]], 1.754765),
    ],
)
def test_rankme(features: torch.Tensor, expected: float) -> None:
    assert rankme(features) == pytest.approx(expected, rel=1e-6)
    assert rankme(7 * features) == pytest.approx(expected, rel=1e-6), "whatever their length"
    assert rankme(features.half()) == pytest.approx(expected, rel=1e-6), "computed in fp64"


def test_rankme_is_not_centered() -> None:
    """A mean that all features share is a direction, and the largest."""
    features = torch.cat([torch.eye(4), -torch.eye(4)])  # four directions alike
    assert rankme(features) == pytest.approx(4.0)
    assert rankme(features + 10) < 2


def test_lidar() -> None:
    """Two images on a line; images apart along three axes, of which the views blur the third three times as much."""
    line = torch.tensor([[[0.0, 0.0], [0.2, 0.2]], [[1.0, 1.0], [1.2, 1.2]]])
    assert lidar(line) == pytest.approx(1.0)
    images = torch.cat([torch.eye(3), -torch.eye(3)])
    views = images[:, None] + 0.5 * images  # each image is seen along every axis: Sw is diag(0.1, 0.1, 0.1)
    assert lidar(views) == pytest.approx(3.0)
    blurred = images[:, None] + 0.5 * images * torch.tensor([1.0, 1.0, 3.0])  # diag(0.1, 0.1, 0.9)
    shares = torch.tensor([9.0, 9.0, 1.0]) / 19
    assert lidar(blurred, ridge=0.0) == pytest.approx(float(torch.special.entr(shares).sum().exp()))
    shares = torch.tensor([5.0, 5.0, 1.0]) / 11  # Sw is diag(0.2, 0.2, 1) with the ridge
    assert lidar(blurred, ridge=0.1) == pytest.approx(float(torch.special.entr(shares).sum().exp()))
    assert rankme(blurred.flatten(0, 1)) > 2.9, "RankMe takes the blur for more"


def test_the_ridge_keeps_the_scatter_whole() -> None:
    """Views that are all alike leave no scatter, and images that are all alike nothing to tell apart."""
    alike = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[:, None].expand(4, 5, 2)
    assert lidar(alike) == pytest.approx(2.0)
    assert lidar(torch.ones(4, 5, 2)) == 1.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req(alpha: float) -> None:
    """Rows +-sqrt(value) along each of ten axes, about a mean that is not a direction of theirs."""
    wanted = torch.arange(1, 11).double() ** -alpha
    rows = torch.diag(wanted.sqrt())
    features = torch.cat([rows, -rows]) * 10**0.5 + 5
    assert spectrum(features).tolist() == pytest.approx(wanted.tolist())
    assert alpha_req(spectrum(features)) == pytest.approx(alpha)


def test_alpha_req_looks_at_places_3_to_6_of_ten() -> None:
    values = torch.tensor([1000.0, 999, 3**-1.0, 4**-1.0, 5**-1.0, 6**-1.0, 1e-9, 1e-9, 0, 0], dtype=torch.float64)
    assert alpha_req(values) == pytest.approx(1.0)
    assert alpha_req(torch.cat([values[:5], torch.zeros(5)])) == pytest.approx(1.0), "zeros are left out"


def test_a_spectrum_of_nothing() -> None:
    """Features that are all equal have no covariance, whatever rounding leaves of it."""
    features = torch.full((300, 20), 0.1) * torch.arange(1, 21)
    assert not spectrum(features).any()
    assert math.isnan(alpha_req(spectrum(features)))


# ---------------------------------------------------------------------------------------------------- the command


def photos(folder: Path, count: int) -> Path:
    """Images without a class."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(draws.integers(0, 255, (5, 4, 3), dtype=np.uint8))
        small.resize((40, 48), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def evaluate(data: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What the JSON of a random start says."""
    folders = ["--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), "--num-workers", "0"]
    main(["eval", "rank", "random:small", "--data", str(data), *folders, *flags])
    return json.loads((tmp_path / "out/rank.json").read_text())


def test_the_whole_command(tmp_path: Path) -> None:
    """Of images that nobody labelled; few, which it says."""
    data = photos(tmp_path / "data", 20)
    (data / "20.png").write_bytes(b"no image")
    found = evaluate(data, tmp_path, "--views", "3", "--view-images", "8", "--seed", "1")
    config = recipes.get("small")
    backbone = build_backbone(config.model, 28, seed=1).eval()
    how = Reading(size=28, crop=1.0, normalize="image")
    x = extract(backbone, FolderSource(data), how, num_workers=0).vectors
    scores = found["scores"]
    assert scores["rankme"]["value"] == pytest.approx(rankme(x), abs=1e-4)
    assert scores["alpha_req"]["value"] == pytest.approx(alpha_req(spectrum(x)), abs=1e-4)
    for name in ("rankme", "lidar", "alpha_req"):
        low, value, high = (scores[name][end] for end in ("low", "value", "high"))
        assert name == "lidar" or low < value < high
    assert scores["rankme"]["low"] == pytest.approx(jackknife(lambda some: rankme(x[some]), 20).low, abs=1e-3)
    assert 1 < scores["lidar"]["value"] < 7
    assert found["baselines"]["random_init"]["value"] == scores["rankme"]["value"], "the same start"
    data_told = {name: found["data"][name] for name in ("images", "of", "unreadable")}
    assert data_told == {"images": 21, "of": 21, "unreadable": 1}
    assert found["protocol"]["view"]["global_scale"] == list(config.views.global_scale)
    few, lidar_of, *_ = found["notes"]
    assert few.startswith("RankMe of 20 images, fewer than 10 * 96 directions")
    assert re.match(r"LiDAR of [78] images is [67] at most: take more than 96", lidar_of)
    assert found["files"] == ["rank.png", "rank.npz"]
    with np.load(tmp_path / "out/rank.npz") as arrays:
        assert np.allclose(arrays["spectrum"], spectrum(x).numpy(), atol=1e-6)
    assert Image.open(tmp_path / "out/rank.png").size == (600, 400)


def test_images_are_drawn_with_the_seed(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 20)
    flags = ("--images", "12", "--views", "0", "--baselines", "no", "--seed")
    draws = [evaluate(data, tmp_path, *flags, seed) for seed in ("0", "0", "1")]
    assert [draw["data"]["images"] for draw in draws] == [12] * 3
    first, again, other = (draw["scores"]["rankme"]["value"] for draw in draws)
    assert first == again != other
    assert all("lidar" not in draw["scores"] for draw in draws)


def test_views_are_those_of_training(tmp_path: Path) -> None:
    """Two by two, by their seed and the image's place; neither flipped nor cropped where training does not."""
    source = FolderSource(photos(tmp_path / "data", 3))
    config = ViewsConfig(global_size=32, local_size=16)
    some = Views(source, [0, 2], 4, config, seed=5)
    assert len(some) == 8
    both = replace(config, num_local=0)
    for index, draw, which in ((4, 0, 0), (5, 0, 1), (7, 1, 1)):
        image = source.read(2)[0]
        params = sample_params(5, draw, 2, both, (40, 48))
        assert np.array_equal(some.read(index)[0], apply(image, params, both)["global"][which].permute(1, 2, 0).numpy())
    seen = labelled_batches(some, 32, 8, 0, crop=1.0)
    pixels, _, places = next(seen)
    assert torch.equal(pixels, torch.stack([torch.from_numpy(some.read(i)[0]).permute(2, 0, 1) for i in range(8)]))
    assert places.tolist() == [*range(8)]
    stamps = {Views(source, places, count, views, seed).stamp() for places, count, views, seed in (
        ([0, 2], 4, config, 5), ([0, 1], 4, config, 5), ([0, 2], 2, config, 5), ([0, 2], 4, config, 6),
        ([0, 2], 4, replace(config, blur=(0.0, 0.0, 0.0)), 5),
    )}  # fmt: skip
    assert len(stamps) == 5, "none is taken for another's features"


class Alike(nn.Module):
    """The same of every image."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 6), 0.1) * torch.arange(1, 7)


def test_a_collapsed_backbone_has_rank_one(tmp_path: Path) -> None:
    """Which is a finding: there is no slope and no interval to it, and the JSON says null."""
    data, config = photos(tmp_path / "data", 12), recipes.get("small")
    rank = Rank(data=str(data), cache=False, num_workers=0, views=2)
    result = rank(Subject(Alike(), config, tmp_path))
    found = result.write(tmp_path / "out")
    assert (found["scores"]["rankme"]["value"], found["scores"]["lidar"]["value"]) == (1.0, 1.0)
    assert found["scores"]["alpha_req"]["value"] is None
    assert "all images have the same features: they are alike, or the backbone has collapsed" in found["notes"]


def test_what_is_refused(tmp_path: Path) -> None:
    for flag in ("images", "view_images", "views"):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}=1"):
            Rank(**{flag: 1})  # type: ignore[arg-type]
    subject = Subject(Alike(), recipes.get("small"), tmp_path)
    with pytest.raises(EvaluationError, match="holds one image"):
        Rank(data=str(photos(tmp_path / "one", 1))).open(subject)

    class NaN(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 6), float("nan"))

    rank = Rank(data=str(photos(tmp_path / "two", 2)), cache=False, num_workers=0)
    with pytest.raises(EvaluationError, match="not finite"):
        rank(replace(subject, backbone=NaN()))


def test_the_interval_holds_the_truth() -> None:
    """Of 200 draws of 100 numbers, the mean is in the interval of about 95 %."""
    draws = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)).double()
    intervals = [jackknife(lambda some, x=x: float(x[some].mean()), 100) for x in draws]
    inside = sum(score.low < 0 < score.high for score in intervals)
    assert 180 < inside < 198
    spread = torch.tensor([score.high - score.low for score in intervals]).mean()
    assert spread == pytest.approx(2 * 2.262 / 10, rel=0.1)
    assert math.isnan(jackknife(lambda some: float(len(some)), 9).low)


def test_of_a_split_it_takes_the_images_to_learn_from(tmp_path: Path) -> None:
    """All of them as the other kinds read them, so that their features are there already."""
    for split, count in (("train", 3), ("val", 2)):
        photos(tmp_path / "a", count).rename(tmp_path / split)
    subject = Subject(Alike(), recipes.get("small"), tmp_path)
    sample = Rank(data=str(tmp_path)).open(subject)
    assert (len(sample.whole), sample.total) == (3, 3)
    assert sample.whole.stamp() == FolderSource(tmp_path / "train").stamp()
    assert len(Rank(data=str(tmp_path), images=2).open(subject).whole) == 2

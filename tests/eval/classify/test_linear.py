"""The linear evaluation: what is chosen, on what, by which protocol; and heads that others trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.benchmarks.class_folders import Sets, bank_and_test
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.decode import BadImage
from fastdino.data.views import center_view, normalize
from fastdino.data.views.supervised import RandomView
from fastdino.eval import EvaluationError, Subject, intervals
from fastdino.eval.classify import linear as room
from fastdino.eval.classify.heads import RATES, Training
from fastdino.eval.classify.linear import Linear, parts_of, released, told_by
from fastdino.model.block import Shape
from fastdino.model.vit import ViT
from fastdino.model.weights.form import WeightsError
from tests.eval.classify.class_images import CONFIG, SIZE, WIDTH, Poisoned, folders, subject

FEW = (1e-2, 0.1, 1.0)


def evaluation(data: Path, **flags: Any) -> Linear:
    usual: dict[str, Any] = {"rates": FEW, "steps": 30, "num_workers": 0, "baselines": "no", "cache": False}
    return Linear(data=str(data), **usual | flags)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("images"))


def test_the_whole_evaluation(data: Path, tmp_path: Path) -> None:
    """The chosen head, the best on the test images beside it, baselines, calibration, pictures."""
    linear = evaluation(data, baselines="yes", cache=True, cache_dir=tmp_path / "cache", rates=RATES, steps=None)
    told = linear(subject(tmp_path)).write(tmp_path)
    scores, also, protocol = told["scores"], told["also"], told["protocol"]
    assert told["headline"] == "accuracy"
    assert scores["published_style"]["value"] >= scores["accuracy"]["value"] > 40
    assert len(also["heads"]) == 52
    assert also["heads"][also["head"]]["test"] == pytest.approx(scores["accuracy"]["value"], abs=1e-3)
    assert also["held_out"] == max(pair["held_out"] for pair in also["heads"].values())
    assert also["heads"][also["best_head_on_test"]]["test"] == pytest.approx(
        scores["published_style"]["value"], abs=1e-3
    )
    assert told["baselines"].keys() == {"pixels", "random_init"}
    assert protocol["rates"] == RATES
    assert (protocol["batch"], protocol["steps"], protocol["tokens"]) == (36, 100, "last4+mean")
    assert protocol["parts"] == ["1 block", "1 block + mean", "4 blocks", "4 blocks + mean"]
    assert also["calibration"].keys() == {"ece", "nll", "brier", "temperature", "scaled"}
    assert {"linear.png", "linear-reliability.png", "linear.npz"} <= {*told["files"]}


def judged(sets: Sets, linear: Linear, of: Subject) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    found = linear.judge(of, sets)
    return {name: score.value for name, score in found.scores.items()}, found.arrays["predictions"], found.also


@pytest.mark.parametrize("flags", [{}, {"balance": "logit-adjust"}, {"views": "live", "steps": 4}], ids=str)
def test_poisoned_test_labels_change_the_score_alone(data: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    linear = evaluation(data, **flags)
    clean = judged(sets, linear, of)
    poisoned = judged(sets._replace(test=Poisoned(sets.test)), linear, of)
    assert np.array_equal(clean[1], poisoned[1])
    for name in ("head", "held_out"):
        assert clean[2][name] == poisoned[2][name]
    assert clean[2]["calibration"]["temperature"] == poisoned[2]["calibration"]["temperature"]
    assert clean[0]["accuracy"] > poisoned[0]["accuracy"]


def test_neither_batches_nor_the_cache_change_it(data: Path, tmp_path: Path) -> None:
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    kept = {"cache": True, "cache_dir": tmp_path / "cache"}
    one, other, again = (judged(sets, evaluation(data, **x), of) for x in ({"batch": 5}, kept, kept))
    assert np.array_equal(one[1], other[1])
    assert one[2]["head"] == other[2]["head"]
    assert other[2] == again[2]


def test_live_views_are_random_views_of_the_bank(data: Path, tmp_path: Path) -> None:
    """Step by step the features of the images in the order of training, without those that cannot be read."""
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    torn = Torn(sets.bank)
    training = Training({"all": slice(0, 5 * WIDTH)}, FEW, batch=20, steps=3, epoch=2, seed=0)
    got = [*evaluation(data, views="live", rates=RATES, steps=None, batch=7)._live(of, torn, training)]
    view, vit = RandomView(SIZE, "wide", 0), of.backbone
    assert len(got) == 3
    for (vectors, labels, places), (epochs, images) in zip(got, training.order(36), strict=True):
        readable = [(e, i) for e, i in zip(epochs.tolist(), images.tolist(), strict=True) if i != 4]
        assert places.tolist() == [i for _, i in readable]
        assert labels.tolist() == [sets.bank.label(i) for _, i in readable]
        pixels = torch.stack([view(sets.bank.read(i)[0], e, i) for e, i in readable])
        with torch.no_grad():
            layers = vit.intermediate_layers(normalize(pixels, "imagenet"), 4)
        want = torch.cat([*(cls for cls, _ in layers), layers[-1][1].mean(1)], dim=1)
        torch.testing.assert_close(vectors, want, rtol=1e-4, atol=1e-5)


class Torn(Subset):
    """Its fifth image cannot be read."""

    def __init__(self, source: Any) -> None:
        super().__init__(source, range(len(source)))

    def read(self, index: int, room: Any = None) -> tuple[np.ndarray, int]:
        if index == 4:
            raise BadImage("four", "torn")
        return super().read(index, room)


def test_published_protocols_are_those_of_the_table() -> None:
    small, base = (ViT(Shape(width, 4, 6, 384), image_size=16, patch_size=8) for width in (384, 768))
    v1, v2 = Linear(published="v1"), Linear(published="v2")
    assert [linear.live for linear in (v1, v2, Linear(), Linear(views="live"))] == [True, True, False, True]
    four, mean = slice(0, 4 * 384), slice(3 * 768, 5 * 768)
    n = 1_281_167
    assert v1.training(small, 5 * 384, n) == ({"4 blocks": four}, (0.001,), 1024, 125_200, 1252, 0, True)
    assert v1.training(base, 5 * 768, n) == ({"1 block + mean": mean}, (0.001,), 1024, 125_200, 1252, 0, True)
    assert v2.training(base, 5 * 768, n) == (parts_of(base, 5 * 768), RATES, 1024, 12_500, 1252, 0, False)
    assert Linear().training(base, 5 * 768, n)[1:] == (RATES, 1024, 12_500, 1252, 0, False)
    assert Linear().training(base, 5 * 768, 500)[1:] == (RATES, 500, 100, 1, 0, False)
    assert v1.training(torch.nn.Identity(), 2048, n).parts == {"features": slice(0, 2048)}


def test_published_runs_choose_on_the_test_images(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = []

    class Noted(RandomView):
        def __init__(self, size: int, kind: Any, seed: int, bilinear: bool = False) -> None:
            views.append((kind, bilinear))
            super().__init__(size, kind, seed, bilinear)

    monkeypatch.setattr(room, "RandomView", Noted)
    monkeypatch.setattr(room, "EPOCHS", 3)
    monkeypatch.setattr(room, "STEPS", 5)
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    for published in ("v1", "v2"):
        scores, _, also = judged(sets, Linear(data=str(data), published=published, num_workers=0, cache=False), of)
        assert scores["accuracy"] == scores["published_style"]
        assert "temperature" not in also["calibration"], "nothing is held out"
        assert also["head"].startswith("4 blocks, rate 0.001, epoch ") == (published == "v1")
    assert views == [("wide", True), ("wide", False)]


def test_which_columns_are_read() -> None:
    """Four CLS tokens, the last one last, and the mean; fewer where there are fewer blocks."""
    parts = parts_of(ViT(Shape(24, 4, 2, 48), image_size=16, patch_size=8), 120)
    assert parts == {
        "1 block": slice(72, 96), "1 block + mean": slice(72, 120), "4 blocks": slice(0, 96),
        "4 blocks + mean": slice(0, 120),
    }  # fmt: skip
    assert parts_of(ViT(Shape(24, 1, 2, 48), image_size=16, patch_size=8), 48) == {
        "1 block": slice(0, 24),
        "1 block + mean": slice(0, 48),
    }
    assert parts_of(torch.nn.Identity(), 7) == {"features": slice(0, 7)}


def head_file(path: Path, width: int, classes: int = 3, prefix: str = "module.linear.") -> tuple[Path, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator)
    state = {prefix + "weight": weight, prefix + "bias": bias}
    torch.save({"epoch": 100, "state_dict": state, "best_acc": 77.0} if prefix else state, path)
    return path, weight, bias


def test_a_released_head_judges_in_one_pass(data: Path, tmp_path: Path) -> None:
    """Four blocks of ViT-S, as DINO v1 has them: no training, no baselines, only the test images are read."""
    path, weight, bias = head_file(tmp_path / "dino_deitsmall16_linearweights.pth", 4 * WIDTH)
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    result = Linear(data=str(data), head=path, num_workers=0, baselines="yes", cache_dir=tmp_path / "cache")(of)
    found = result.found
    pixels = torch.stack([center_view(sets.test.read(i)[0], SIZE, 1.0) for i in range(18)])
    with torch.no_grad():
        layers = of.backbone.intermediate_layers(normalize(pixels, "imagenet"), 4)
    logits = torch.cat([cls for cls, _ in layers], dim=1) @ weight.T + bias
    assert found.arrays["predictions"].tolist() == logits.argmax(1).tolist()
    assert result.baselines == {}
    assert len([*(tmp_path / "cache").glob("??/*")]) == 1
    assert "published_style" not in found.scores
    assert found.protocol["head"] == "dino_deitsmall16_linearweights.pth"
    assert found.data["imbalance"] == 1.0


def test_the_order_of_cls_and_mean_in_released_heads(tmp_path: Path) -> None:
    """DINO v1 stacks CLS and mean in a last axis before it flattens, so their numbers alternate; DINOv2 does not."""
    vit, features = subject(tmp_path).backbone, torch.randn(5, 5 * WIDTH)
    cls, mean = features[:, 3 * WIDTH : 4 * WIDTH], features[:, 4 * WIDTH :]
    path, weight, bias = head_file(tmp_path / "v1.pth", 2 * WIDTH)
    v1 = torch.stack([cls, mean], dim=-1).flatten(1) @ weight.T + bias
    torch.testing.assert_close(told_by(released(path, vit), features), v1)
    path, weight, bias = head_file(tmp_path / "v2.pth", 2 * WIDTH, prefix="")
    torch.testing.assert_close(told_by(released(path, vit), features), torch.cat([cls, mean], 1) @ weight.T + bias)
    path, weight, bias = head_file(tmp_path / "v2_4.pth", 5 * WIDTH, prefix="")
    torch.testing.assert_close(told_by(released(path, vit), features), features @ weight.T + bias)


def test_heads_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    of = subject(tmp_path)
    for width, classes, error, says in (
        (4 * WIDTH, 1000, ConfigError, r"tells 1000 classes, and .* has 3"),
        (50, 3, EvaluationError, r"reads 50 numbers of an image; this backbone has 96 \(1 block\), 192"),
    ):
        path, *_ = head_file(tmp_path / "head.pth", width, classes)
        with pytest.raises(error, match=says):
            Linear(data=str(data), head=path).open(of)
    torch.save({"blocks.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=r"no linear classifier: .* found blocks\.0\.weight"):
        released(tmp_path / "other.pth", of.backbone)
    with pytest.raises(WeightsError, match="no such file"):
        released(tmp_path / "none.pth", of.backbone)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rates": ()}, "--rates"),
        ({"rates": (0.1, -1.0)}, "--rates"),
        ({"steps": 0}, "--steps"),
        ({"published": "v2", "views": "live"}, "leave out --views"),
        ({"published": "v1", "balance": "weights"}, "leave out --balance"),
        ({"head": Path("x"), "published": "v1"}, "leave out --published"),
        ({"head": Path("x"), "balance": "weights"}, "leave out --balance"),
        ({"head": Path("x"), "balance": "logit-adjust", "steps": 3}, "leave out --steps"),
    ],
    ids=str,
)
def test_flags_that_cannot_work(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Linear(**flags)
    assert Linear(head=Path("x"), balance="logit-adjust")


def test_remedies_for_imbalance(tmp_path: Path) -> None:
    """Of 40, 12 and 3 images, both help the mean recall."""
    data = folders(tmp_path / "long", train=(40, 12, 3), test=12, noise=200)
    sets, of = bank_and_test(str(data), CONFIG.data), subject(tmp_path)
    found = {x: judged(sets, evaluation(data, balance=x), of)[0] for x in ("none", "weights", "logit-adjust")}
    balanced = {name: scores["balanced_accuracy"] for name, scores in found.items()}
    assert balanced["weights"] > balanced["none"]
    assert balanced["logit-adjust"] > balanced["none"]

"""Segmentation: mIoU, neighbours, clusters, the linear head on answers worked out by hand; the whole evaluation."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdino.cli import main
from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.benchmarks.masks import VOID, MaskedSets
from fastdino.eval import Segment, Subject
from fastdino.eval.dense.pictures.sheets import class_colours
from fastdino.eval.dense.segment import linear
from fastdino.eval.dense.segment.clusters import fit_clusters, match, nearest_center
from fastdino.eval.dense.segment.in_context import Examples, class_shares, collect, in_context
from fastdino.eval.dense.segment.linear import Head, Recipe, fit_head, pixel_loss
from fastdino.eval.dense.segment.miou import add_up, confusion, overlaps
from fastdino.eval.dense.segment.segment import Told, count, tell_images
from fastdino.eval.features import EvaluationError
from fastdino.eval.result import read_shares
from fastdino.model import build_backbone

SMALL = Config(
    model=ModelConfig(arch="vit_nano", patch_size=4, drop_path=0.0),
    views=ViewsConfig(global_size=12, local_size=8),
    data=DataConfig(image_size=16),
)

# -------------------------------------------------------------------------------------------------------------- mIoU


def test_confusion_and_miou_by_hand() -> None:
    """Of the four pixels one is VOID. Class 0: one of two found, none too many. Class 1: found, and one too many."""
    truth, told = torch.tensor([[0, 0], [1, VOID]], dtype=torch.uint8), torch.tensor([[0, 1], [1, 0]])
    found = confusion(truth, told, 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    both, union = overlaps(found)
    assert (both.tolist(), union.tolist()) == ([1, 1, 0], [2, 2, 0])
    assert add_up([("a", found)])[1].value() == 50


def miou(*images: Tensor) -> float:
    return add_up([(str(i), x) for i, x in enumerate(images)])[1].value() / 100


def test_mean_iou_by_hand() -> None:
    """Of class 0 three of 4 found and one too many, of class 1 two of 3 and one too many; there is no class 2. It is
    that of all pixels, whatever image they are of."""
    truth, told = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 0])
    found = confusion(truth, told, 3)
    assert miou(found) == pytest.approx((3 / 5 + 2 / 4) / 2)
    parts = [confusion(truth[part], told[part], 3) for part in (slice(2), slice(2, 7))]
    assert miou(*parts) == pytest.approx((3 / 5 + 2 / 4) / 2)
    found[1, 2] = 1  # what is told of a class that does not occur is wrong twice
    assert miou(found) == pytest.approx((3 / 5 + 2 / 5 + 0) / 3)


# --------------------------------------------------------------------------------------------------------- in context


def test_shares_of_classes_in_a_patch() -> None:
    """2 x 3 patches of 2 pixels; VOID pixels are not counted."""
    mask = torch.tensor(
        [[0, 0, 1, 1, VOID, VOID], [0, 2, 1, VOID, VOID, VOID], [0, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2]],
        dtype=torch.uint8,
    )
    found = class_shares(torch.stack([mask, torch.zeros_like(mask)]), 2, 3)
    assert found.shape == (2, 2, 3, 3)
    assert found[0, 0].tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0]]
    assert found[0, 1].tolist() == [[0.25, 0.5, 0.25], [0, 0, 1], [0, 0, 1]]
    assert found[1].tolist() == [[[1, 0, 0]] * 3] * 2


def test_neighbours_by_hand() -> None:
    """cos 1, .8 and 0 to three examples: at temperature .2 two neighbours weigh e^5 : e^4."""
    examples = Examples(torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]]), torch.eye(3))
    found = in_context(torch.tensor([[[5.0, 0]]]), examples, neighbours=2, temperature=0.2)
    e = np.exp(1)
    np.testing.assert_allclose(found, [[[e / (1 + e), 1 / (1 + e), 0]]], rtol=1e-5)
    every = in_context(torch.tensor([5.0, 0])[None], examples, neighbours=30, temperature=0.2)
    assert every.sum().item() == pytest.approx(1), "no more neighbours than examples"


def test_neighbours_do_not_depend_on_how_many_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    examples = Examples(
        F.normalize(torch.randn(40, 6, generator=draws), dim=-1), torch.rand(40, 3, generator=draws).softmax(-1)
    )
    queries = torch.randn(5, 4, 6, generator=draws)
    whole = in_context(queries, examples)
    assert whole.shape == (5, 4, 3)
    monkeypatch.setattr("fastdino.eval.dense.segment.in_context._AT_ONCE", 300)
    torch.testing.assert_close(in_context(queries, examples), whole)


class Painted:
    """Images of 3 x 3 patches of 4 pixels, each of the gray level of its class: who sees gray knows all."""

    def __init__(self, count: int, seed: int = 0, void: bool = False) -> None:
        draws = np.random.default_rng(seed)
        self.truth = draws.integers(0, 3, (count, 3, 3)).astype(np.uint8)
        self.void, self.classes = void, ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.truth)

    def read(self, index: int, room: Any = None) -> tuple[np.ndarray, int]:
        gray = self.truth[index].repeat(4, 0).repeat(4, 1)
        return np.repeat(gray[..., None], 3, axis=2), -1

    def mask(self, index: int) -> np.ndarray:
        mask = self.truth[index].repeat(4, 0).repeat(4, 1)
        if self.void:
            mask[:, :4] = VOID
        return mask

    def name(self, index: int) -> str:
        return f"painted {index}"

    def fingerprint(self) -> str:
        return "painted"


def one_hot(images: Tensor) -> Tensor:
    """(B, 3, 12, 12) -> (B, 3, 3, 3)."""
    return F.one_hot(images[:, 0, ::4, ::4].long(), 3).float()


@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("most", [7, 30, 10_000])
def test_examples_are_capped_and_drawn_from_every_image(most: int, batch: int) -> None:
    """They do not depend on the batch, and patches that are VOID are none of them."""
    source = Painted(10, void=True)
    found = collect(one_hot, source, 12, 4, batch=batch, most=most)
    assert len(found.tokens) == {7: 7, 30: 30, 10_000: 60}[most]
    assert (found.classes.sum(-1) - 1).abs().max() < 1e-6
    assert torch.equal(found.tokens, collect(one_hot, source, 12, 4, batch=3, most=most).tokens)
    if most == 30:
        assert not torch.equal(found.tokens, collect(one_hot, source, 12, 4, batch=batch, most=most, seed=1).tokens)


# ---------------------------------------------------------------------------------------------------------- clusters


def test_clusters_are_named_by_hand() -> None:
    """Clusters 0 and 1 both have most pixels of class 0: one to one, the other takes what is left; or both take it."""
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    classes = F.one_hot(torch.tensor([0, 0, 0, 0, 0, 1, 2]), 3).float()
    assert match(clusters, classes, 3).tolist() == [0, 1, 2]
    assert match(clusters, classes[:, [1, 0, 2]], 3).tolist() == [1, 0, 2]
    assert match(clusters, classes, 4)[:3].tolist() == [0, 0, 2]


def test_the_nearest_center_is_that_by_distance() -> None:
    """Not by the product alone, which longer centers win."""
    centers = torch.tensor([[1.0, 0], [0.3, 0.3]])
    assert nearest_center(torch.tensor([[0.9, 0.1], [0.6, 0.5]]), centers).tolist() == [0, 1]


@pytest.mark.parametrize("num_clusters", [3, 6])
def test_far_clusters_tell_all(num_clusters: int) -> None:
    draws = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 3
    tokens = F.normalize(torch.eye(3)[[2, 0, 1]][classes] + 0.05 * torch.randn(60, 3, generator=draws), dim=-1)
    tell = fit_clusters(Examples(tokens, F.one_hot(classes, 3).float()), num_clusters)
    assert torch.equal(tell(9 * tokens.view(3, 4, 5, 3)).argmax(-1).flatten(), classes)
    with pytest.raises(EvaluationError, match=r"--clusters=61 of 60 patches"):
        fit_clusters(Examples(tokens, F.one_hot(classes, 3).float()), 61)


# ------------------------------------------------------------------------------------------------------- linear head


def test_loss_by_hand() -> None:
    """Two patches side by side, as many pixels as patches: log(1 + e^-1) each; VOID has none."""
    scores = torch.tensor([[[[1.0, 0], [0, 1.0]]]])
    loss = float(np.log(1 + np.exp(-1)))
    assert pixel_loss(scores, torch.tensor([[[0, 1]]], dtype=torch.uint8)).item() == pytest.approx(loss)
    assert pixel_loss(scores, torch.tensor([[[1, VOID]]], dtype=torch.uint8)).item() == pytest.approx(1 + loss)
    assert pixel_loss(scores, torch.full((1, 1, 2), VOID, dtype=torch.uint8)).item() == 0


def test_the_head_is_batch_norm_and_a_linear_layer() -> None:
    head, tokens = Head(4, 3), torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 7 + 3
    flat = tokens.view(-1, 4)
    normed = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(head(tokens).view(-1, 3), normed @ head.linear.weight.T)


@pytest.mark.parametrize("kept", [True, False])
def test_the_head_learns_what_patches_tell(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from memory as from images that are read again, but for the rounding of tokens."""
    if not kept:
        monkeypatch.setattr(linear, "KEPT_BYTES", 0)
    source, test = Painted(20, void=True), Painted(5, seed=1)
    head = fit_head(one_hot, source, 12, Recipe(60, lr=0.1, batch=8))
    assert not head.training
    pixels = torch.stack([torch.from_numpy(test.read(i)[0]) for i in range(5)]).permute(0, 3, 1, 2)
    told = head(one_hot(pixels)).argmax(-1)
    assert np.array_equal(told, test.truth)


# --------------------------------------------------------------------------------------------------------- the whole


class Halves(Painted):
    """Images whose left and right are of one class each, so that no pixel lies between three patches."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__(count, seed)
        sides = np.random.default_rng(seed).integers(0, 3, (count, 1, 2)).astype(np.uint8)
        self.truth = np.repeat(sides[:, :, [0, 0, 1]], 3, axis=1)


def test_patches_that_tell_all_score_100_and_each_pixel_is_told() -> None:
    source = Halves(9)
    examples = collect(one_hot, Halves(9, seed=1), 12, 4, batch=4, most=1000)
    told = list(tell_images(one_hot, lambda x: in_context(x, examples), source, 12, 4))
    assert [image.place for image in told] == [*range(9)]
    for image in told:
        assert np.array_equal(image.told, source.mask(image.place))
    matrix, shares = count(iter(told), source)
    assert (shares.value(), matrix.sum().item()) == (100, 9 * 144)


def test_what_each_image_adds_is_the_miou_of_one_confusion_matrix() -> None:
    """Of images of several sizes, one of which is VOID all over and adds nothing."""
    draws = np.random.default_rng(0)
    told = []
    for i, (height, width) in enumerate([(3, 4), (5, 2), (2, 2), (7, 7)]):
        truth, guess = draws.integers(0, 4, (2, height, width)).astype(np.uint8)
        truth[truth == 3] = VOID
        told.append(Told(i, torch.zeros(0), np.full_like(truth, VOID) if i == 2 else truth, guess % 3))
    source = Painted(4)
    matrix, shares = count(iter(told), source)
    assert shares.items == ["painted 0", "painted 1", "painted 3"]
    assert matrix.sum() == 12 + 10 + 49 - sum((x.truth == VOID).sum() for x in told if x.place != 2)
    every = [(image.truth.ravel(), image.told.ravel()) for image in told]
    truth, guess = (np.concatenate(x) for x in zip(*every, strict=True))
    iou = [
        ((truth == c) & (guess == c)).sum() / ((truth == c) | ((guess == c) & (truth != VOID))).sum() for c in range(3)
    ]
    assert shares.value() == pytest.approx(100 * np.mean(iou))
    both, union = overlaps(matrix)
    assert (both / union).tolist() == pytest.approx(iou)
    with pytest.raises(EvaluationError, match="of no class at all"):
        count(iter(told[2:3]), source)


def folder_of_masks(root: Path, num_images: int = 10) -> None:
    """Photographs of no size in common; what is bright is of class 1, and a border of none."""
    for i in range(num_images):
        size = (40 + i, 30 - i)
        pixels = np.full((size[1], size[0], 3), 20, np.uint8)
        pixels[5:, : 12 + i] = 220
        mask = np.where(pixels[..., 0] > 100, 1, 0).astype(np.uint8)
        mask[:, 0] = VOID
        for folder, picture, ending in (("images", pixels, "jpg"), ("masks", mask, "png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / folder / f"{i}.{ending}")


@pytest.mark.parametrize(
    ("flags", "made_by"),
    [
        ([], {"method": "in-context", "patches": 1152, "neighbours": 30, "temperature": 0.02}),
        (["--method", "linear", "--steps", "30"],
         {"method": "linear", "steps": 30, "lr": 0.001, "weight_decay": 0.0001, "batch": 16}),
        (["--method", "cluster"], {"method": "cluster", "patches": 1152, "clusters": 2, "match": "hungarian"}),
        (["--method", "cluster", "--clusters", "5"],
         {"method": "cluster", "patches": 1152, "clusters": 5, "match": "many to one"}),
    ],
)  # fmt: skip
def test_the_command_on_a_folder(
    tmp_path: Path, flags: list[str], made_by: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each method, on ten photographs: what is written says how it was made, and holds what a comparison needs."""
    folder_of_masks(tmp_path / "data")
    out = ["--out", str(tmp_path / "out")]
    main(["eval", "segment", "random:demo", "--data", str(tmp_path / "data"), *out, "--baselines", "no", *flags])
    told = json.loads(capsys.readouterr().out)
    protocol = {"size": 72, "normalize": "image", "precision": "fp32"}
    assert told["protocol"] == protocol | made_by
    data = told["data"]
    assert (data["train"], data["test"], data["classes"]) == (8, 2, 2)
    assert data["rule"] == "every 5th image is judged by the others"
    score = told["scores"]["miou"]
    assert score["low"] <= score["value"] <= score["high"]
    assert told["also"]["iou"].keys() == {"0", "1"}
    assert np.mean([*told["also"]["iou"].values()]) == pytest.approx(score["value"], abs=1e-3)
    assert score["value"] > 60, "bright and dark are told without training"
    assert told["files"] == ["segment.png", "segment.npz"]
    shares = read_shares(tmp_path / "out/segment.json")
    assert shares.items == ["images/0.jpg", "images/5.jpg"]
    assert shares.value() == pytest.approx(score["value"], abs=1e-3)


def test_the_command_on_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the random start beside it; a size that patches do not tile is rounded, and the truth of the images that
    are judged is not seen by what is learned."""
    arguments = ["eval", "segment", "random:demo", "--num-images", "24", "--size", "47", "--out", str(tmp_path / "out")]
    main([*arguments, "--seed", "3"])
    told = json.loads(capsys.readouterr().out)
    assert (told["data"]["train"], told["data"]["test"], told["data"]["classes"]) == (24, 24, 13)
    assert told["protocol"]["size"] == 48
    assert "size 48: 47 does not divide into patches of 6" in told["notes"]
    assert told["baselines"]["random_init"]["value"] > 3
    with Image.open(tmp_path / "out/segment.png") as sheet:
        assert sheet.height > 2 * sheet.width, "eight rows of three, and a legend"


def test_poisoned_truth_changes_nothing_but_the_score() -> None:
    """Whatever the masks of the images that are judged say, the same is told of each pixel."""
    subject = Subject(build_backbone(ModelConfig(arch="vit_nano", patch_size=4), 12), SMALL, Path())
    evaluation = Segment(size=12, baselines="no", steps=5, method="linear")
    told = []
    for shift in (0, 1):
        test = Halves(6, seed=1)
        truth = (test.truth + shift) % 3
        test.mask = lambda index, truth=truth: truth[index].repeat(4, 0).repeat(4, 1)  # type: ignore[method-assign]
        found = evaluation.judge(subject, MaskedSets(Halves(6), test, "by hand"))
        told.append((found.arrays["confusion"].sum(0), found.scores["miou"].value))
    assert np.array_equal(told[0][0], told[1][0]), "as many pixels are told to be of each class"
    assert told[0][1] != told[1][1]


@pytest.mark.parametrize(
    "flags",
    [{"num_images": 0}, {"neighbours": 0}, {"temperature": 0}, {"memory": 0}, {"steps": 0}, {"lr": 0}, {"clusters": 1}],
)
def test_flags_that_cannot_work(flags: dict[str, Any]) -> None:
    (name,) = flags
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}={flags[name]} must be"):
        Segment(**flags)


def test_what_cannot_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_backbone(ModelConfig(arch="vit_nano", patch_size=4), 12)
    subject = Subject(vit, SMALL, tmp_path)
    with pytest.raises(ConfigError, match=r"--clusters=5 must be at least 13: the classes there are"):
        Segment(method="cluster", clusters=5)(subject)
    with pytest.raises(EvaluationError, match=r"eval segment: this needs one of our ViTs .*not Flatten"):
        Segment()(Subject(torch.nn.Flatten(), SMALL, tmp_path))
    folder_of_masks(tmp_path)
    (tmp_path / "images/7.jpg").write_bytes(b"torn")
    with pytest.raises(EvaluationError, match=r"cannot read image images/7\.jpg: .*mend or delete it"):
        Segment(data=str(tmp_path))(subject)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(EvaluationError, match=r"--method cluster needs scikit-learn: pip install 'fastdino\[eval\]'"):
        Segment(method="cluster")(subject)


def test_colours_of_classes_are_far_apart() -> None:
    colours = class_colours(21, first_is_nothing=True).astype(int)
    assert colours.shape == (22, 3)
    assert (colours[0].tolist(), colours[-1].tolist()) == ([0, 0, 0], [255, 255, 255])
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(22, dtype=int)
    assert apart.min() > 30

"""The patch probe against plain formulas, its picture, and the whole evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fastdino.eval.dense.patches as room
from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.benchmarks.class_folders import BANK_SEED, TEST_SEED
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.views import normalize
from fastdino.eval import Reading, Subject
from fastdino.eval.controls import fresh
from fastdino.eval.dense.patches import (
    NUM_CLASSES,
    RIDGE,
    Patches,
    PatchProbe,
    Probe,
    fit_probe,
    raw_pixels,
    render,
)
from fastdino.eval.dense.tokens import tokens_of
from fastdino.model import ViT

CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0),
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(image_size=44, normalize="image"),
)
READING = Reading(size=32, normalize="image")


def vit(seed: int = 0, **options: Any) -> ViT:
    return ViT("nano", patch_size=8, image_size=32, seed=seed, **options)


# ------------------------------------------------------------------------------------------------------------ probe


def clouds(count: int, width: int = 5, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens around a point for each class, of which class 0 has most and class 2 none; one feature is constant."""
    rng = torch.Generator().manual_seed(count)
    classes = torch.tensor([0, 0, 0, 1, 3]).repeat(count)[:count]
    points = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(9))
    tokens = 3 * points[classes] + torch.randn(count, width, generator=rng) + 2
    tokens[:, 3] *= 100
    tokens[:, 4] = 7
    return tokens.double(), classes


def plain_ridge(tokens: Tensor, classes: Tensor, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as least squares over all rows: standardised features, a row for each penalty, weights as factors."""
    x, y = tokens.numpy(), np.eye(num_classes)[classes]
    share = 1 / y.sum(0).clip(1)[classes] / (y.sum(0) > 0).sum()
    mean = (share[:, None] * x).sum(0)
    deviation = np.sqrt((share[:, None] * (x - mean) ** 2).sum(0))
    deviation[deviation < 1e-6] = 1
    root = np.sqrt(share)[:, None]
    left = np.hstack([root * (x - mean) / deviation, root])
    penalty = np.hstack([np.sqrt(RIDGE) * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))])
    right = np.vstack([root * y, np.zeros((x.shape[1], num_classes))])
    found = np.linalg.lstsq(np.vstack([left, penalty]), right, rcond=None)[0]
    weight = found[:-1] / deviation[:, None]
    return weight, found[-1] - mean @ weight


@pytest.mark.parametrize("step", [7, 1000])
def test_the_probe_is_ridge_regression_in_which_classes_weigh_alike(step):
    tokens, classes = clouds(500)
    probe = fit_probe(zip(tokens.split(step), classes.split(step), strict=True), classes.bincount(minlength=4))
    weight, bias = plain_ridge(tokens, classes, 4)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-9)
    np.testing.assert_allclose(probe.bias, bias, atol=1e-9)
    scores = tokens.numpy() @ weight + bias
    assert probe(tokens).tolist() == scores.argmax(1).tolist()
    assert probe(tokens[:6].view(2, 3, -1).float()).shape == (2, 3)


def test_a_rare_class_is_told():
    """3 of 100 patches, not far from the rest: without weights they would all be taken for the background."""
    tokens, classes = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(1000).long()
    classes[:30] = 1
    tokens[:30] += 2.5
    probe = fit_probe(iter([(tokens, classes)]), classes.bincount())
    assert (probe(tokens)[:30] == 1).float().mean() > 0.8
    assert (probe(tokens)[30:] == 0).float().mean() > 0.8


# ----------------------------------------------------------------------------------------------------------- patches


def test_a_patch_is_what_most_of_its_pixels_are():
    found, source = render(36, 32, 8, seed=5), ShapesSource(36, 32, seed=5)
    assert found.images.shape == (36, 3, 32, 32)
    assert found.classes.shape == (36, 4, 4)
    for index in range(36):
        image, label = source.read(index)
        assert np.array_equal(found.images[index].permute(1, 2, 0), image)
        mask = source.mask(index)
        for row in range(4):
            for column in range(4):
                covered = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].sum()
                assert found.classes[index, row, column] == (1 + label if covered > 32 else 0)
    assert set(found.classes.unique().tolist()) == {*range(13)}


def test_raw_pixels_lie_where_their_patch_lies():
    images = render(3, 24, 8, seed=5).images
    found = raw_pixels(8, Reading(size=24, normalize="image"))(images)
    assert found.shape == (3, 3, 3, 192)
    whole = normalize(images, "image")
    for row in range(3):
        for column in range(3):
            patch = whole[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(found[:, row, column], patch.flatten(1))


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_are_those_of_the_patches(registers):
    """On images of another size than the backbone's, a patch that differs differs most where it lies."""
    backbone = vit(registers=registers)
    images = torch.full((1, 3, 40, 40), 90, dtype=torch.uint8)
    images[..., 20, 20] = 100
    other = images.clone()
    other[..., 8:16, 24:32] = 200
    read = tokens_of(backbone, Reading(size=40))
    change = (read(images) - read(other)).norm(dim=-1)[0]
    assert change.shape == (5, 5)
    assert divmod(int(change.argmax()), 5) == (1, 3)
    assert backbone.training, "as it was"


def painted(num_images: int, seed: int) -> Patches:
    """Patches of 4 pixels that have the gray level of their class."""
    classes = torch.randint(0, NUM_CLASSES, (num_images, 3, 3), generator=torch.Generator().manual_seed(seed))
    gray = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Patches(gray.unsqueeze(1).expand(-1, 3, -1, -1).to(torch.uint8), classes)


@pytest.mark.parametrize("batch", [7, 64])
def test_tokens_that_tell_all_score_1_and_tokens_that_tell_nothing_a_prior(batch):
    train, test = painted(40, 0), painted(20, 1)
    evaluation = PatchProbe(batch=batch)

    def knows(images: Tensor) -> Tensor:
        return F.one_hot(images[:, 0, ::4, ::4].long(), NUM_CLASSES).float()

    shares, told = evaluation.probe(knows, train, test)
    assert shares.value() == 100
    assert torch.equal(told, test.classes)
    shares, told = evaluation.probe(lambda images: torch.zeros(len(images), 3, 3, 2), train, test)
    assert len(told.unique()) == 1, "classes weigh alike, so any one"
    assert 0 < shares.value() < 200 / NUM_CLASSES**2


# --------------------------------------------------------------------------------------------------- random features


def test_random_features_are_of_the_same_architecture_and_grid():
    trained = vit(5, registers=3, layer_scale=0.1, mask_token=True)
    model = ModelConfig(
        arch="vit_nano", patch_size=8, drop_path=0.3, registers=3, layer_scale=0.1, attention="xformers"
    )  # which a machine that evaluates may lack
    state = torch.get_rng_state()
    one, same, other = (fresh(trained, model, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    wanted = {name: x.shape for name, x in trained.named_parameters()}
    assert {name: x.shape for name, x in one.named_parameters()} == wanted
    assert one.grid == trained.grid
    weights = [x.patch_embed.proj.weight for x in (one, same, other, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    images = render(2, 32, 8, seed=5).images
    read = tokens_of(one, READING)
    assert torch.equal(read(images), read(images)), "no drop path"


# --------------------------------------------------------------------------------------------------------- the whole


def test_the_evaluation(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(room, "render", lambda *args: (seeds.append(args[-1]), render(*args))[1])
    evaluation = PatchProbe(num_images=48, num_random=2)
    told = evaluation(Subject(vit(1), CONFIG, tmp_path)).write(tmp_path / "out")
    scores = {name: score["value"] for name, score in told["scores"].items()}
    assert scores.keys() == {"patch_miou", "patch_miou_random_init", "patch_miou_raw_pixels"}
    assert told["protocol"] == {"size": 40, "normalize": "image", "precision": "fp32"}
    assert told["data"] == {"root": "shapes", "classes": 13, "train": 48, "test": 24}
    assert seeds == [BANK_SEED, TEST_SEED]
    assert all(0 < score < 100 for score in scores.values())
    again = values(evaluation, vit(2), tmp_path)
    assert again["patch_miou"] != scores["patch_miou"]
    assert again["patch_miou_random_init"] == pytest.approx(scores["patch_miou_random_init"], abs=1e-3)
    assert again["patch_miou_raw_pixels"] == pytest.approx(scores["patch_miou_raw_pixels"], abs=1e-3)
    alone = values(PatchProbe(num_images=48, num_random=0), vit(1), tmp_path)
    assert alone["patch_miou"] == pytest.approx(scores["patch_miou"], abs=1e-3)
    assert "patch_miou_random_init" not in alone
    with Image.open(tmp_path / "out/patches.png") as sheet:
        assert sheet.height > 1.8 * sheet.width, "eight rows of four"


def values(evaluation, backbone, folder):
    return {name: score.value for name, score in evaluation(Subject(backbone, CONFIG, folder)).found.scores.items()}


def test_random_features_are_averaged(tmp_path):
    alone = PatchProbe(num_images=48, num_random=0)
    each = [values(alone, fresh(vit(), CONFIG.model, 32, seed), tmp_path)["patch_miou"] for seed in range(2)]
    found = values(PatchProbe(num_images=48, num_random=2), vit(), tmp_path)["patch_miou_random_init"]
    assert found == pytest.approx(np.mean(each))
    assert each[0] != each[1]


def test_images_that_are_judged_are_no_images_of_training():
    trained = ShapesSource(24, 32)
    seen = {trained.read(index)[0].tobytes() for index in range(24)}
    for seed in (BANK_SEED, TEST_SEED):
        images = {image.permute(1, 2, 0).numpy().tobytes() for image in render(24, 32, 8, seed).images}
        assert not images & seen
        seen |= images
    assert len(seen) == 72


@pytest.mark.parametrize(("image_size", "patch", "size"), [(48, 6, 48), (256, 16, 256), (256, 14, 252), (8, 16, 16)])
def test_the_size_is_that_of_training_images_in_whole_patches(image_size, patch, size):
    config = Config(
        model=ModelConfig(patch_size=patch), views=ViewsConfig(global_size=6 * patch, num_local=0),
        data=DataConfig(image_size=image_size),
    )  # fmt: skip
    assert PatchProbe().reading(config) == Reading(size=size)
    assert PatchProbe(size=3 * patch, precision="bf16").reading(config) == Reading(size=3 * patch, precision="bf16")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"data": "/images"}, "--data='/images' must be shapes: of a folder"),
        ({"num_images": 23}, "--num-images=23 must be at least 24"),
        ({"num_random": -1}, "--num-random=-1 must be 0 or more"),
        ({"batch": 0}, "--batch"),
        ({"size": 0}, "--size"),
    ],
)
def test_flags_that_cannot_work(flags, says):
    with pytest.raises(ConfigError, match=says):
        PatchProbe(**flags)


def test_what_cannot_be_evaluated_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"eval patches: this needs one of our ViTs .*not Flatten"):
        PatchProbe()(Subject(nn.Flatten(), CONFIG, tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_size_that_patches_do_not_tile_is_rounded(tmp_path):
    told = PatchProbe(num_images=24, num_random=0, size=33)(Subject(vit(), CONFIG, tmp_path)).json()
    assert told["protocol"]["size"] == 32
    assert "size 32: 33 does not divide into patches of 8" in told["notes"]


def test_a_probe_without_a_class_scores_the_others():
    """A class that occurs in no training image is never told."""
    tokens, classes = clouds(200)
    probe = fit_probe(iter([(tokens, classes)]), classes.bincount(minlength=4))
    assert isinstance(probe, Probe)
    assert not (probe(tokens) == 2).any()

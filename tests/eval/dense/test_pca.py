"""Principal components as colours: on tokens whose components are known, and the whole evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.cli import main
from fastdino.config import Config, ConfigError
from fastdino.eval import Pca, Similarity, Subject
from fastdino.eval.dense.pictures.pca import colors, components, fit_palette, foreground
from fastdino.eval.features import EvaluationError


@pytest.mark.parametrize("seed", range(4))
def test_colors_are_the_principal_components(seed):
    """Of tokens that vary along three known directions, the most along the first."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 4, 5, 3, generator=rng).double() * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(7, 3, generator=rng, dtype=torch.float64))[0].T
    found = colors(values @ basis + 5)
    assert found.shape == (2, 4, 5, 3)
    assert found.min() == 0
    assert found.max() == 1
    for component in range(3):
        pair = torch.stack([found[..., component].flatten(), values[..., component].flatten()])
        largest = basis[component][basis[component].abs().argmax()]
        assert torch.corrcoef(pair)[0, 1] * largest.sign() > 0.85
    torch.testing.assert_close(colors(3 * (values @ basis) - 8), found)


def test_colors_of_equal_tokens():
    assert colors(torch.ones(1, 2, 2, 5)).isfinite().all()


@pytest.mark.parametrize("step", [7, 1000])
def test_components_of_parts_are_those_of_the_whole(step: int) -> None:
    """Against torch's own decomposition, of tokens whose mean is far from 0; as many as it takes are held."""
    tokens = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1.0, 9) + 1e4
    found = components(tokens.split(step))
    _, deviation, directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    torch.testing.assert_close(found.mean, tokens.mean(0))
    torch.testing.assert_close(found.directions.abs(), directions[:3].T.abs(), rtol=0, atol=1e-8)
    assert found.explained == pytest.approx((deviation[:3].square().sum() / deviation.square().sum()).item())
    assert (found.directions.amax(0) >= found.directions.abs().amax(0)).all(), "the largest weight is positive"
    torch.testing.assert_close(found(tokens), (tokens - tokens.mean(0)) @ found.directions)


def test_there_are_no_components_of_nothing() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        components([torch.zeros(0, 4)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_what_the_borders_are_not(sign: float) -> None:
    """An object in the middle of each image, whichever way its feature points."""
    tokens = torch.zeros(2, 4, 5, 6)
    tokens[:, 1:3, 1:4, 2] = sign
    tokens[..., 3:] = 0.01 * torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    turned = foreground(components([tokens.flatten(0, 2)]), lambda: [tokens[:1], tokens[1:]])
    assert torch.equal(turned(tokens)[..., 0] > 0, tokens[..., 2] != 0)


def test_a_palette_of_the_foreground_by_hand() -> None:
    """An object in the middle, of three features of its own: the background is black, and the object's components are
    those of its patches alone."""
    draws = torch.Generator().manual_seed(0)
    tokens = torch.zeros(3, 6, 6, 8).double()
    tokens[:, 2:5, 1:5, 0] = 20
    inside = tokens[..., 0] > 0
    own = torch.rand(int(inside.sum()), 3, generator=draws).double() * torch.tensor([4.0, 2.0, 1.0])
    tokens[inside] += torch.nn.functional.pad(own, (2, 3))
    tokens[~inside] += 0.1 * torch.randn(int((~inside).sum()), 8, generator=draws).double()
    found = fit_palette(lambda: tokens.split(2), 108, only_foreground=True)
    assert torch.equal(found.inside(tokens), inside)
    colour = found(tokens)
    assert (colour[~inside] == 0).all()
    assert found.components.explained == pytest.approx(1)
    for component in range(3):
        assert torch.corrcoef(torch.stack([colour[inside][:, component], own[:, component]]))[0, 1].abs() > 0.8
    plain = fit_palette(lambda: tokens.split(2), 108, only_foreground=False)
    torch.testing.assert_close(plain(tokens), colors(tokens))


def test_of_many_patches_some_tell_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(40, 5, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    every = fit_palette(lambda: tokens.split(7), 1000, only_foreground=False)
    monkeypatch.setattr("fastdino.eval.dense.pictures.pca._SAMPLE", 300)
    some = fit_palette(lambda: tokens.split(7), 1000, only_foreground=False)
    torch.testing.assert_close(some.components.directions, every.components.directions)
    assert 0 < (some.low - every.low).abs().max() < 1


@pytest.mark.parametrize("flags", [[], ["--foreground", "--smooth"]])
def test_the_command(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of images of several shapes, more than the sheet shows, read in several batches."""
    draws = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(11):
        pixels = draws.integers(0, 60, (30, 20 + 4 * i, 3)).astype(np.uint8)
        pixels[10:20, 5:15] = 200
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    main(["eval", "pca", "random:demo", *places, "--batch", "4", *flags])
    told = json.loads(capsys.readouterr().out)
    assert (told["scores"], told["baselines"], told["files"]) == ({}, {}, ["pca.png"])
    assert told["protocol"] == {"size": 72, "normalize": "image", "precision": "fp32", "foreground": bool(flags)}
    assert told["data"]["images"] == 11
    assert 0 < told["also"]["explained"] < 1
    with Image.open(tmp_path / "out/pca.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=-1) > 60).mean() > 0.01, "colours"
    assert ((pixels == 0).all(-1).mean() > 0.1) == bool(flags), "a background is black"


def test_one_image_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    main(["eval", "pca", "random:demo", "--data", str(tmp_path / "a.png"), "--size", "50", "--out", str(tmp_path)])
    told = json.loads(capsys.readouterr().out)
    assert (told["data"]["images"], told["protocol"]["size"]) == (1, 48)
    assert told["notes"] == ["size 48: 50 does not divide into patches of 6"]
    main(["eval", "pca", "random:demo", "--data", str(tmp_path / "a.png"), "--crop-ratio", "1", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "--crop-ratio has no effect: the whole of an image is shown"
    ]


def test_what_has_no_picture(tmp_path: Path) -> None:
    subject = Subject(torch.nn.Flatten(), Config(), tmp_path)
    for kind in (Pca, Similarity):
        with pytest.raises(EvaluationError, match=r"needs one of our ViTs .*not Flatten"):
            kind()(subject)
        with pytest.raises(ConfigError, match="--num-images=0 must be at least 1"):
            kind(num_images=0)

"""Cosine maps: exact on one-hot patches, the place under a point, and the whole evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastdino.eval.dense.pictures.similarity as room
from fastdino.cli import main
from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.eval import Similarity, Subject
from fastdino.eval.dense.pictures.similarity import cosine_maps, patch_under
from fastdino.model import build_backbone

CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=4, drop_path=0.0),
    views=ViewsConfig(global_size=12, local_size=8),
    data=DataConfig(image_size=16, normalize="image"),
)


def test_one_hot_patches_give_exact_maps() -> None:
    kinds = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[1, 1, 1], [0, 0, 2]]])
    found = cosine_maps(7 * F.one_hot(kinds, 4), torch.tensor([0, 3, 0, 0]))
    assert torch.equal(found, (kinds == 1).float())
    opposite = cosine_maps(torch.tensor([[[[3.0, 4]]]]), torch.tensor([-6.0, -8]))
    assert opposite.item() == pytest.approx(-1)
    assert cosine_maps(torch.tensor([[[[3.0, 4]]]]), torch.tensor([1.0, 0])).item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("point", "place"),
    [((0, 0), (0, 0)), ((0.99, 0), (0, 3)), ((1, 1), (1, 3)), ((0.25, 0.5), (1, 1)), ((0.24, 0.49), (0, 0))],
)
def test_the_patch_under_a_point(point: tuple[float, float], place: tuple[int, int]) -> None:
    """Of 2 rows and 4 columns."""
    assert patch_under(point, (2, 4)) == place


def colours(root: Path) -> None:
    """Images 40 wide and 20 high: in image i, column i of four is red and the others are of a gray of their own."""
    root.mkdir()
    for i in range(4):
        pixels = np.full((20, 40, 3), 40 * i, np.uint8)
        pixels[:, 10 * i : 10 * i + 10] = (200, 0, 0)
        Image.fromarray(pixels).save(root / f"{i}.png")


def sees_red(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 16, 16) -> (B, 4, 4, 2): whether the middle of a patch is red."""
    return F.one_hot((images[:, 0, 1::4, 1::4].int() - images[:, 1, 1::4, 1::4].int() > 100).long(), 2)


@pytest.mark.parametrize("point", [(0.6, 0.5), (25, 10)])
def test_what_is_like_the_point_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: tuple[float, float]
) -> None:
    """In shares and in pixels, of a named image; the others in the order of what is most alike in them."""
    colours(tmp_path / "data")
    Image.new("RGB", (30, 30), "gray").save(tmp_path / "data/a.png")
    monkeypatch.setattr(room, "tokens_of", lambda _vit, _reading: sees_red)
    evaluation = Similarity(data=str(tmp_path / "data"), query="2.png", point=point, size=16, batch=2)
    subject = Subject(build_backbone(CONFIG.model, 12), CONFIG, tmp_path)
    told = evaluation(subject).write(tmp_path / "out")
    assert told["also"]["query"] == "2.png"
    assert told["also"]["alike"] == [
        {"image": "0.png", "cosine": 1.0, "point": [0.125, 0.125]},
        {"image": "1.png", "cosine": 1.0, "point": [0.375, 0.125]},
        {"image": "3.png", "cosine": 1.0, "point": [0.875, 0.125]},
        {"image": "a.png", "cosine": 0.0, "point": [0.125, 0.125]},
    ]
    with Image.open(tmp_path / "out/similarity.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert (pixels == (255, 0, 0)).all(-1).sum() > 20, "a red dot"


def test_of_many_images_the_most_alike_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")

    def slant(images: torch.Tensor) -> torch.Tensor:
        turn = images[:, 0, ::4, ::4].float() / 255
        return torch.stack([turn.cos(), turn.sin()], dim=-1)

    monkeypatch.setattr(room, "tokens_of", lambda _vit, _reading: slant)
    subject = Subject(build_backbone(CONFIG.model, 12), CONFIG, tmp_path)
    evaluation = Similarity(data=str(tmp_path), query="29.png", size=8, batch=7)
    found = evaluation(subject).found
    assert [row["image"] for row in found.also["alike"]] == [f"{i}.png" for i in range(28, 21, -1)]
    assert found.data["images"] == 30
    drawn = Similarity(data=str(tmp_path), query="29.png", size=8, num_images=10)(subject).found
    assert 10 <= drawn.data["images"] <= 11


def test_the_command_on_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--point", "0.4", "0.6", "--num-images", "12", "--out", str(tmp_path / "out")]
    main(["eval", "similarity", "random:demo", *arguments, "--smooth"])
    told = json.loads(capsys.readouterr().out)
    assert (told["scores"], told["baselines"], told["files"]) == ({}, {}, ["similarity.png"])
    assert told["protocol"]["size"] == 72
    assert len(told["also"]["alike"]) == 7
    cosines = [row["cosine"] for row in told["also"]["alike"]]
    assert cosines == sorted(cosines, reverse=True)


def test_places_that_are_refused(tmp_path: Path) -> None:
    colours(tmp_path / "data")
    (tmp_path / "data/torn.png").write_bytes(b"torn")
    subject = Subject(build_backbone(CONFIG.model, 12), CONFIG, tmp_path)
    data = str(tmp_path / "data")
    for flags, says in (
        ({"point": (40.0, 10.0)}, r"--point=40 10 lies outside of 0\.png, 40 x 20 pixels"),
        ({"point": (0.5, 20.0)}, "--point=0.5 20 lies outside"),
        ({"query": "9.png"}, r"--query='9\.png' is none of the 5 images, such as 0\.png, 1\.png"),
        ({"query": "torn.png"}, r"cannot read image torn\.png: .*name another one with --query"),
        ({}, r"cannot read image torn\.png: .*mend or delete it"),
    ):
        with pytest.raises(ValueError, match=says):
            Similarity(data=data, **flags)(subject)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--point=\(-1, 0\) must be at least 0"):
        Similarity(point=(-1, 0))

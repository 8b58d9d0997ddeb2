"""Object discovery: whole commands on shapes, VOC and masks, boxes in place, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.config import ConfigError, UserError
from fastdino.data.benchmarks.masks import VOID
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.views import normalize
from fastdino.eval.evaluation import Subject
from fastdino.eval.objects.boxes import box_around
from fastdino.eval.objects.discover import Discover
from fastdino.eval.result import read_shares
from fastdino.model import ViT
from fastdino.recipes import get

CONFIG = get("demo")  # patches of 6 pixels
METHODS = ("tokencut", "lost", "attention")


def subject(tmp_path: Path) -> Subject:
    vit = ViT("nano", patch_size=6, image_size=36, seed=3).eval()
    return Subject(vit, CONFIG, tmp_path)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["eval", "discover", "random:demo", *arguments])
    return json.loads(capsys.readouterr().out)


def write_images(root: Path, count: int = 4) -> None:
    """Shapes of 40 x 52 pixels, no multiple of a patch, with their masks, and with the masks' boxes as VOC has them."""
    for folder in ("images", "masks", "VOC/JPEGImages", "VOC/Annotations"):
        (root / folder).mkdir(parents=True)
    source = ShapesSource(count, 52, seed=1)
    for index in range(count):
        image, mask = source.read(index)[0][:40], source.mask(index)[:40]
        name = f"{index}.png"
        Image.fromarray(image).save(root / "images" / name)
        Image.fromarray(image).save(root / "VOC/JPEGImages" / name)
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / name)
        left, top, right, bottom = box_around(mask).tolist()
        sides = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        text = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
        (root / f"VOC/Annotations/{index}.xml").write_text(
            f"<annotation><object><bndbox>{text}</bndbox></object></annotation>"
        )


def test_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: each method's CorLoc and saliency, a random start beside it, per-image results, a picture."""
    told = run("--num-images", "60", "--out", str(tmp_path), capsys=capsys)
    names = [f"{name}_{x}" for name in ("iou", "accuracy", "f") for x in METHODS]
    assert set(told["scores"]) == {f"corloc_{x}" for x in METHODS} | set(names)
    assert told["headline"] == "corloc_tokencut"
    for score in [*told["scores"].values(), *told["baselines"].values()]:
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100
    assert list(told["baselines"]) == ["random_init"]
    assert told["data"]["images"] == 60
    assert told["protocol"]["tokencut"] == {"tau": 0.2}
    assert told["protocol"]["attention"] == {"head": 3, "mass": 0.6}  # the last of 4, for there is no fifth
    assert (tmp_path / "discover.png").stat().st_size > 20_000
    with np.load(tmp_path / "discover.npz") as arrays:
        assert arrays["boxes_lost"].shape == (60, 4)
        shares = 100 * arrays["hits"].mean(axis=0)
    values = [told["scores"][f"corloc_{x}"]["value"] for x in METHODS]
    assert shares == pytest.approx(values, abs=1e-3)
    assert read_shares(tmp_path / "discover.json").value() == pytest.approx(values[0], abs=1e-3)


def test_boxes_and_masks_of_the_same_objects_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path)
    flags = ("--baselines", "no", "--methods", "lost", "tokencut", "--out", str(tmp_path / "out"))
    of_masks = run("--data", str(tmp_path), *flags, capsys=capsys)
    of_boxes = run("--data", str(tmp_path / "VOC"), *flags, capsys=capsys)
    assert list(of_boxes["scores"]) == ["corloc_lost", "corloc_tokencut"]
    assert of_boxes["scores"].items() <= of_masks["scores"].items()
    assert "iou_lost" in of_masks["scores"]
    assert of_boxes["data"]["name"] == "VOC, every annotation"


def test_published_scores_are_known_by_the_data(tmp_path: Path) -> None:
    """The name of VOC's list is that of the rows, whichever of its folders --data names."""
    write_images(tmp_path)
    (tmp_path / "VOC/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "VOC/ImageSets/Main/trainval.txt").write_text("0\n1\n")
    (tmp_path / "VOC").rename(tmp_path / "VOC2007")
    for place in (tmp_path, tmp_path / "VOC2007"):
        for method, file, score in (
            ("lost", "dino_deitsmall16_pretrain.pth", 61.9),
            ("tokencut", "vit_small_patch8_224.dino.safetensors", 67.3),
            ("tokencut", "dino-vitb16", 68.8),
        ):
            told = dataclasses.replace(subject(tmp_path), told={"path": file})
            result = Discover(data=str(place), methods=(method,), baselines="no")(told)
            assert result.published is not None
            assert result.published.score == score


def test_the_object_is_found_in_place(tmp_path: Path) -> None:
    """A red part low on the right of an image that is no multiple of the patch, at its size and enlarged."""
    image = np.full((50, 70, 3), (40, 90, 120), np.uint8)
    image[30:48, 42:66] = 230, 60, 40
    told = subject(tmp_path)
    for size in (None, 100):
        evaluation = Discover(methods=METHODS, size=size)
        found = evaluation.find(told.backbone, evaluation.reading(CONFIG), image)
        for method in ("tokencut", "lost"):
            box, mask = found[method]
            assert np.abs(box - (42, 30, 66, 48)).max() <= 6, (method, size, box)  # a patch
            assert mask.shape == (50, 70)
            assert np.abs(box - box_around(mask)).max() <= 1


def test_what_is_seen(tmp_path: Path) -> None:
    """The image, with nothing to its right and below up to whole patches; --size is of the shorter side."""
    told = subject(tmp_path)
    seen: list[torch.Tensor] = []
    told.backbone.patch_embed.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    for size in (None, 30):
        evaluation = Discover(size=size, methods=("lost",))
        evaluation.find(told.backbone, evaluation.reading(CONFIG), image)
    whole, resized = seen
    assert (whole.shape, resized.shape) == ((1, 3, 54, 72), (1, 3, 30, 42))
    torch.testing.assert_close(whole[0, :, :50, :70], normalize(torch.tensor(image).permute(2, 0, 1), "image"))
    assert not whole[..., 50:, :].any()
    assert not whole[..., 70:].any()


def test_images_without_objects_are_left_out(tmp_path: Path) -> None:
    """And pixels that are not known count neither way: with all that are wrong among them, nothing is."""
    write_images(tmp_path, 2)
    Image.fromarray(np.zeros((40, 52), np.uint8)).save(tmp_path / "masks/0.png")
    mask = np.asarray(Image.open(tmp_path / "masks/1.png"))
    told, evaluation = subject(tmp_path), Discover(data=str(tmp_path), methods=("lost",))
    data = evaluation.open(told)
    found = evaluation.judge(told, data)
    assert (found.data["images"], found.data["without_objects"]) == (1, 1)
    assert found.scores["iou_lost"].value < 90
    box = data.boxes(1)
    wrong = evaluation.find(told.backbone, evaluation.reading(CONFIG), data.read(1))["lost"][1] != mask
    assert (wrong & (mask > 0)).any()
    assert (wrong & (mask == 0)).any()
    Image.fromarray(np.where(wrong, VOID, mask).astype(np.uint8)).save(tmp_path / "masks/1.png")
    assert len(data.boxes(1)) == len(box) == 1
    again = evaluation.judge(told, data)
    assert [again.scores[f"{name}_lost"].value for name in ("iou", "accuracy", "f")] == [100, 100, 100]


def test_half_precision(tmp_path: Path) -> None:
    """Finds about the same."""
    told, image = subject(tmp_path), ShapesSource(1, 52, seed=1).read(0)[0]
    boxes = []
    for precision in ("fp32", "bf16"):
        evaluation = Discover(methods=METHODS, precision=precision)
        boxes.append(evaluation.find(told.backbone, evaluation.reading(CONFIG), image)["lost"][0])
    assert np.abs(boxes[0] - boxes[1]).max() <= 6


def test_fewer_images_are_drawn(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    for place in (tmp_path, tmp_path / "VOC"):
        drawn = [Discover(data=str(place), num_images=3, seed=seed).open(subject(tmp_path)) for seed in (0, 0, 1)]
        names = [[data.name(i) for i in range(len(data))] for data in drawn]
        assert len(names[0]) == 3
        assert names[0] == names[1]


def test_what_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "bare/a.png")
    told, masks = subject(tmp_path), str(tmp_path)
    for flags, says in (
        ({"data": str(tmp_path / "bare")}, "neither boxes nor masks of objects: looked for Annotations"),
        ({"data": masks, "listed": tmp_path / "x.txt"}, "--listed is for VOC and COCO"),
        ({"data": str(tmp_path / "VOC"), "listed": tmp_path / "x.txt"}, "cannot read the list"),
        ({"head": 4}, "--head 4: the backbone has 4, the last is 3"),
    ):
        with pytest.raises(ConfigError, match=says):
            Discover(**flags).open(told)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.zeros((40, 52), np.uint8)).save(path)
    with pytest.raises(ConfigError, match=r"no mask of .* shows an object"):
        Discover(data=masks).open(told)
    (tmp_path / "VOC/JPEGImages/1.png").write_bytes(b"no image")
    evaluation = Discover(data=str(tmp_path / "VOC"))
    with pytest.raises(UserError, match=r"1\.png.*mend or delete it"):
        evaluation(told)
    with pytest.raises(UserError, match="our ViTs"):
        Discover().open(Subject(torch.nn.Linear(2, 2), CONFIG, tmp_path))


def test_masks_that_cannot_be_read(tmp_path: Path) -> None:
    """Their headers are whole, so only what decodes them sees it."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    mask = np.random.default_rng(0).integers(0, 3, (40, 30)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "JPEGImages/a.jpg")
    Image.fromarray(mask).save(tmp_path / "SegmentationObject/a.png")
    png = (tmp_path / "SegmentationObject/a.png").read_bytes()
    (tmp_path / "SegmentationObject/a.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"SegmentationObject/a\.png.*mend or delete it"):
        Discover(data=str(tmp_path)).open(subject(tmp_path))


@pytest.mark.parametrize(
    "flags",
    [{"num_images": 0}, {"tau": 1.0}, {"lowest": 0}, {"head": -1}, {"mass": 0.0}, {"methods": ("lost", "lost")}],
)
def test_flags_that_cannot_work(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(flags)).replace("_", "-")):
        Discover(**flags)

"""Boxes of VOC and COCO: their numbers, which images, and annotations that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.boxes import BoxedFiles, open_boxes

CONFIG = DataConfig()
PART = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
BOX = f"<object><name>cat</name><difficult>1</difficult>{PART}<bndbox>{{}}</bndbox></object>"

ONE = '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": %s}]}'


def xml(*boxes: tuple[float, ...]) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    texts = ["".join(f"<{x}>{value}</{x}>" for x, value in zip(sides, box, strict=False)) for box in boxes]
    return f"<annotation><size><width>40</width></size>{''.join(map(BOX.format, texts))}</annotation>"


def write_voc(root: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    annotations = {"a": [(1, 1, 40, 30)], "b": [(5, 6, 20, 21.7), (2, 2, 3, 3)], "c": [], "d": [(1, 1, 9, 9)]}
    for name, boxes in annotations.items():
        (root / "Annotations" / f"{name}.xml").write_text(xml(*boxes))
        Image.new("RGB", (40, 30), (50, 100, 150)).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Main/trainval.txt").write_text("b\na\nc\n")


def write_coco(root: Path, folder: str = "train2014") -> dict[str, Any]:
    """Image 1 has two objects and a crowd, 2 a crowd alone, 3 nothing, 4 one object."""
    for path in (root / "annotations", root / folder):
        path.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in (4, 1, 2, 3)]
    for image in images:
        Image.new("RGB", (40, 30)).save(root / folder / str(image["file_name"]))
    boxes = [(1, [10.4, 5.6, 20.2, 10], 0), (1, [0, 0, 40, 30], 1), (1, [1, 2, 0.3, 4], 0), (2, [0, 0, 9, 9], 1)]
    boxes.append((4, [3, 4, 5, 6], 0))
    annotations = [{"image_id": image, "bbox": box, "iscrowd": crowd} for image, box, crowd in boxes]
    content = {"images": images, "annotations": annotations}
    (root / "annotations/instances_train2014.json").write_text(json.dumps(content))
    return content


def opened(root: Path, listed: Path | None = None) -> BoxedFiles:
    found = open_boxes(str(root), CONFIG, listed)
    assert found is not None
    return found


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2007"])
def test_voc(below: str, tmp_path: Path) -> None:
    """A box over all of 40 x 30 pixels is (1, 1, 40, 30) there and (0, 0, 40, 30) here; parts of objects are none."""
    write_voc(tmp_path / below)
    found = opened(tmp_path)
    assert [found.name(i) for i in range(len(found))] == ["a.jpg", "b.jpg"]
    assert found.boxes(0).tolist() == [[0, 0, 40, 30]]
    assert found.boxes(1).tolist() == [[4, 5, 20, 21.7], [1, 1, 3, 3]]
    assert found.read(0).shape == (30, 40, 3)
    assert found.rule.endswith("trainval.txt")
    assert found.bare == 1


def test_voc_without_a_list_and_with_another(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "mine.txt").write_text("JPEGImages/d.png\n\na 1\n")
    assert [opened(tmp_path, tmp_path / "mine.txt").name(i) for i in range(2)] == ["a.jpg", "d.jpg"]
    (tmp_path / "ImageSets/Main/trainval.txt").unlink()
    (tmp_path / "JPEGImages/d.jpg").rename(tmp_path / "JPEGImages/d.png")
    found = opened(tmp_path)
    assert [found.name(i) for i in range(len(found))] == ["a.jpg", "b.jpg", "d.png"]
    assert found.read(2).shape == (30, 40, 3)


@pytest.mark.parametrize("folder", ["train2014", "images/train2014", "images", "."])
def test_coco(folder: str, tmp_path: Path) -> None:
    """Corners are rounded, so an object may lose its area. Crowds are no objects."""
    write_coco(tmp_path, folder)
    for root in (tmp_path, tmp_path / "annotations/instances_train2014.json"):
        found = opened(root)
        assert [found.name(i) for i in range(len(found))] == ["COCO_4.jpg", "COCO_1.jpg"]
        assert found.boxes(1).tolist() == [[10, 6, 31, 16], [1, 2, 1, 6]]
        assert found.read(0).shape == (30, 40, 3)
    (tmp_path / "list.txt").write_text("COCO_1.jpg")
    assert [item.name for item in opened(tmp_path, tmp_path / "list.txt").items] == ["COCO_1.jpg"]


def test_other_folders_have_no_boxes(tmp_path: Path) -> None:
    assert open_boxes(str(tmp_path), CONFIG) is None
    (tmp_path / "annotations/training").mkdir(parents=True)  # as in ADE20K
    assert open_boxes(str(tmp_path), CONFIG) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "Annotations/a.xml").unlink(), r"1 of 3 images have no annotation in .*, such as a"),
        (lambda root: (root / "JPEGImages/b.jpg").unlink(), r"1 of 2 images with boxes are not there.*b\.jpg"),
        (lambda root: (root / "Annotations/a.xml").write_text("<annotation>"), r"cannot read the boxes of .*a\.xml"),
        (lambda root: (root / "Annotations/a.xml").write_text(xml((1, 1, 40))), r"cannot read the boxes of .*a\.xml"),
        (lambda root: (root / "Annotations/a.xml").write_text(xml((9, 9, 3, 30))), r"a\.xml has no area"),
        (lambda root: (root / "Annotations/a.xml").write_text(xml((1, 1, float("nan"), 3))), r"a\.xml has no area"),
        (lambda root: (root / "ImageSets/Main/trainval.txt").write_text("c"), "no image of .* has a box"),
        (lambda root: (root / "ImageSets/Main/trainval.txt").write_text("\n"), "is empty"),
    ],
)
def test_annotations_of_voc_that_cannot_be_used(change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text(xml((1, 1, 40, 30)))
    change(tmp_path)
    with pytest.raises(ConfigError, match=says):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no instances file of COCO"),
        ("[]", "is no instances file of COCO"),
        ('{"images": []}', "no 'annotations'"),
        ('{"images": [], "annotations": []}', "no image of .* has a box"),
        ('{"images": [], "annotations": [{"image_id": 7, "bbox": [1, 2, 3, 4]}]}', "no 7"),
        (ONE % "[1, 2]", "is no instances file of COCO"),
        (ONE % "[1, 2, 3, null]", "is no instances file of COCO"),
        (ONE % "[1, 2, 3, 4]", "1 of 1 images with boxes are not there"),
    ],
)
def test_instances_of_coco_that_cannot_be_used(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        opened(tmp_path)


def test_which_instances(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations/instances_val2014.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"instances_train2014\.json, instances_val2014\.json: give one"):
        opened(tmp_path)
    (tmp_path / "list.txt").write_text("COCO_1.jpg\nCOCO_9.jpg")
    with pytest.raises(ConfigError, match=r"1 of 2 images have no annotation in .*COCO_9"):
        opened(tmp_path / "annotations/instances_train2014.json", tmp_path / "list.txt")

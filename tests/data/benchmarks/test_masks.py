"""Images with masks: every layout on disk, what their values mean, and what is refused."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.class_folders import BANK_SEED, TEST_SEED
from fastdino.data.benchmarks.masks import VOID, MaskedFiles, images_alone, open_classes, open_objects, read_mask
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.shapes import ShapesSource

DATA = DataConfig(image_size=16)
CORNER = np.array([[0, 0, 0], [0, 1, 2]], np.uint8)  # (2, 3), so that sides cannot be mistaken


def image(path: Path, red: int = 7, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)


def mask(path: Path, values: Any = CORNER, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        picture.putpalette([*range(255, -1, -1)] * 3)  # colours that are no indices
    picture.save(path)


def names(source: Any) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_places_are_drawn_once_each_and_the_same_again() -> None:
    drawn = sample(0, 10, 1000)
    assert drawn == sample(0, 10, 1000) == sorted({*drawn})
    assert len(drawn) == 10
    assert drawn != sample(1, 10, 1000)
    assert drawn[0] > 9 or drawn[-1] > 500, "not the first"
    assert sample(0, 10, 4) == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------------- layouts


def folder_of_masks(root: Path, images: str = "images/{}.jpg", masks: str = "masks/{}.png", count: int = 6) -> None:
    for i in range(count):
        image(root / images.format(f"sub/{i}"), red=40 * i)
        mask(root / masks.format(f"sub/{i}"), np.roll(CORNER, i % 2, axis=1))


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("images/{}.png", "masks/{}_mask.bmp"),
        ("{}.jpg", "{}.png"),
        ("{}.png", "{}_mask.png"),
    ],
)
def test_masks_are_found_by_their_stems(tmp_path: Path, images: str, masks: str) -> None:
    folder_of_masks(tmp_path, images, masks)
    sets = open_classes(str(tmp_path), DATA)
    assert sets.rule == "every 5th image is judged by the others"
    assert names(sets.test) == [images.format(f"sub/{i}") for i in (0, 5)]
    assert names(sets.train) == [images.format(f"sub/{i}") for i in (1, 2, 3, 4)]
    assert sets.train.classes == sets.test.classes == ["0", "1", "2"]
    for source, first in ((sets.test, 0), (sets.train, 1)):
        assert np.array_equal(source.mask(0), np.roll(CORNER, first, axis=1)), "indices of the palette"
        assert abs(int(source.read(0)[0][0, 0, 0]) - 40 * first) < 4
    objects = open_objects(str(tmp_path), DATA, 100)
    assert objects is not None
    assert len(objects) == 6


@pytest.mark.parametrize(
    ("below", "images", "masks"),
    [
        ("{}", "images/a.jpg", "masks/a.png"),
        ("{}", "a.jpg", "a.png"),
        (".", "images/{}/a.jpg", "masks/{}/a.png"),
    ],
)
def test_splits_are_known(tmp_path: Path, below: str, images: str, masks: str) -> None:
    for red, split in ((10, "training"), (200, "val")):
        image(tmp_path / below.format(split) / images.format(split), red)
        mask(tmp_path / below.format(split) / masks.format(split))
    sets = open_classes(str(tmp_path), DATA)
    assert sets.rule == "training/ and val/"
    assert (len(sets.train), len(sets.test)) == (1, 1)
    assert sets.train.read(0)[0][0, 0, 0] < 20
    objects = open_objects(str(tmp_path), DATA, 100)
    for source in (sets.test, objects):
        assert source is not None
        assert source.read(0)[0][0, 0, 0] > 180
        assert np.array_equal(source.mask(0), CORNER)


def voc(root: Path) -> None:
    for i, split in enumerate(("train", "train", "val")):
        image(root / f"JPEGImages/{i}.jpg", size=(4, 2))
        mask(root / f"SegmentationClass/{i}.png", [[0, 15, 15, 255], [0, 15, 20, 255]])
        mask(root / f"SegmentationObject/{i}.png", [[0, 1, 1, 255], [0, 2, 3, 255]])
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        with (lists / f"{split}.txt").open("a") as file:
            file.write(f"{i}\n")


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path: Path, below: str) -> None:
    voc(tmp_path / below)
    image(tmp_path / below / "JPEGImages/unlisted.jpg")
    sets = open_classes(str(tmp_path), DATA)
    assert (len(sets.train), names(sets.test)) == (2, ["JPEGImages/2.jpg"])
    assert (len(sets.test.classes), sets.test.classes[15]) == (21, "person")
    assert np.array_equal(sets.test.mask(0), [[0, 15, 15, VOID], [0, 15, 20, VOID]])
    objects = open_objects(str(tmp_path), DATA, 100)
    assert objects is not None
    assert names(objects) == ["JPEGImages/2.jpg"]
    assert np.array_equal(objects.mask(0), [[0, 1, 1, VOID], [0, 2, 3, VOID]])


def test_what_is_wrong_with_voc(tmp_path: Path) -> None:
    voc(tmp_path)
    mask(tmp_path / "SegmentationClass/2.png", [[0, 15, 15, 30], [0, 15, 20, 255]])
    test = open_classes(str(tmp_path), DATA).test
    with pytest.raises(BadImage, match=r"SegmentationClass/2\.png: it holds the value 30, and classes count to 21"):
        test.mask(0)
    (tmp_path / "SegmentationClass/2.png").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the mask SegmentationClass/2\.png of .*No such file"):
        open_classes(str(tmp_path), DATA)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"val\.txt names no image"):
        open_classes(str(tmp_path), DATA)
    (tmp_path / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(ConfigError, match=r"has the folders of VOC, and its list .*val\.txt cannot be read"):
        open_objects(str(tmp_path), DATA, 5)


@pytest.mark.parametrize("below", [".", "ADEChallengeData2016"])
def test_ade20k(tmp_path: Path, below: str) -> None:
    """0 is of no class, and 1 to 150 are the classes."""
    root = tmp_path / below
    for split in ("training", "validation"):
        image(root / f"images/{split}/ADE_1.jpg")
        mask(root / f"annotations/{split}/ADE_1.png", [[0, 1, 2], [149, 150, 150]], mode="L")
    test = open_classes(str(tmp_path), DATA).test
    assert np.array_equal(test.mask(0), [[VOID, 0, 1], [148, 149, 149]])
    assert (test.classes[0], len(test.classes)) == ("1", 150)
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0\t1\t1\t0\tthing {i}, item" for i in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    assert open_classes(str(tmp_path), DATA).test.classes[149] == "thing 150"
    with pytest.raises(ConfigError, match="ADE20K, whose masks tell what every pixel"):
        open_objects(str(tmp_path), DATA, 5)
    (root / "images/validation/ADE_1.jpg").unlink()
    with pytest.raises(ConfigError, match=r"no \.jpg in images/validation/"):
        open_classes(str(tmp_path), DATA)


def test_images_of_a_folder_with_masks(tmp_path: Path) -> None:
    """For who looks at images alone: the masks are none of them."""
    folder_of_masks(tmp_path / "a")
    folder_of_masks(tmp_path / "b", "{}.png", "{}_mask.png")
    voc(tmp_path / "c")
    image(tmp_path / "d/a.jpg")
    for name, count in (("a", 6), ("b", 6), ("c", 3)):
        found = images_alone(tmp_path / name, DATA)
        assert found is not None
        assert len(found) == count
        assert not [x for x in names(found) if "mask" in x or "Segm" in x]
    assert images_alone(tmp_path / "d", DATA) is None
    assert images_alone(tmp_path / "nowhere", DATA) is None


def test_shapes() -> None:
    sets = open_classes("shapes", DATA, 30)
    for source, seed in ((sets.train, BANK_SEED), (sets.test, TEST_SEED)):
        shapes = ShapesSource(30, 16, seed)
        assert (len(source), len(source.classes)) == (30, 13)
        for index in (0, 17):
            assert np.array_equal(source.mask(index) > 0, shapes.mask(index))
            assert set(np.unique(source.mask(index))) == {0, 1 + index % 12}
            assert np.array_equal(source.read(index)[0], shapes.read(index)[0])
    assert source.classes[1 + 17 % 12] == shapes.labels[17 % 12]
    objects = open_objects("shapes", DATA, 7)
    assert objects is not None
    assert len(objects) == 7


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_masks_of_any_mode(tmp_path: Path, mode: str) -> None:
    """A palette's index; else the value, where the channels agree. Alpha says nothing."""
    picture = Image.fromarray(np.array([[0, 255, 255]], np.uint8))
    picture = picture.convert("P") if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.png")
    found = read_mask(tmp_path / "a.png", "a")
    assert found.dtype == np.uint8
    assert found.astype(bool).tolist() == [[False, True, True]]
    assert found.max() == (1 if mode == "1" else 255)


def test_a_mask_of_0_and_255_shows_an_object_and_beside_others_255_is_void(tmp_path: Path) -> None:
    for i in range(2):
        image(tmp_path / f"images/{i}.jpg")
        mask(tmp_path / f"masks/{i}.png", [[0, 0, 0], [0, 255, 255]], mode="L")
    sets, objects = open_classes(str(tmp_path), DATA), open_objects(str(tmp_path), DATA, 9)
    assert objects is not None
    assert sets.test.classes == ["0", "255"]
    for source in (sets.train, sets.test, objects):
        assert np.array_equal(source.mask(0), [[0, 0, 0], [0, 1, 1]])
    for i in range(2):
        mask(tmp_path / f"masks/{i}.png", [[0, 9, 0], [0, 255, 255]], mode="L")
    sets, objects = open_classes(str(tmp_path), DATA), open_objects(str(tmp_path), DATA, 9)
    assert objects is not None
    assert sets.test.classes == ["0", "9"]
    assert np.array_equal(sets.test.mask(0), [[0, 1, 0], [0, VOID, VOID]]), "classes in the order of their values"
    assert np.array_equal(objects.mask(0), [[0, 9, 0], [0, VOID, VOID]])


def test_so_many_are_drawn(tmp_path: Path) -> None:
    folder_of_masks(tmp_path, count=30)
    sets, objects = open_classes(str(tmp_path), DATA, 3), open_objects(str(tmp_path), DATA, 4)
    assert objects is not None
    assert (len(sets.train), len(sets.test), len(objects)) == (3, 3, 4)
    assert names(objects) != [f"images/sub/{i}.jpg" for i in ("0", "1", "10", "11")], "not the first"
    other = open_objects(str(tmp_path), DATA, 4, seed=1)
    assert names(open_objects(str(tmp_path), DATA, 4)) == names(objects) != names(other)
    assert isinstance(objects, MaskedFiles)
    assert objects.fingerprint() != sets.test.fingerprint()


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_folder_without_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Objects are asked for where there may be none; classes are not."""
    image(tmp_path / "cat/a.png")
    image(tmp_path / "cat/b.png")
    assert open_objects(str(tmp_path), DATA, 5) is None
    assert open_objects(str(tmp_path / "nowhere"), DATA, 5) is None
    found = r"Found in it: cat/\. Looked for images/ and masks/ .*JPEGImages/.*annotations/training/.*so no JPEG"
    with pytest.raises(ConfigError, match=found):
        open_classes(str(tmp_path), DATA)
    with pytest.raises(ConfigError, match=r"nowhere.* does not exist"):
        open_classes(str(tmp_path / "nowhere"), DATA)
    mask(tmp_path / "cat/a_mask.png")
    with caplog.at_level(logging.WARNING):
        assert open_objects(str(tmp_path), DATA, 5) is None
    assert "1 of 2 images have a mask beside them: none is judged" in caplog.text
    with pytest.raises(ConfigError, match=r"1 of 2 images have no mask: cat/b\.png$"):
        open_classes(str(tmp_path), DATA)


def test_an_image_without_a_mask_is_named(tmp_path: Path) -> None:
    folder_of_masks(tmp_path)
    for i in (2, 4):
        (tmp_path / f"masks/sub/{i}.png").unlink()
    image(tmp_path / "masks/sub/2.jpg")  # whose values are no longer what they were
    for opening in (open_classes, open_objects):
        with pytest.raises(ConfigError, match=r"2 of 6 images have no mask: images/sub/2\.jpg, images/sub/4\.jpg"):
            opening(str(tmp_path), DATA, 100)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: mask(p, np.zeros((2, 4))), r"images/a\.jpg is 3 x 2 and the mask 4 x 2 pixels \(masks/a\.png\)"),
        (lambda p: p.write_bytes(b"no mask"), r"cannot read image masks/a\.png: UnidentifiedImageError"),
        (lambda p: Image.new("RGB", (3, 2), (9, 0, 0)).save(p), r"masks/a\.png: a mask in colour"),
        (lambda p: Image.fromarray(np.full((2, 3), 300, np.uint16)).save(p), "not from 0 to 255 .*up to 300"),
        (lambda p: mask(p, np.zeros((2, 3))), "hold the value 0 and no other class"),
    ],
)
def test_masks_that_are_refused(tmp_path: Path, spoil: Any, says: str) -> None:
    for name in ("a", "b"):
        image(tmp_path / f"images/{name}.jpg")
        mask(tmp_path / f"masks/{name}.png", np.zeros((2, 3)))
    spoil(tmp_path / "masks/a.png")
    with pytest.raises(ConfigError, match=says):
        open_classes(str(tmp_path), DATA)
    if "class" not in says:
        with pytest.raises(ConfigError, match=says):
            open_objects(str(tmp_path), DATA, 100)


def test_a_class_that_cannot_be_learned_is_named(tmp_path: Path) -> None:
    folder_of_masks(tmp_path)
    mask(tmp_path / "masks/sub/5.png", [[0, 7, 9], [0, 1, 2]])
    with pytest.raises(ConfigError, match=r"judged hold the classes 7, 9, which none to learn from holds \(every 5th"):
        open_classes(str(tmp_path), DATA)
    mask(tmp_path / "masks/sub/4.png", [[0, 7, 9], [0, 1, 2]])
    assert open_classes(str(tmp_path), DATA).test.classes == ["0", "1", "2", "7", "9"]


def test_one_image_is_too_few(tmp_path: Path) -> None:
    folder_of_masks(tmp_path, count=1)
    with pytest.raises(ConfigError, match="an image to learn from and one to judge"):
        open_classes(str(tmp_path), DATA)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(2):
        stem = os.fsdecode(b"\xff%d" % i)
        image(tmp_path / f"images/{stem}.jpg")
        mask(tmp_path / f"masks/{stem}.png")
    assert open_classes(str(tmp_path), DATA).test.name(0) == r"images/\xff0.jpg"

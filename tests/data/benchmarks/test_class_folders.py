"""Which images vote and which are judged: names of splits, and everything that an evaluation would refuse."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.folder import split_folders

DATA = DataConfig(image_size=32)


def images(*folders: Path, count: int = 3) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i}.png")


def names(source: object) -> list[str]:
    return [source.name(i) for i in range(len(source))]  # type: ignore[attr-defined,arg-type]


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
@pytest.mark.parametrize("judged", ["val", "valid", "validation", "test", "testing", "Val", "TEST"])
def test_a_pair_of_split_folders(tmp_path: Path, train: str, judged: str) -> None:
    images(
        *(tmp_path / train / name for name in ("cat", "dog")), *(tmp_path / judged / name for name in ("cat", "dog"))
    )
    bank, test, rule = bank_and_test(str(tmp_path), DATA)
    assert bank.labels == test.labels == ["cat", "dog"]
    assert rule == f"{train}/ is the bank, {judged}/ is judged"
    assert [bank.label(i) for i in range(len(bank))] == [0, 0, 0, 1, 1, 1]


def test_val_is_judged_before_test_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    images(*(tmp_path / split / name for split in ("train", "val", "test") for name in ("cat", "dog")))
    images(tmp_path / "annotations")
    assert bank_and_test(str(tmp_path), DATA).rule == "train/ is the bank, val/ is judged"


def test_without_a_split_every_fifth_image_is_judged(tmp_path: Path) -> None:
    images(tmp_path / "cat", tmp_path / "trainer", count=10)
    bank, test, rule = bank_and_test(str(tmp_path), DATA)
    assert bank.labels == ["cat", "trainer"]
    assert names(test) == ["cat/0.png", "cat/5.png", "trainer/0.png", "trainer/5.png"]
    assert {*names(bank)} | {*names(test)} == {f"{c}/{i}.png" for c in ("cat", "trainer") for i in range(10)}
    assert rule == "every 5th image is judged by the others"


@pytest.mark.parametrize("folders", [["train"], ["Test"], ["val", "test"], ["train", "cat"], ["train", "bus", "car"]])
def test_a_split_without_its_other_half_is_no_class(tmp_path: Path, folders: list[str]) -> None:
    images(*(tmp_path / folder / name for folder in folders for name in ("cat", "dog")))
    with pytest.raises(ConfigError, match=rf"holds .*{folders[0]}/.*train/ is taken together with val/ or test/"):
        bank_and_test(str(tmp_path), DATA)


def test_splits_below_a_split_are_no_classes(tmp_path: Path) -> None:
    images(*(tmp_path / a / b / "cat" for a in ("train", "val") for b in ("train", "val")))
    with pytest.raises(ConfigError, match=r"holds train, val where folders of classes should be"):
        bank_and_test(str(tmp_path), DATA)


def test_a_class_may_be_called_train_inside_a_split(tmp_path: Path) -> None:
    images(*(tmp_path / split / name for split in ("train", "val") for name in ("bus", "train")))
    assert bank_and_test(str(tmp_path), DATA).bank.labels == ["bus", "train"]


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    images(*(tmp_path / split / "cat" for split in ("train", "val", "validation")))
    with pytest.raises(ConfigError, match="val/ and validation/, two folders of one split"):
        split_folders(tmp_path)


def test_a_file_is_no_split_and_a_missing_folder_has_none(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a list of names")
    assert split_folders(tmp_path) == split_folders(tmp_path / "nowhere") == {}


def test_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images(*(tmp_path / "x" / split / name for split in ("train", "val") for name in ("cat", "dog")))
    assert bank_and_test("~/x", DATA).rule == "train/ is the bank, val/ is judged"


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    images(
        *(tmp_path / "train" / name for name in ("bird", "cat", "dog")), *(tmp_path / "val" / c for c in ("cat", "dog"))
    )
    with pytest.raises(ConfigError, match="of the same classes; one lacks bird"):
        bank_and_test(str(tmp_path), DATA)


@pytest.mark.parametrize("where", ["", "train", "val"])
def test_images_beside_the_class_folders_are_named(tmp_path: Path, where: str) -> None:
    splits = ("train", "val") if where else ("",)
    images(*(tmp_path / split / name for split in splits for name in ("cat", "dog")))
    Image.new("RGB", (8, 8)).save(tmp_path / where / "stray.png")
    with pytest.raises(ConfigError, match=r"in no class folder of .*: stray\.png \(1 in all\)"):
        bank_and_test(str(tmp_path), DATA)


@pytest.mark.parametrize("broken", ["train", "val"])
def test_a_set_of_which_nothing_can_be_read(tmp_path: Path, broken: str) -> None:
    images(*(tmp_path / split / name for split in ("train", "val") for name in ("cat", "dog")))
    files = sorted((tmp_path / broken).rglob("*.png"))
    for file in files[:-1]:
        file.write_bytes(b"no picture")
    bank_and_test(str(tmp_path), DATA)  # one can be read: the others are left out
    files[-1].write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="none of 6 images"):
        bank_and_test(str(tmp_path), DATA)


def test_labels_are_needed(tmp_path: Path) -> None:
    images(tmp_path / "all")
    with pytest.raises(ConfigError, match=r"a folder per class, of two or more, and holds only 'all'$"):
        bank_and_test(str(tmp_path), DATA)
    images(tmp_path / "rare", count=1)  # the images go by name: "all/0", "all/1", "all/2", "rare/0"
    os.remove(tmp_path / "all" / "0.png")
    os.rename(tmp_path / "rare", tmp_path / "a_rare")
    with pytest.raises(ConfigError, match="of one class only"):
        bank_and_test(str(tmp_path), DATA)


def test_shapes() -> None:
    bank, test, _ = bank_and_test("shapes", DATA)
    assert len(bank) == len(test) == 1000
    assert bank.read(14)[1] == bank.label(14) == 2
    assert bank.read(0)[0].tobytes() != test.read(0)[0].tobytes()


def test_images_are_opened_as_in_training(tmp_path: Path) -> None:
    """12-bit data in 16-bit files is read with the bits that the run was told, in either kind of split."""
    pixels = np.full((8, 8), 4000, np.uint16)
    for folder in ("a/cat", "a/dog", *(f"b/{split}/{name}" for split in ("train", "val") for name in ("cat", "dog"))):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    for root in ("a", "b"):
        for source in bank_and_test(str(tmp_path / root), DataConfig(bits=12))[:2]:
            assert source.read(0)[0][0, 0].tolist() == [250, 250, 250]
        with pytest.raises(ConfigError, match="none of"):
            bank_and_test(str(tmp_path / root), DataConfig(max_pixels=10))

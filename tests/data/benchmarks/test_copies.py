"""Copydays as it is laid out, and copies that are made of any images."""

from pathlib import Path

import numpy as np
import pytest

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.copies import ALTERED, AlteredSource, make_copies
from fastdino.data.benchmarks.copydays import open_copydays
from fastdino.data.sources.folder import FolderSource
from fastdino.data.sources.shapes import ShapesSource
from tests.data.benchmarks.layouts import copydays
from tests.data.pictures import photo, write


def test_copydays(tmp_path: Path) -> None:
    found = open_copydays(copydays(tmp_path), DataConfig())
    assert list(found.blocks) == ["strong", "jpegqual/10", "crops/50"]
    assert len(found.originals) == 4
    assert found.original["strong"].tolist() == [0, 0, 1, 2, 3]
    assert found.original["crops/50"].tolist() == [0, 1, 2, 3]
    assert found.blocks["strong"].name(1) == "200002.jpg"


def test_folders_that_are_not_copydays(tmp_path: Path) -> None:
    write(tmp_path / "a" / "cat" / "a.jpg")
    with pytest.raises(ConfigError, match=r"found cat; looked for original/ .*--make-copies"):
        open_copydays(tmp_path / "a", DataConfig())
    with pytest.raises(ConfigError, match=r"found .*No such file"):
        open_copydays(tmp_path / "none", DataConfig())
    root = copydays(tmp_path / "b")
    write(root / "strong" / "999900.jpg")
    with pytest.raises(ConfigError, match=r"strong/999900\.jpg is a copy of no image in original/ \(1 such\)"):
        open_copydays(root, DataConfig())
    write(root / "original" / "200077.jpg")
    with pytest.raises(ConfigError, match=r"200000\.jpg and 200077\.jpg begin with the same 4 characters"):
        open_copydays(root, DataConfig())


def test_copies_are_those_of_the_seed(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / f"{i}.png", photo(60, 40, seed=i // 2))
    source = FolderSource(tmp_path)
    found = make_copies(source)
    assert found.name == "synthetic copies"
    assert list(found.blocks) == [*ALTERED]
    for block, copies in found.blocks.items():
        assert found.original[block].tolist() == list(range(6))
        first = [copies.read(i)[0] for i in range(6)]
        assert all(np.array_equal(x, copies.read(i)[0]) for i, x in enumerate(first))
        assert not any(np.array_equal(x, source.read(i)[0]) for i, x in enumerate(first))
    turned = found.blocks["rotate"]
    assert not np.array_equal(turned.read(0)[0], turned.read(1)[0])  # of equal images
    other = make_copies(source, seed=1).blocks["rotate"]
    assert not np.array_equal(other.read(0)[0], found.blocks["rotate"].read(0)[0])
    assert other.fingerprint() != found.blocks["rotate"].fingerprint()


def test_what_copies_are(tmp_path: Path) -> None:
    write(tmp_path / "a.png", photo(80, 60))
    source = FolderSource(tmp_path)
    image = source.read(0)[0].astype(int)
    copy = {name: AlteredSource(source, name, 0).read(0)[0].astype(int) for name in ALTERED}
    assert np.array_equal(copy["mirror"], image[:, ::-1])
    assert copy["crop 50"].shape == (42, 57, 3)
    assert copy["crop 50"].size / image.size == pytest.approx(0.5, abs=0.01)
    assert copy["resize"].shape == (15, 20, 3)
    assert copy["rotate"].shape[0] > 60
    changed = (copy["text"] != image).any(axis=2).mean(axis=1)  # of each row
    assert (changed > 0.9).sum() in (24, 25, 26)  # two bars of a fifth, and the row at an end of each
    for name, least in (("jpeg 10", 1), ("blur", 1)):
        assert least < np.abs(copy[name] - image).mean() < 20


def test_of_many_images_some_are_copied() -> None:
    source = ShapesSource(300, 8)
    found = make_copies(source)
    places = found.original["blur"]
    assert len(places) == len({*places.tolist()}) == len(found.blocks["blur"]) == 157
    assert len(found.originals) == 300
    assert found.blocks["blur"].name(3) == f"{source.name(int(places[3]))} (blur)"
    assert not np.array_equal(places, make_copies(source, seed=1).original["blur"])
    with pytest.raises(ConfigError, match="2 images or more, and there is 1"):
        make_copies(ShapesSource(1, 8))


def test_copies_of_other_channels(tmp_path: Path) -> None:
    write(tmp_path / "a.png", photo(40, 30).convert("L"))
    gray = FolderSource(tmp_path, DataConfig(channels=1))
    assert all(AlteredSource(gray, name, 0).read(0)[0].shape[2] == 1 for name in ALTERED)

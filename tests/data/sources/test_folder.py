"""Folders of images as people have them: nested, mixed, linked, damaged."""

import os
import pickle
import time

import numpy as np
import pytest

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource, ShapesSource, open_source
from tests.data.pictures import noise, write


def names(source: FolderSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_class_folders_give_labels(tmp_path):
    for name in ["cat/2.jpg", "cat/deep/er/1.png", "dog/3.webp", "ant/4.bmp", "top.JPEG"]:
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path)
    assert source.labels == ["ant", "cat", "dog"]
    assert names(source) == ["top.JPEG", "ant/4.bmp", "cat/2.jpg", "cat/deep/er/1.png", "dog/3.webp"]
    assert [source.read(i)[1] for i in range(5)] == [-1, 0, 1, 1, 2]
    assert len(source) == 5


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", noise(i))
    source = FolderSource(str(tmp_path))
    assert source.labels == []
    for i in range(3):
        image, label = source.read(i)
        assert label == -1
        assert np.array_equal(image, noise(i)), "an index reads the image of its name"


def test_what_is_not_an_image_is_left_out(tmp_path):
    write(tmp_path / "a.png")
    for name in ["b.txt", "c.npy", "d.pdf", "e.h5", ".hidden.png", "._a.png", "f"]:
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path / ".cache" / "x.png")
    (tmp_path / "folder.png").mkdir()
    assert names(FolderSource(tmp_path)) == ["a.png"]


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path / "elsewhere" / "far.png")
    root = tmp_path / "root"
    write(root / "b" / "near.png")
    (root / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "c.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (root / "b" / "up").symlink_to(root, target_is_directory=True)
    (root / "b" / "self").symlink_to(root / "b", target_is_directory=True)
    (root / "d.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(root)
    assert names(source) == ["c.png", "d.png", "a/far.png", "b/near.png"]
    assert source.labels == ["a", "b"]
    assert source.read(2)[0].size == (16, 16)
    with pytest.raises(BadImage, match=r"d\.png"):
        source.read(1)


def test_names_in_any_encoding(tmp_path):
    write(tmp_path / "plain.png")
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xf0\x9f\x90\xb6.png")
    os.rename(os.fsencode(tmp_path / "plain.png"), raw)
    write(tmp_path / "\u00fcber" / "\u732b.png")
    source = FolderSource(tmp_path)
    assert [source.read(i)[0].size for i in range(2)] == [(16, 16)] * 2
    assert source.name(0) == "caf\\xe9 \U0001f436.png", "printable, whatever the name"
    assert source.labels == ["\u00fcber"]


@pytest.mark.parametrize("make", ["missing", "file", "empty", "text"])
def test_errors_say_what_was_found(tmp_path, make):
    path = tmp_path / "here"
    if make == "file":
        write(tmp_path / "x.png")
        path = tmp_path / "x.png"
    elif make in ("empty", "text"):
        path.mkdir()
        (path / "sub").mkdir()
    if make == "text":
        for name in ["a.npy", "sub/b.npy", "c.tar", "README"]:
            (path / name).write_text("x")
    with pytest.raises(ConfigError) as error:
        FolderSource(path)
    message = str(error.value)
    assert str(path) in message
    expected = {
        "missing": ["does not exist"],
        "file": ["is a file"],
        "empty": ["no images", "no files at all", ".jpg"],
        "text": ["no images", "2 with .npy", "1 with .tar", "1 with no ending", ".png"],
    }
    for part in expected[make]:
        assert part in message


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "ok" / "a.png")
    (tmp_path / "secret").mkdir()
    real = os.scandir

    def scandir(path):
        if path.endswith(b"secret"):  # the tests may run as root, whom no permission stops
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"secret.*Permission denied"):
        FolderSource(tmp_path)


def test_open_source(tmp_path, monkeypatch):
    config = DataConfig(num_images=7, image_size=20)
    shapes = open_source("shapes", config)
    assert isinstance(shapes, ShapesSource)
    assert len(shapes) == 7
    assert shapes.read(0)[0].size == (20, 20)
    with pytest.raises(ConfigError, match=r"--data\.root shapes"):
        open_source("", config)
    write(tmp_path / "shapes" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("./shapes", config), FolderSource)


def test_many_files_are_indexed_fast_and_kept_small(tmp_path):
    for folder in range(20):
        (tmp_path / f"c{folder}").mkdir()
        for i in range(500):
            (tmp_path / f"c{folder}" / f"image_{i:05d}.jpg").touch()
    started = time.process_time()
    source = FolderSource(tmp_path)
    assert time.process_time() - started < 1  # 0.02 s on an idle machine
    assert len(source) == 10000
    assert len(pickle.dumps(source)) < 10000 * 40, "bytes, not a list of strings"
    assert source.name(9999) == "c9/image_00499.jpg"


def test_fingerprint_is_of_names_and_order(tmp_path):
    def source(root: str, *names: str) -> FolderSource:
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return FolderSource(tmp_path / root)

    first = source("a", "x/1.png", "x/2.png").fingerprint()
    assert source("b", "x/1.png", "x/2.png").fingerprint() == first, "wherever it lies"
    for root, names in {"c": ("x/1.png", "x/3.png"), "d": ("y/1.png", "x/2.png"), "e": ("x/1.png", "x2.png")}.items():
        assert source(root, *names).fingerprint() != first
    assert source("f", "ab.png", "c.png").fingerprint() != source("g", "a.png", "bc.png").fingerprint()

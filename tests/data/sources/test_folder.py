"""Folders of images as people have them: nested, mixed, linked, damaged."""

import os
import pickle
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource, ShapesSource, open_source, split_folders
from fastdino.data.sources.composed import Subset
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
    assert source.read(2)[0].shape == (16, 16, 3)
    with pytest.raises(BadImage, match=r"d\.png"):
        source.read(1)


def test_names_in_any_encoding(tmp_path):
    write(tmp_path / "plain.png")
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xf0\x9f\x90\xb6.png")
    os.rename(os.fsencode(tmp_path / "plain.png"), raw)
    write(tmp_path / "\u00fcber" / "\u732b.png")
    source = FolderSource(tmp_path)
    assert [source.read(i)[0].shape for i in range(2)] == [(16, 16, 3)] * 2
    assert source.name(0) == "caf\\xe9 \U0001f436.png", "printable, whatever the name"
    assert source.labels == ["\u00fcber"]


def write_gray(path: Path, highest: int) -> None:
    write(path, Image.fromarray(np.linspace(0, highest, 256).astype(np.uint16).reshape(16, 16)))


@pytest.mark.parametrize(
    ("highest", "bits", "says"), [(4095, 16, "data.bits=12"), (900, 16, "data.bits=10"), (4096, 16, ""), (4095, 12, "")]
)
def test_16_bit_files_that_use_12_bits_are_told(tmp_path, caplog, highest, bits, says):
    for i in range(20):
        write_gray(tmp_path / f"{i}.tiff", highest)
    write(tmp_path / "8-bit.png")
    (tmp_path / "broken.png").write_bytes(b"")
    FolderSource(tmp_path, DataConfig(bits=bits))
    assert len(caplog.records) == bool(says)
    assert says in caplog.text
    if says:
        assert f"no value over {highest} of 65535" in caplog.text


def test_16_bit_colour_that_uses_12_bits_is_told(tmp_path, caplog):
    """Pillow keeps the high byte of each channel, so the remedy is another one."""
    tiff = {256: 4, 257: 4, 258: (16, 16, 16), 259: 1, 262: 2, 273: 8, 277: 3, 278: 4, 279: 96, 284: 1}
    pixels = np.full((4, 4, 3), 4000, "<u2").tobytes()
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3, 230) if tag == 258 else struct.pack("<HHIHH", tag, 3, 1, value, 0)
        for tag, value in tiff.items()
    )
    directory = struct.pack("<H", len(tiff)) + entries + bytes(4)
    body = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory
    (tmp_path / "a.tif").write_bytes(body + struct.pack("<3H", 16, 16, 16).rjust(230 + 6 - len(body), b"\0"))
    assert np.unique(FolderSource(tmp_path).read(0)[0]).tolist() == [15]
    assert "set data.range=0 4095" in caplog.text


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


UNSAID = {"folder": PermissionError(13, "Permission denied"), "stale": OSError(116, "Stale file handle")}


@pytest.mark.parametrize("case", UNSAID)
def test_a_root_that_may_not_be_entered_is_not_said_to_be_missing(tmp_path, monkeypatch, case):
    write(tmp_path / "a.png")

    def stat(*_: object) -> os.stat_result:  # the tests may run as root, whom no permission stops
        raise UNSAID[case]

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(ConfigError, match=UNSAID[case].strerror) as caught:
        FolderSource(tmp_path)
    assert "does not exist" not in str(caught.value)


@pytest.mark.parametrize("path", ["{}/file.png/more", "{}/" + "x" * 300, "{}/nul\0", "{}/circle"])
def test_a_root_of_any_kind_is_one_message(tmp_path, path):
    write(tmp_path / "file.png")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ConfigError, match="give a folder of images"):
        FolderSource(path.format(tmp_path))


def test_a_circle_of_links_is_no_folder(tmp_path):
    write(tmp_path / "a.png")
    for name in ("circle", "b.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "b.png"], "an image by its name is named when it is read"
    with pytest.raises(BadImage, match=r"b\.png: OSError"):
        source.read(1)


@pytest.mark.parametrize("name", ["there", "there.png"])
def test_a_link_that_may_not_be_followed(tmp_path, monkeypatch, name):
    """A folder whose images would be left out is an error; an image is named when it is read."""
    write(tmp_path / "a.png")
    (tmp_path / name).symlink_to("/nowhere")
    real = os.scandir

    class Closed:
        def __init__(self, entry: os.DirEntry) -> None:
            self.name, self.is_symlink, self.is_file = entry.name, entry.is_symlink, entry.is_file
            self.real = entry

        def is_dir(self) -> bool:
            if self.is_symlink():  # the tests may run as root, whom no permission stops
                raise PermissionError(13, "Permission denied", self.real.path)
            return self.real.is_dir()

    @contextmanager
    def scandir(path: bytes):
        with real(path) as entries:
            yield map(Closed, entries)

    monkeypatch.setattr(os, "scandir", scandir)
    if name == "there":
        with pytest.raises(ConfigError, match=r"cannot list folder .*/there: Permission denied"):
            FolderSource(tmp_path)
    else:
        assert names(FolderSource(tmp_path)) == ["a.png", "there.png"]


def test_open_source(tmp_path, monkeypatch):
    config = DataConfig(num_images=7, image_size=20)
    shapes = open_source("shapes", config)
    assert isinstance(shapes, ShapesSource)
    assert len(shapes) == 7
    assert shapes.read(0)[0].shape == (20, 20, 3)
    with pytest.raises(ConfigError, match=r"--data\.root shapes"):
        open_source("", config)
    write(tmp_path / "shapes" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("./shapes", config), FolderSource)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train", "val"], {"train": "train", "val": "val"}),
        (["Train", "VALID", "Testing"], {"train": "Train", "val": "VALID", "test": "Testing"}),
        (["training", "validation"], {"train": "training", "val": "validation"}),
        (["test", "cat", "dog"], {"test": "test"}),
        (["cat", "trainer"], {}),
    ],
)
def test_split_folders(tmp_path, names, found):
    for name in names:
        write(tmp_path / name / "cat" / "a.png")
    (tmp_path / "val.txt").touch()
    assert {part: path.relative_to(tmp_path).name for part, path in split_folders(tmp_path).items()} == found
    if len(found) < 2:
        open_source(str(tmp_path), DataConfig())  # a train is also a vehicle
        return
    holds = " and ".join(f"{name}/" for name in sorted(names))
    with pytest.raises(ConfigError, match=f"data.root='{tmp_path}' holds {holds}: give {tmp_path}/{found['train']}"):
        open_source(str(tmp_path), DataConfig())
    assert len(open_source(str(tmp_path / found["train"]), DataConfig())) == 1


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x" / "train" / "a.png")
    assert split_folders("~/x") == {"train": tmp_path / "x" / "train"}
    assert len(FolderSource("~/x")) == 1
    assert split_folders("~/not there") == {}


def test_fingerprints_follow_names_not_places(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        write(tmp_path / "here" / name)
    before = FolderSource(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    after = FolderSource(tmp_path / "there")
    assert after.fingerprint() == before.fingerprint()
    assert Subset(after, [0, 2]).fingerprint() == Subset(before, (0, 2)).fingerprint()
    seen = {before.fingerprint()} | {Subset(after, part).fingerprint() for part in ([0, 2], [2, 0], [0])}
    (tmp_path / "there/b/3.png").rename(tmp_path / "there/b3.png")
    seen.add(FolderSource(tmp_path / "there").fingerprint())
    seen |= {ShapesSource(*numbers).fingerprint() for numbers in ((5, 40), (6, 40), (5, 41), (5, 40, 1))}
    assert len(seen) == 9, "all differ"


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

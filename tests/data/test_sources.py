"""Folders of images as people have them: nested, mixed, linked, damaged."""

import io
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource, ShapesSource, open_source
from fastdino.data.sources.decode import extensions, formats


def pixels(seed: int = 0, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write(path, image: Image.Image | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or pixels()).save(path, **options)


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
        write(tmp_path / f"{i}.png", pixels(i))
    source = FolderSource(str(tmp_path))
    assert source.labels == []
    for i in range(3):
        image, label = source.read(i)
        assert label == -1
        assert np.array_equal(image, pixels(i)), "an index reads the image of its name"


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


# ------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "gif", "tiff", "ppm", "jp2", "tga", "jfif", "avif"])
def test_formats_decode_to_rgb(tmp_path, ending):
    write(tmp_path / f"a.{ending}", Image.new("RGB", (9, 5), (200, 30, 60)))
    image, _ = FolderSource(tmp_path).read(0)
    assert image.mode == "RGB"
    assert image.size == (9, 5)
    assert np.abs(np.asarray(image).astype(int) - [200, 30, 60]).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_as_in_image_folder(tmp_path, mode):
    if mode == "I;16":
        image, want = Image.fromarray(np.full((4, 4), 40000, np.uint16)), np.full((4, 4, 3), 40000 >> 8)
    else:
        image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
        want = np.asarray(image.convert("RGB"))
    write(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), image)
    found = FolderSource(tmp_path).read(0)[0]
    assert found.mode == "RGB"
    assert np.array_equal(found, want)


def test_pixels_are_those_of_image_folder(tmp_path):
    """Full-size decoding, no draft mode, orientation ignored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    photo = pixels(size=64).resize((640, 480))
    write(tmp_path / "a.jpg", photo, exif=exif, quality=80)
    with Image.open(tmp_path / "a.jpg") as image:
        want = np.asarray(image.convert("RGB"))
    found = FolderSource(tmp_path).read(0)[0]
    assert found.size == (640, 480)
    assert np.array_equal(found, want)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def damaged(kind: str) -> bytes:
    if kind == "chunk":  # Pillow calls it a SyntaxError
        first, _, rest = encoded(pixels(size=400), "PNG").partition(b"IDAT")
        assert b"IDAT" in rest
        return first + b"IDAT" + rest.replace(b"IDAT", b"\x01\x02\x03\x04", 1)
    whole = encoded(pixels(size=100), "JPEG")
    return {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "text": b"<html>404 not found</html>",
        "float": encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut off", "text", "float", "chunk"])
def test_a_damaged_image_raises_one_clear_error(tmp_path, kind):
    (tmp_path / "bad.jpg").write_bytes(damaged(kind))
    with pytest.raises(BadImage) as caught:
        FolderSource(tmp_path).read(0)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.name == "bad.jpg"
    assert len(error.reason) > 10
    assert str(error) == f"cannot read image bad.jpg: {error.reason}"
    if kind == "float":
        assert "mode F" in error.reason


def test_an_image_that_vanishes_is_a_bad_image(tmp_path):
    write(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="FileNotFound"):
        source.read(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tiff", "bmp", "tga", "ico", "pcx", "ppm"])
def test_random_damage_never_raises_anything_else(tmp_path, ending):
    write(tmp_path / f"a.{ending}", pixels(size=24))
    whole = (tmp_path / f"a.{ending}").read_bytes()
    source = FolderSource(tmp_path)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(60):
        data = bytearray(whole[: rng.integers(len(whole) // 4, len(whole) + 1)])
        for place in rng.integers(0, min(len(data), 200), 6):
            data[place] = rng.integers(256)
        (tmp_path / f"a.{ending}").write_bytes(data)
        try:
            assert source.read(0)[0].mode == "RGB"
        except BadImage:
            bad += 1
    assert bad > 0


def test_a_file_is_read_only_by_decoders_of_images(tmp_path):
    """Pillow would hand PostScript to an outside program, whatever the file is called."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(BadImage, match="cannot identify"):
        FolderSource(tmp_path).read(0)
    assert not {".eps", ".ps", ".h5", ".mpg", ".pdf"} & extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".jp2", ".bmp", ".gif"} <= extensions()
    assert formats()[:2] == ("JPEG", "PNG")


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

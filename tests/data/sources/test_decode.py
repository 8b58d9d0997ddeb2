"""A file becomes an RGB image, or one clear error."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from fastdino.data import BadImage, FolderSource
from fastdino.data.sources.decode import extensions, formats
from tests.data.pictures import noise, write


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
    photo = noise(size=64).resize((640, 480))
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
        first, _, rest = encoded(noise(size=400), "PNG").partition(b"IDAT")
        assert b"IDAT" in rest
        return first + b"IDAT" + rest.replace(b"IDAT", b"\x01\x02\x03\x04", 1)
    whole = encoded(noise(size=100), "JPEG")
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
    write(tmp_path / f"a.{ending}", noise(size=24))
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

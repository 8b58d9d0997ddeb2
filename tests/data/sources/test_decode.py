"""A file becomes an RGB image, or one clear error."""

import io
import os
import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastdino.config import DataConfig
from fastdino.data import BadImage, FolderSource
from fastdino.data.sources.decode import decode, extensions, formats
from tests.data.pictures import noise, photo, write


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "gif", "tiff", "ppm", "jp2", "tga", "jfif", "avif"])
def test_formats_decode_to_rgb(tmp_path, ending):
    write(tmp_path / f"a.{ending}", Image.new("RGB", (9, 5), (200, 30, 60)))
    image, _ = FolderSource(tmp_path).read(0)
    assert image.shape == (5, 9, 3)
    assert np.abs(image.astype(int) - [200, 30, 60]).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_as_in_image_folder(tmp_path, mode):
    if mode == "I;16":
        image, want = Image.fromarray(np.full((4, 4), 40000, np.uint16)), np.full((4, 4, 3), 40000 >> 8)
    else:
        image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
        want = np.asarray(image.convert("RGB"))
    write(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), image)
    found = FolderSource(tmp_path).read(0)[0]
    assert found.dtype == np.uint8
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
    assert found.shape == (480, 640, 3)
    assert np.array_equal(found, want)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
@pytest.mark.parametrize("size", [(500, 375), (33, 17), (1, 1)], ids=str)
def test_a_jpeg_has_pillows_pixels_without_pillow(monkeypatch, size, options):
    """Two builds of libjpeg-turbo agree."""
    for index in range(4):
        data = encoded(photo(*size, seed=index), "JPEG", **options)
        want = np.asarray(Image.open(io.BytesIO(data)))
        with monkeypatch.context() as without:
            without.setattr(Image, "open", None)
            assert np.array_equal(decode(data, "a.jpg"), want)


def test_a_jpeg_that_only_pillow_reads():
    gray, cmyk = (encoded(photo(40, 30).convert(mode), "JPEG") for mode in ("L", "CMYK"))
    faulty = bytearray(encoded(photo(40, 30), "JPEG"))
    faulty[-60:-58] = b"\xff\xd0"  # a marker that does not belong there
    for data in (gray, cmyk, bytes(faulty)):
        assert np.array_equal(decode(data, "a.jpg"), Image.open(io.BytesIO(data)).convert("RGB"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
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
        assert error.reason.endswith("values of type float32 have no range of their own: set data.range=LOW HIGH")


def test_an_image_that_vanishes_is_a_bad_image(tmp_path):
    write(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="FileNotFound"):
        source.read(0)


def written() -> dict[str, bytes]:
    """A picture in every format that Pillow writes and reads here."""
    found = {}
    for kind in sorted(set(Image.SAVE) & set(formats())):
        for mode in ("RGB", "L", "1"):
            try:
                found[kind] = encoded(noise(size=64).convert(mode), kind)
                break
            except (OSError, ValueError, KeyError):
                continue
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", written())
def test_a_file_that_was_cut_is_an_image_or_one_error(tmp_path, kind):
    whole, readable = written()[kind], []
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0):
        (tmp_path / "a.png").write_bytes(whole[: int(len(whole) * share)])
        with suppress(BadImage):
            assert FolderSource(tmp_path).read(0)[0].shape[2] == 3
            readable.append(share)
    assert 1.0 in readable or kind == "SPIDER", "SPIDER holds floats"
    assert 0.02 not in readable


def dds(fourcc: bytes, flags: int, more: bytes = b"") -> bytes:
    head = struct.pack("<7I44x2I4s5I5I", 124, 0x1007, 8, 8, 0, 0, 1, 32, flags, fourcc, 32, *[0] * 9)
    return b"DDS " + head + more + bytes(4096)


UNKNOWN_KINDS = {
    "dds fourcc": dds(b"ABCD", 4),
    "dds dxgi": dds(b"DX10", 4, struct.pack("<5I", 999, 3, 0, 1, 0)),
    "dds flags": dds(bytes(4), 0x800),
    "blp": b"BLP2" + struct.pack("<I4B2I", 1, 9, 0, 7, 0, 8, 8) + bytes(2048),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*written(), *UNKNOWN_KINDS])
def test_random_damage_is_an_image_or_one_error(kind):
    """More than 10,000 files over all kinds: bytes of the head or of all replaced, removed or repeated; the end cut."""
    whole = {**written(), **UNKNOWN_KINDS}[kind]
    rng, bad, count = np.random.default_rng(0), 0, 40 if len(whole) > 10**6 else 450
    for turn in range(count):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), (64, 400, len(data))[turn % 3]), 1 + turn % 7):
            data[place] = rng.integers(256)
        if turn % 5 == 0:
            first, last = sorted(rng.integers(0, len(data), 2).tolist())
            data[first:last] = data[first:last] * (turn % 2 * 2)
        if turn % 4 == 0:
            data = data[: rng.integers(len(data) + 1)]
        try:
            pixels = decode(bytes(data), "a.png", DataConfig(max_pixels=10**6))
        except BadImage:
            bad += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert 0 < pixels.size <= 3 * 10**6
    assert bad > 0


@pytest.mark.parametrize("kind", UNKNOWN_KINDS)
def test_a_kind_that_pillow_lacks_is_a_bad_image(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(UNKNOWN_KINDS[kind])
    with pytest.raises(BadImage):
        FolderSource(tmp_path).read(0)


@pytest.mark.parametrize(
    "error",
    [RuntimeError, AttributeError, ZeroDivisionError, AssertionError, NotImplementedError, RecursionError, UserWarning],
)
def test_whatever_a_decoder_raises_is_one_bad_image(tmp_path, monkeypatch, error):
    write(tmp_path / "a.png")

    def load(_: object) -> None:
        raise error("from a plugin,\nof two lines")

    source = FolderSource(tmp_path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(BadImage, match=f"a.png: {error.__name__}: from a plugin, of two lines"):
        source.read(0)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").symlink_to(tmp_path / "pipe")
    with pytest.raises(BadImage, match="a pipe"):
        FolderSource(tmp_path).read(0)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_may_be_above_and_below_pillows(tmp_path, monkeypatch):
    write(tmp_path / "a.png", noise(size=100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match=r"100 x 100 pixels are more than data\.max_pixels=9999"):
        FolderSource(tmp_path, DataConfig(max_pixels=9999)).read(0)
    assert FolderSource(tmp_path, DataConfig(max_pixels=10000)).read(0)[0].shape == (100, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # somebody wants none
    assert FolderSource(tmp_path).read(0)[0].shape == (100, 100, 3)
    assert Image.MAX_IMAGE_PIXELS is None


def test_bits_of_16_bit_gray(tmp_path):
    values = np.array([[0, 15, 16, 4095, 4096, 65535]], np.uint16)
    write(tmp_path / "a.tiff", Image.fromarray(values))
    for bits, want in {16: [0, 0, 0, 15, 16, 255], 12: [0, 0, 1, 255, 255, 255], 8: [0, 15, 16, 255, 255, 255]}.items():
        assert np.asarray(FolderSource(tmp_path, DataConfig(bits=bits)).read(0)[0])[0, :, 0].tolist() == want


def test_a_file_is_read_only_by_decoders_of_images(tmp_path):
    """Pillow would hand PostScript to an outside program, whatever the file is called."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(BadImage, match="cannot identify"):
        FolderSource(tmp_path).read(0)
    assert not {".eps", ".ps", ".h5", ".mpg", ".pdf"} & extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".jp2", ".bmp", ".gif"} <= extensions()
    assert formats()[:2] == ("JPEG", "PNG")

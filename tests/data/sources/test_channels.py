"""Images of any number of channels and any type of values: .npy, TIFF and what Pillow has beside bytes."""

import io
import json
import logging
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource
from fastdino.data.sources.decode import decode
from fastdino.data.sources.formats import tiff as tiff_format
from fastdino.data.sources.formats.levels import to_bytes
from fastdino.data.sources.packed.shard import Packing
from tests.data.pictures import noise, write
from tests.data.sources.tars import names, opened, write_tar

LOW, HIGH = 100.0, 4000.0


def values(channels: int, dtype: Any = np.uint16, height: int = 11, width: int = 14, seed: int = 0) -> np.ndarray:
    """(height, width, channels) from below LOW to above HIGH, as far as the type goes."""
    return np.random.default_rng(seed).integers(0, 4500, (height, width, channels)).astype(dtype)


def levels(raw: np.ndarray, low: float = LOW, high: float = HIGH) -> np.ndarray:
    """The definition in whole numbers, which are exact: round half up, ends beyond the ends."""
    over = (2 * 255 * (raw.astype(np.int64) - int(low)) + int(high - low)) // (2 * int(high - low))
    return np.clip(over, 0, 255).astype(np.uint8)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def planes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))


def pillow(image: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind)
    return buffer.getvalue()


def config(channels: int, span: tuple[float, float] | None = (LOW, HIGH), **more: Any) -> DataConfig:
    return DataConfig(channels=channels, range=span, **more)


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i2", "i4", ">i4", "u4", "i8", "u8", "f2", "f4", ">f4", "f8"])
def test_values_of_any_type_are_mapped_alike(dtype):
    raw = values(1)
    assert np.array_equal(to_bytes(raw.astype(dtype), 16, (LOW, HIGH)), levels(raw.astype(dtype).astype(np.int64)))


def test_every_16_bit_value_is_mapped_to_the_nearest_level():
    raw = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    for low, high in [(0, 65535), (0, 4095), (100, 4000), (-500, 70000), (4095, 4096)]:
        assert np.array_equal(to_bytes(raw, 16, (low, high)), levels(raw, low, high)), (low, high)


def test_halves_go_up_and_what_is_no_number_goes_low():
    raw = np.array([[0.0, 0.5, 1.5, 254.5, 255, np.nan, np.inf, -np.inf, -1e300, 1e300]])
    assert to_bytes(raw, 16, (0, 255)).tolist() == [[0, 1, 2, 255, 255, 0, 255, 0, 0, 255]]
    whole = np.array([[0, 2**63 - 1, -(2**63)]])
    assert to_bytes(whole, 16, (-1.0, 1.0)).tolist() == [[128, 255, 0]]


def test_a_large_image_is_mapped_in_blocks_as_a_small_one():
    raw = np.random.default_rng(0).normal(0, 2, (1100, 1000, 2)).astype(np.float32)
    whole = to_bytes(raw, 16, (-3, 3))
    rows = np.concatenate([to_bytes(raw[i : i + 1], 16, (-3, 3)) for i in range(1100)])
    assert np.array_equal(whole, rows)
    assert len(np.unique(whole)) == 256


def test_bytes_stay_as_they_are_and_booleans_are_black_and_white():
    raw = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    assert np.array_equal(to_bytes(raw, 16, (0, 7)), raw)
    assert to_bytes(raw > 5, 16, None).ravel().tolist() == [0] * 6 + [255] * 6


def test_bits_say_what_16_bit_values_use_where_there_is_no_range():
    raw = values(4)
    for bits in (16, 12):
        want = np.minimum(raw >> (bits - 8), 255)
        assert np.array_equal(decode(npy(raw), "a", config(4, None, bits=bits)), want)
        assert np.array_equal(decode(tiff(raw, planarconfig="contig"), "a", config(4, None, bits=bits)), want)


@pytest.mark.parametrize("dtype", ["i1", "i2", "u4", "f4"])
def test_values_without_a_range_ask_for_one(dtype):
    for data in (npy(values(4, dtype)), tiff(values(4, dtype), planarconfig="contig")):
        with pytest.raises(BadImage, match=r"no range of their own: set data\.range=LOW HIGH"):
            decode(data, "a", config(4, None))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("TIFF", np.uint16), ("PNG", np.uint16), ("TIFF", np.int32), ("TIFF", "f4")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_pillow_has_beside_bytes(kind, dtype, channels):
    """Modes I;16, I and F."""
    raw = values(1, dtype)
    found = decode(pillow(raw[..., 0], kind), "a", config(channels))
    assert np.array_equal(found, np.repeat(levels(raw), channels, axis=2))
    if dtype is not np.uint16:
        with pytest.raises(BadImage, match=r"set data\.range"):
            decode(pillow(raw[..., 0], kind), "a", config(channels, None))


# ------------------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13, 200])
def test_an_array_is_an_image_in_either_layout(channels):
    raw = values(channels)
    for array in (
        raw,
        planes(raw),
        np.asfortranarray(raw),
        raw.astype(">u2"),
        *([raw[..., 0]] if channels == 1 else []),
    ):
        found = decode(npy(array), "a", config(channels))
        assert found.flags.c_contiguous
        assert np.array_equal(found, levels(raw)), array.shape


def test_gray_and_colour_become_one_another():
    gray, colour = values(1, np.uint8), values(3, np.uint8)
    for array in (gray, gray[..., 0], planes(gray)):
        assert np.array_equal(decode(npy(array), "a", config(3)), np.repeat(gray, 3, axis=2))
    luma = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    for data in (npy(colour), npy(planes(colour)), pillow(colour), pillow(colour, "TIFF")):
        assert np.array_equal(decode(data, "a", config(1)), luma)
    assert np.array_equal(decode(pillow(gray[..., 0]), "a", config(1)), gray)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_one_channel_is_the_luma_of_three(mode):
    data = pillow(noise().convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    want = np.asarray(Image.fromarray(decode(data, "a")).convert("L"))[..., None]
    assert np.array_equal(decode(data, "a", config(1, None)), want)
    jpeg = pillow(noise(), "JPEG")
    assert np.array_equal(decode(jpeg, "a", config(1))[..., 0], Image.fromarray(decode(jpeg, "a")).convert("L"))


def test_a_picture_with_alpha_has_two_or_four_channels():
    raw = values(4, np.uint8)
    assert np.array_equal(decode(pillow(Image.fromarray(raw, "RGBA")), "a", config(4)), raw)
    assert np.array_equal(decode(pillow(Image.fromarray(raw[..., :2], "LA")), "a", config(2)), raw[..., :2])
    assert np.array_equal(decode(tiff(raw, planarconfig="contig"), "a", config(4)), raw)


BAD_ARRAYS = {
    "5 for 4": (npy(values(5)), 4, "no axis of 4, and data.channels=4"),
    "gray for 4": (npy(values(1)[..., 0]), 4, "it has 1 channel, and data.channels=4"),
    "4 for 1": (npy(values(4)), 1, "no axis of 1"),
    "4 for 3": (npy(values(4)), 3, "no axis of 3"),
    "either": (npy(values(4, height=4)[:, :4]), 4, r"\(4, 4, 4\) may be"),
    "line": (npy(np.zeros(9)), 4, "an image is"),
    "film": (npy(np.zeros((2, 3, 4, 4))), 4, "an image is"),
    "none": (npy(np.zeros((0, 3, 4))), 4, "an image is"),
    "complex": (npy(values(4, np.complex64)), 4, "complex64, and an image is of numbers"),
    "text": (npy(np.full((3, 3, 4), "x")), 4, "an image is of numbers"),
    "objects": (npy(np.full((3, 3, 4), None)), 4, "object, and an image is of numbers"),
    "record": (npy(np.zeros((3, 3), [("a", "u1"), ("b", "u1")])), 4, "an image is of numbers"),
    "cut": (npy(values(4))[:-1], 4, "cut off: 1 bytes of its values"),
    "head": (npy(values(4))[:40], 4, "EOF"),
    "large": (npy(values(4, height=101, width=100)), 4, "100 x 101 pixels are more than data.max_pixels=10000"),
    "plain": (npy(values(3, np.uint8)), 0, "only with data.range"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_an_array_that_is_no_image_says_why(kind):
    data, channels, says = BAD_ARRAYS[kind]
    asked = config(channels, max_pixels=10000) if channels else DataConfig()
    with pytest.raises(BadImage, match=says):
        decode(data, "a.npy", asked)


def test_an_array_that_claims_to_be_large_takes_no_memory():
    """Its header is judged before there are values."""
    for shape in ((10**6, 10**6, 4), (4, 10**9, 10**9), (10000, 1, 4)):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
        with pytest.raises(BadImage, match=r"more than data\.max_pixels|cut off"):
            decode(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header, "a.npy", config(4, max_pixels=10000))


def test_no_code_in_an_array_is_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    with pytest.raises(BadImage, match="an image is of numbers"):
        decode(npy(np.array([[Evil()]], object)), "a.npy", config(1))
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------------------- TIFF

LAYOUTS: dict[str, dict[str, Any]] = {
    "pixels": {"planarconfig": "contig"},
    "planes": {"planarconfig": "separate"},
    "pages": {},
    "tiles": {"planarconfig": "contig", "tile": (16, 32)},
    "tiled planes": {"planarconfig": "separate", "tile": (16, 16)},
    "strips": {"planarconfig": "contig", "rowsperstrip": 3},
    "big": {"planarconfig": "contig", "bigtiff": True},
    "other order": {"planarconfig": "contig", "byteorder": ">"},
    "described": {"planarconfig": "contig", "description": '<OME xmlns="x"></OME>'},
}


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_a_tiff_is_an_image_in_every_layout(channels, layout, compression):
    options = {**LAYOUTS[layout], "photometric": "minisblack", "compression": compression}
    for dtype in (np.uint16, np.float32):
        raw = values(channels, dtype, 40, 37)
        by_plane = "planes" in layout or layout == "pages"
        found = decode(tiff(planes(raw) if by_plane else raw, **options), "a.tif", config(channels))
        assert found.flags.c_contiguous
        assert np.array_equal(found, levels(raw))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_a_tiff_of_any_type(dtype):
    raw = values(5, dtype)
    want = raw if dtype == np.uint8 else levels(raw)
    assert np.array_equal(
        decode(tiff(raw, planarconfig="contig", predictor=True, compression="zlib"), "a", config(5)), want
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_colour_tiff_that_pillow_does_not_give_is_read_with_a_range(dtype):
    """A microscope's red, green and blue; with alpha it is dropped, as Pillow does."""
    raw, alpha = values(3, dtype), values(1, dtype)
    whole = tiff(raw, photometric="rgb")
    with_alpha = tiff(np.concatenate([raw, alpha], axis=2), photometric="rgb", extrasamples=["unassalpha"])
    for data in (whole, with_alpha, tiff(planes(raw), photometric="rgb", planarconfig="separate")):
        if dtype == np.uint16:
            assert np.array_equal(decode(data, "a"), raw >> 8), "without a range the high bytes"
        assert np.array_equal(decode(data, "a", config(3)), levels(raw))
        luma = np.asarray(Image.fromarray(levels(raw)).convert("L"))
        assert np.array_equal(decode(data, "a", config(1))[..., 0], luma)
    if dtype == np.float32:
        with pytest.raises(BadImage, match=r"Pillow does not read a TIFF of such values: set data\.range"):
            decode(whole, "a")


def test_tiffs_as_programs_write_them():
    """ImageJ's and OME's stacks of channels, a satellite's pyramid, a camera's packed 12 bits."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    raw = values(4, height=30, width=26) % 4096
    for options in ({"imagej": True}, {"ome": True}):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, planes(raw), metadata={"axes": "CYX"}, **options)
        assert np.array_equal(decode(buffer.getvalue(), "a", config(4)), levels(raw))
    pyramid = io.BytesIO()
    with tifffile.TiffWriter(pyramid) as writer:
        for pixels, more in ((raw, {"subifds": 1}), (raw[::2, ::2], {})):
            writer.write(pixels, planarconfig="contig", photometric="minisblack", **more)
    assert np.array_equal(decode(pyramid.getvalue(), "a", config(4)), levels(raw))
    packed = tiff(raw, planarconfig="contig", bitspersample=12)
    assert len(packed) < raw.nbytes
    assert np.array_equal(decode(packed, "a", config(4, None, bits=12)), raw >> 4)
    depths = io.BytesIO()
    tifffile.imwrite(depths, np.stack([planes(raw)] * 3), ome=True, metadata={"axes": "ZCYX"})
    with pytest.raises(BadImage, match=r"it has 1 channel, and data\.channels=4"):
        decode(depths.getvalue(), "a", config(4))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_or_three_channels_are_of_the_first_page_without_alpha(channels):
    """Of types that Pillow does not read; a stack of three pages is no colour, as Pillow has it."""
    gray, other = values(1, np.uint32), values(1, np.uint32, seed=1)
    stack = tiff(planes(np.concatenate([gray, other, other], axis=2)))
    with_alpha = tiff(np.concatenate([gray, other], axis=2), planarconfig="contig", extrasamples=["unassalpha"])
    for data in (tiff(gray[..., 0]), stack, with_alpha):
        assert np.array_equal(decode(data, "a", config(channels)), np.repeat(levels(gray), channels, axis=2))


def test_16_bit_colour_that_nothing_gives_whole_is_refused_with_a_range():
    png = b"\x89PNG\r\n\x1a\n"
    rows = b"".join(b"\0" + row.tobytes() for row in values(3).astype(">u2"))
    head = (14).to_bytes(4, "big") + (11).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    assert np.array_equal(decode(png, "a"), values(3) >> 8)
    with pytest.raises(BadImage, match=r"Pillow gives the high bytes alone: for data\.range store it as TIFF or \.npy"):
        decode(png, "a", config(3))


@pytest.mark.parametrize(
    ("make", "channels", "says"),
    [
        (lambda: tiff(values(5), planarconfig="contig"), 4, "it has 5 channels, and data.channels=4: set it"),
        (lambda: tiff(planes(values(5)), photometric="minisblack"), 4, "it has 1 channel, and data.channels=4"),
        (lambda: tiff(planes(values(3)), photometric="minisblack"), 4, "it has 1 channel, and data.channels=4"),
        (lambda: pillow(values(3, np.uint8)), 4, "it has 3 channels, and data.channels=4"),
        (lambda: pillow(noise(), "JPEG"), 5, "it has 3 channels, and data.channels=5"),
        (lambda: pillow(noise().convert("P"), "PNG"), 2, "it has 3 channels, and data.channels=2"),
        (lambda: tiff(values(4, np.complex64), planarconfig="contig"), 4, "complex64 are no image"),
        (
            lambda: tiff(values(4), planarconfig="contig", compression="lzma"),
            4,
            "compressed by .*: store them",
        ),
        (lambda: tiff(values(4, height=101, width=100), planarconfig="contig"), 4, "more than data.max_pixels=10000"),
        (lambda: tiff(values(4), planarconfig="contig")[:-1], 4, "cannot read image a.tif"),
        (lambda: tiff(values(4), planarconfig="contig", compression="zlib")[:-40], 4, "cannot read image a.tif"),
        (lambda: b"II*\0" + bytes(40), 4, "cannot read image a.tif"),
    ],
)
def test_a_tiff_that_is_no_such_image_says_why(make, channels, says):
    with pytest.raises(BadImage, match=says):
        decode(make(), "a.tif", config(channels, max_pixels=10000))


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "zstd"])
def test_a_strip_that_swells_is_not_taken_whole(compression):
    """A strip of a small image that decodes to 64 MB."""
    tracemalloc = pytest.importorskip("tracemalloc")
    whole = np.zeros((4096, 4096, 4), np.uint8)
    data = bytearray(tiff(whole, planarconfig="contig", compression=compression, rowsperstrip=4096))
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags
        for name in ("ImageWidth", "ImageLength"):  # now it claims to be of 16 x 16 pixels
            data[tags[name].valueoffset : tags[name].valueoffset + 2] = (16).to_bytes(2, "little")
    tracemalloc.start()
    with suppress(BadImage):
        decode(bytes(data), "a.tif", config(4, max_pixels=10000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 2**22


def test_without_tifffile_the_extra_is_named(monkeypatch):
    data = tiff(values(4), planarconfig="contig")
    tiff_format._tifffile.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "imagecodecs", None)
        with pytest.raises(ConfigError, match=r"pip install 'fastdino\[tiff\]'"):
            decode(data, "a.tif", config(4))
        assert decode(pillow(noise(), "TIFF"), "a.tif", config(3)).shape == (16, 16, 3), "Pillow's own need none"
    assert decode(data, "a.tif", config(4)).shape == (11, 14, 4)


# --------------------------------------------------------------------------------------------------- damaged files


def whole_files() -> dict[str, bytes]:
    made = {
        "npy": npy(values(4)),
        "npy planes": npy(planes(values(4, np.float32))),
        "npy gray": npy(values(1, np.float64)[..., 0]),
    }
    try:
        import imagecodecs  # noqa: F401
        import tifffile  # noqa: F401
    except ImportError:
        return made
    for layout in LAYOUTS:
        raw = values(4, np.uint16, 40, 37)
        by_plane = "planes" in layout or layout == "pages"
        for compression in (None, "zlib", "lzw"):
            options = {**LAYOUTS[layout], "photometric": "minisblack", "compression": compression}
            made[f"{layout} {compression}"] = tiff(planes(raw) if by_plane else raw, **options)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", whole_files())
def test_random_damage_is_an_image_or_one_error(kind, caplog):
    """Bytes of the head or of all replaced, removed or repeated; the end cut."""
    whole, rng, bad = whole_files()[kind], np.random.default_rng(0), 0
    for turn in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), (64, 400, len(data))[turn % 3]), 1 + turn % 7):
            data[place] = rng.integers(256)
        if turn % 5 == 0:
            first, last = sorted(rng.integers(0, len(data), 2).tolist())
            data[first:last] = data[first:last] * (turn % 2 * 2)
        if turn % 4 == 0:
            data = data[: rng.integers(len(data) + 1)]
        asked = config((4, 1, 3)[turn % 3], max_pixels=10**4)
        try:
            pixels = decode(bytes(data), "a", asked)
        except BadImage:
            bad += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (asked.channels,)
            assert 0 < pixels.size <= asked.channels * 10**4
    assert bad > 0
    assert not [r for r in caplog.records if r.name == "tifffile"], (
        "what is wrong with a file is told once, as BadImage"
    )


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """12 images of 4 channels in 2 classes, arrays and TIFF."""
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = values(4, np.uint16, 30 + i, 40 - i, seed=i)
        if i % 3:
            path.with_suffix(".npy").write_bytes(npy(raw if i % 4 else planes(raw)))
        else:
            path.with_suffix(".tif").write_bytes(tiff(raw, planarconfig="contig"))
    return tmp_path / "images"


def test_every_source_gives_the_same_images(arrays, tmp_path):
    settings: dict[str, Any] = {"channels": 4, "range": (LOW, HIGH)}
    folder, cache = FolderSource(arrays, DataConfig(**settings)), tmp_path / "cache"
    assert len(folder) == 12
    files = [(folder.encoded(i), folder.name(i)) for i in range(12)]
    members = [(f"{i:02d}{Path(name).suffix}", data) for i, (data, name) in enumerate(files)]
    sources = [opened(write_tar(tmp_path / "a.tar", members), cache, **settings)]
    (arrays / "list.csv").write_text("path\n" + "".join(f"{name}\n" for _, name in files))
    sources.append(opened(arrays / "list.csv", cache, **settings))
    Packing(per_shard=5, workers=1, cache=cache, **settings)(str(arrays), tmp_path / "shards")
    sources.append(opened(tmp_path / "shards", cache, **settings))
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": [data for data, _ in files]}), tmp_path / "a.parquet")
    sources.append(opened(tmp_path / "a.parquet", cache, **settings))
    for index in range(12):
        want, _ = folder.read(index)
        assert want.shape[2] == 4
        for source in sources:
            assert source.encoded(index) == files[index][0]
            assert np.array_equal(source.read(index)[0], want)


def test_arrays_beside_pictures_are_no_images_unless_the_settings_say_so(tmp_path, caplog):
    write(tmp_path / "f/a.png", noise())
    (tmp_path / "f/a.npy").write_bytes(npy(np.zeros((5, 5), np.int64)))
    png = (tmp_path / "f/a.png").read_bytes()
    write_tar(tmp_path / "t.tar", [("a.npy", npy(np.zeros((5, 5)))), ("a.png", png), ("b.npy", npy(np.zeros((5, 5))))])
    plain: dict[str, Any] = {}
    for settings, want in (
        (plain, ["a.png"]),
        ({"channels": 1}, ["a.npy", "a.png"]),
        ({"range": (0, 1)}, ["a.npy", "a.png"]),
    ):
        assert names(FolderSource(tmp_path / "f", DataConfig(**settings))) == want
        assert ("1 .npy files count as images, like the 1 others" in caplog.text) == (settings != plain)
        found = opened(tmp_path / "t.tar", tmp_path / "cache", **settings)  # its index is kept for each
        assert len(found) == (1 if settings == plain else 2)
        caplog.clear()
    (tmp_path / "f/a.png").unlink()
    with pytest.raises(
        ConfigError, match=r"1 with \.npy \(\.npy files are images with data\.range, or with other channels"
    ):
        FolderSource(tmp_path / "f")


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        (lambda: npy(values(4) % 4096), {"channels": 4}, "set data.bits=12"),
        (lambda: tiff(values(4) % 4096, planarconfig="contig"), {"channels": 4}, "set data.bits=12"),
        (lambda: npy(values(4) % 4096), {"channels": 4, "range": (0, 4095)}, ""),
        (lambda: npy(values(4) % 4096), {"channels": 4, "bits": 12}, ""),
        (lambda: npy(values(4) * 2), {"channels": 4}, ""),
        (lambda: npy(values(4, np.float32)), {"channels": 4, "range": (0, 1)}, ""),
        (lambda: tiff(values(3) % 4096, photometric="rgb"), {}, "set data.range=0 4095"),
        (lambda: tiff(values(3) % 4096, photometric="rgb"), {"channels": 1}, "set data.range=0 4095"),
        (lambda: pillow(values(1)[..., 0] % 4096, "TIFF"), {"channels": 1}, "set data.bits=12"),
        (lambda: pillow(noise()), {"range": (0, 4095)}, "data.range=0 4095 has no effect on"),
        (lambda: npy(values(4, np.uint8)), {"channels": 4, "range": (0, 4095)}, "data.range=0 4095 has no effect on"),
        (lambda: npy(values(4, np.uint8)), {"channels": 4, "range": (0, 255)}, ""),
        (lambda: npy(values(4, np.int8)), {"channels": 4, "range": (-128, 127)}, ""),
    ],
)
def test_values_that_the_settings_do_not_fit_are_told_at_the_start(tmp_path, caplog, data, settings, says):
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(data())
    with caplog.at_level(logging.WARNING):
        FolderSource(tmp_path, DataConfig(**settings))
    assert len(caplog.records) == bool(says)
    assert says in caplog.text


# ---------------------------------------------------------------------------------------------------------- packing


def test_packing_reduces_each_channel(arrays, tmp_path):
    """As a band alone is reduced, and without loss."""
    settings: dict[str, Any] = {"channels": 4, "range": (LOW, HIGH)}
    pack = Packing(short_side=20, workers=1, cache=tmp_path / "cache", **settings)
    pack(str(arrays), tmp_path / "out")
    folder = FolderSource(arrays, DataConfig(**settings))
    shards = opened(tmp_path / "out", tmp_path / "cache", channels=4)
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".npy", ".cls"}
    for index in range(12):
        image = folder.read(index)[0]
        height, width = image.shape[:2]
        scale = 20 / min(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        want = [np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(4)]
        assert np.array_equal(shards.read(index)[0], np.stack(want, axis=2))
    assert pack(str(arrays), tmp_path / "out").startswith("12 images"), "and goes on where it stopped"
    with pytest.raises(ConfigError, match=r"channels was 4, now it is 3|range was"):
        Packing(short_side=20, workers=1, cache=tmp_path / "cache", range=(LOW, HIGH))(str(arrays), tmp_path / "out")


def test_gray_is_packed_as_gray(tmp_path):
    for i in range(2):
        write(tmp_path / f"in/{i}.png", Image.fromarray(values(1, height=60, width=50, seed=i)[..., 0]))
    Packing(short_side=20, workers=1, cache=tmp_path / "c", channels=1, bits=13)(str(tmp_path / "in"), tmp_path / "out")
    shards = opened(tmp_path / "out", tmp_path / "c", channels=1)
    assert shards.read(0)[0].shape == (24, 20, 1)
    assert Image.open(io.BytesIO(shards.encoded(0))).mode == "L"


def test_a_journal_of_before_channels_goes_on(tmp_path):
    write(tmp_path / "in/a.png", noise())
    Packing(workers=1, cache=tmp_path / "c")(str(tmp_path / "in"), tmp_path / "out")
    journal = tmp_path / "out/shards.jsonl"
    first, *rest = journal.read_text().splitlines()
    settings = json.loads(first)
    assert (settings.pop("channels"), settings.pop("range")) == (3, None)
    journal.write_text("\n".join([json.dumps(settings), *rest]) + "\n")
    assert Packing(workers=1, cache=tmp_path / "c")(str(tmp_path / "in"), tmp_path / "out").startswith("1 images")
    with pytest.raises(ConfigError, match="channels was 3, now it is 1"):
        Packing(workers=1, cache=tmp_path / "c", channels=1)(str(tmp_path / "in"), tmp_path / "out")

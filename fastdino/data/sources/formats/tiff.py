"""TIFF files of any number of channels and any kind of values, by tifffile."""

import io
import logging
from functools import cache
from typing import Any

import numpy as np

from fastdino.config import ConfigError
from fastdino.data.sources.formats.levels import wrong_channels

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF's
# Those whose decoders write no more than they are told to; JPEG and the like are made for photographs.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "Zstandard"}
_RGB, _PLANES = 2, 2  # of tags 262 and 284


def is_tiff(data: bytes) -> bool:
    """By its first bytes."""
    return data.startswith(_MAGIC)


def read_tiff(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """The values of the first image, (h, w, c).

    Of 1 or 3 ``channels`` those of its first page without alpha, for which another number may be found; else exactly
    ``channels``, in one page, or in as many pages of one each. Pages are read by their tags alone: what a file's
    description says of its shape, or of other files, is not followed.

    Raises ConfigError without tifffile; for all else whatever tifffile raises, ValueError where it reads more.
    """
    tifffile = _tifffile()
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first = file.pages[0]
        found = first.samplesperpixel
        if channels in (1, 3):
            colours = 3 if first.photometric == _RGB else 1 if found == 2 else found
            return _values(first, max_pixels)[..., :colours]
        if found == channels:
            return _values(first, max_pixels)
        pages = [file.pages[i] for i in range(channels)] if found == 1 and _has(file.pages, channels) else []
        if len({(page.shape, page.dtype) for page in pages}) != 1:
            raise wrong_channels(found, channels)
        return np.concatenate([_values(page, max_pixels) for page in pages], axis=2)


def _has(pages: Any, count: int) -> bool:
    """Whether there are as many pages, and no more."""
    try:
        pages[count - 1]
    except IndexError:
        return False
    try:
        pages[count]
    except IndexError:
        return True
    return False


def _values(page: Any, max_pixels: int) -> np.ndarray:
    """(h, w, c) of a page, whose header is judged before its values are decoded."""
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    if page.imagedepth != 1 or page.dtype is None or min(height, width, samples) < 1:
        raise ValueError("no page of pixels that have values of one type")
    tile = page.tilelength * page.tilewidth if page.is_tiled else 0
    if max(height * width, tile) > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
    if int(page.compression) not in _COMPRESSIONS:
        known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise ValueError(f"its values are compressed by {page.compression!r}: store them with one of {known}")
    values = page.asarray(maxworkers=1)
    if samples > 1 and page.planarconfig == _PLANES:
        return np.moveaxis(values.reshape(samples, height, width), 0, 2)
    return values.reshape(height, width, samples)


@cache
def _tifffile() -> Any:
    try:
        import imagecodecs  # noqa: F401 (decodes within the memory that it is given, which tifffile alone does not)
        import tifffile
    except ImportError as error:
        raise ConfigError(
            "TIFF files of values that Pillow does not read, and those of data.channels other than 1 and 3, are read "
            "with tifffile: pip install 'fastdino[tiff]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds wrong with a file is told as BadImage
    return tifffile

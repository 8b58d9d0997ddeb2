"""A file becomes an RGB image, or one clear error."""

import io
import logging
import os
import stat
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

log = logging.getLogger(__name__)

# Formats that Pillow recognises but cannot decode by itself: they need an outside program, or hold no raster.
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


MAX_PIXELS = 178_956_970  # beyond it Pillow takes an image for a decompression bomb
_SAMPLE = 8  # images that are looked at for unused bits
_UNUSED_BELOW = 4096  # a 16-bit image without a value from here on uses 12 bits or fewer


class BadImage(Exception):
    """An image that could not be read: its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that the error survives pickling
        self.name, self.reason = name, " ".join(reason.split())  # of one line, as messages are

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that we decode, the common ones first."""
    Image.init()
    known = set(Image.registered_extensions().values()) & set(Image.OPEN) - _NOT_RASTER
    return tuple(sorted(known, key=lambda name: (name != "JPEG", name != "PNG", name)))


@cache
def extensions() -> frozenset[str]:
    """File endings, in lower case and with the dot, that we take for images."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def ending(data: bytes) -> str:
    """That of a file that holds ``data``, an image that can be decoded, with the dot: ``.jpg``."""
    with _open(data, sys.maxsize) as image:
        kind = image.format
    names = sorted(name for name, of in Image.registered_extensions().items() if of == kind)
    return ".jpg" if kind == "JPEG" else min(names, key=len)


@cache
def image_endings() -> frozenset[bytes]:
    """:func:`extensions` as in a path of bytes."""
    return frozenset(map(os.fsencode, extensions()))


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS, bits: int = 16) -> np.ndarray:
    """The image as 8-bit RGB, uint8 (height, width, 3); raises :class:`BadImage`, which calls it ``name``, whatever is
    wrong.

    As in torchvision's ImageFolder, alpha is dropped, the first frame is taken and the EXIF orientation is ignored, so
    that numbers compare with published ones. Of 16-bit gray the upper 8 of the lower ``bits`` are kept, where Pillow
    would clip all but the darkest 1/256 to white; of 16-bit colour Pillow keeps the high byte. JPEG is decoded at full
    size: scaling it meanwhile is faster but changes pixels.
    """
    try:
        pixels = _jpeg(data, max_pixels)
        return _by_pillow(data, max_pixels, bits) if pixels is None else pixels
    except Exception as error:  # a decoder raises anything on a damaged file, and Pillow has sixty
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """A JPEG in colour without a fault, by the library that Pillow takes, but without the interpreter and a copy; None
    for all else, on which Pillow has the verdict."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > max_pixels:
            return None
        return simplejpeg.decode_jpeg(data)
    except ValueError:  # also of what Pillow forgives
        return None


def _by_pillow(data: bytes, max_pixels: int, bits: int) -> np.ndarray:
    with _open(data, max_pixels) as image:
        image.load()  # here: numpy would take an AttributeError of a decoder for an object without pixels
        if image.mode.startswith("I;16"):
            gray = np.minimum(np.asarray(image) >> (bits - 8), 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise ValueError(f"Pillow mode {image.mode} has no fixed range; store the image with 8 or 16 bits")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def file_bytes(path: Path, name: str) -> bytes:
    """What the file holds, undecoded. Raises BadImage, which calls it ``name``."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a file but a pipe or a device")  # which may never answer
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


class _Bytes(io.BytesIO):
    """Bytes that a message can name."""

    def __repr__(self) -> str:
        return f"of {len(self.getbuffer())} bytes"


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The file's header, before any pixel is decoded. Raises ValueError for an image of more than ``max_pixels``."""
    if not data:
        raise ValueError("it holds no bytes: an empty file, or a null")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, of the whole process, may not be the lower one
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(_Bytes(data), formats=formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels={max_pixels}")
    return image


def warn_of_unused_bits(where: str, count: int, file: Callable[[int], bytes], bits: int) -> None:
    """Looks at a few of ``count`` files: 12-bit values in 16-bit files would become 16 levels of gray, all but black.

    Args:
        where: what to call them in the warning.
        file: gives the file of an index; one that it cannot give is passed over.
        bits: as the images are read.
    """
    sample = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int)).tolist()
    peaks = [peak for index in sample if (peak := _peak_of_16_bit(file, index))]
    if not peaks or max(value for _, value in peaks) >= _UNUSED_BELOW or bits < 16:
        return
    highest = max(value for _, value in peaks)
    gray = any(kind == "gray" for kind, _ in peaks)
    remedy = f"set data.bits={max(8, highest.bit_length())}" if gray else "store them with 8 bits per channel"
    log.warning(
        "16-bit images of %s hold no value over %d of 65535 (%d looked at), so they are nearly black: %s",
        where, highest, len(peaks), remedy,
    )  # fmt: skip


def _peak_of_16_bit(file: Callable[[int], bytes], index: int) -> tuple[str, int] | None:
    """Kind ("gray" or "colour") of an image with 16 bits per channel and the largest value in it, of colour to the
    next 256; None for all other images, also for those that cannot be read."""
    try:
        with _open(file(index), MAX_PIXELS) as image:
            if image.mode.startswith("I;16"):
                return "gray", int(np.asarray(image).max())
            if ";16" in str(getattr(image, "tile", "")):
                return "colour", 256 * int(np.asarray(image).max()) + 255
    except Exception:
        pass  # said when it is decoded
    return None

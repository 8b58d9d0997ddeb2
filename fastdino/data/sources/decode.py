"""A file becomes an image of bytes, or one clear error."""

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
from PIL import Image, UnidentifiedImageError

from fastdino.config import DataConfig, UserError
from fastdino.data.sources.formats.levels import to_bytes, wrong_channels
from fastdino.data.sources.formats.npy import MAGIC, read_npy
from fastdino.data.sources.formats.tiff import is_tiff, read_tiff
from fastdino.data.sources.source import Room

log = logging.getLogger(__name__)

# Formats that Pillow recognises but cannot decode by itself: they need an outside program, or hold no raster.
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


_SAMPLE = 8  # images that are looked at for unused bits
_UNUSED_BELOW = 4096  # a 16-bit image without a value from here on uses 12 bits or fewer
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_PLAIN = DataConfig()


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
def extensions(arrays: bool = False) -> frozenset[str]:
    """File endings, in lower case and with the dot, that we take for images; ``arrays``: also that of .npy files, which
    data.takes_arrays says."""
    known = (ending for ending, name in Image.registered_extensions().items() if name in formats())
    return frozenset((*known, ".npy") if arrays else known)


def ending(data: bytes) -> str:
    """That of a file that holds ``data``, an image that can be decoded, with the dot: ``.jpg``."""
    if data.startswith(MAGIC) or is_tiff(data):
        return ".npy" if data.startswith(MAGIC) else ".tif"
    with _open(data, sys.maxsize) as image:
        kind = image.format
    names = sorted(name for name, of in Image.registered_extensions().items() if of == kind)
    return ".jpg" if kind == "JPEG" else min(names, key=len)


@cache
def image_endings(arrays: bool = False) -> frozenset[bytes]:
    """:func:`extensions` as in a path of bytes."""
    return frozenset(map(os.fsencode, extensions(arrays)))


def decode(data: bytes, name: str, config: DataConfig = _PLAIN, room: Room | None = None) -> np.ndarray:
    """The image as bytes, uint8 (height, width, config.channels), by default RGB; raises :class:`BadImage`, which calls
    it ``name``, whatever is wrong.

    As in torchvision's ImageFolder, alpha is dropped, the first frame is taken and the EXIF orientation is ignored, so
    that numbers compare with published ones. Of 16-bit gray the upper 8 of the lower ``config.bits`` are kept, where
    Pillow would clip all but the darkest 1/256 to white; of 16-bit colour Pillow keeps the high byte. ``config.range``
    maps both, and values of other types. JPEG is decoded at full size: scaling it meanwhile is faster but changes
    pixels. Into memory that ``room`` gives, if it is in colour and without a fault.

    Raises ConfigError for a file that needs a package which is not installed.
    """
    try:
        pixels = _jpeg(data, config.max_pixels, room) if config.channels == 3 else None
        return _pixels(data, config) if pixels is None else pixels
    except UserError:
        raise
    except Exception as error:  # a decoder raises anything on a damaged file, and Pillow has sixty
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _jpeg(data: bytes, max_pixels: int, room: Room | None) -> np.ndarray | None:
    """A JPEG in colour without a fault, by the library that Pillow takes, but without the interpreter and a copy; None
    for all else, on which Pillow has the verdict."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > max_pixels:
            return None
        return simplejpeg.decode_jpeg(data, buffer=room(height, width) if room else None)
    except ValueError:  # also of what Pillow forgives
        return None


def _pixels(data: bytes, config: DataConfig) -> np.ndarray:
    """The image of any file; gray and colour become one another where one or three channels are wanted."""
    pixels = to_bytes(_values(data, config), config.bits, config.range)
    found, wanted = pixels.shape[2], config.channels
    if (found, wanted) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, wanted) == (3, 1):
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    if found != wanted:
        raise wrong_channels(found, wanted)
    return np.ascontiguousarray(pixels)


def _values(data: bytes, config: DataConfig) -> np.ndarray:
    """What the file holds, (height, width, its channels), of any type."""
    if data.startswith(MAGIC):
        if not config.takes_arrays:
            raise ValueError("a .npy file, which is an image only with data.range (0 255 for bytes) or other channels")
        return read_npy(data, config.channels, config.max_pixels)
    many = config.channels not in (1, 3)
    values = None if many and is_tiff(data) else _by_pillow(data, config, many)
    return read_tiff(data, config.channels, config.max_pixels) if values is None else values


def _by_pillow(data: bytes, config: DataConfig, many: bool) -> np.ndarray | None:
    """Values (height, width, channels): as Pillow has them, but colour as RGB unless ``many`` channels are wanted.

    None for a TIFF whose values Pillow does not give: where data.range says what is to become of them, and 16-bit
    colour in uncompressed planes, each byte of which Pillow would take for a value.
    """
    try:
        image = _open(data, config.max_pixels)
    except UnidentifiedImageError as error:
        if not is_tiff(data):
            raise
        if config.range is None:
            raise ValueError("Pillow does not read a TIFF of such values: set data.range=LOW HIGH") from error
        return None
    with image:
        if _is_deep_colour(image) and is_tiff(data) and (config.range is not None or not _gives_high_bytes(image)):
            return None
        if _is_deep_colour(image) and config.range is not None:
            raise ValueError(
                "of 16-bit colour Pillow gives the high bytes alone: for data.range store it as TIFF or .npy"
            )
        image.load()  # here: numpy would take an AttributeError of a decoder for an object without pixels
        as_it_is = image.mode.startswith("I;16") or image.mode in ("RGB", "L", "I", "F")
        if not as_it_is and (not many or image.mode in ("P", "PA")):
            image = image.convert("RGB")
        values = np.asarray(image)
        return values if values.ndim == 3 else values[..., None]


def _is_deep_colour(image: Image.Image) -> bool:
    """More than 8 bits per channel in the file; asked before the pixels are loaded."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    return image.mode[0] not in "IF" and (_gives_high_bytes(image) or max(bits, default=0) > 8)


def _gives_high_bytes(image: Image.Image) -> bool:
    """That Pillow reads 16-bit colour and keeps the high byte of each value."""
    return ";16" in str(getattr(image, "tile", ""))


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


def warn_of_unused_bits(where: str, count: int, file: Callable[[int], bytes], config: DataConfig) -> None:
    """Looks at a few of ``count`` files: 12-bit values in 16-bit files would become 16 levels of gray, all but black.

    It also tells of a data.range that none of them needs.

    Args:
        where: what to call them in the warning.
        file: gives the file of an index; one that it cannot give is passed over.
        config: how the images are read.
    """
    sample = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int)).tolist()
    found = [depth for index in sample if (depth := _depth(file, index, config))]
    if config.range is not None:
        if found and {kind for kind, _ in found} == {"bytes"} and config.range != (0, 255):
            log.warning(
                "data.range=%g %g has no effect on %s: 8-bit images stay as they are (%d looked at)",
                *config.range, where, len(found),
            )  # fmt: skip
        return
    peaks = [(kind, peak) for kind, peak in found if kind != "bytes" and peak]
    if not peaks or max(value for _, value in peaks) >= _UNUSED_BELOW or config.bits < 16:
        return
    highest = max(value for _, value in peaks)
    kinds = {kind for kind, _ in peaks}
    remedy = "store them with 8 bits per channel, or as TIFF and set data.range"
    if "16 bits" in kinds:
        remedy = f"set data.bits={max(8, highest.bit_length())}"
    elif "16-bit TIFF" in kinds:
        remedy = f"set data.range=0 {highest}"
    log.warning(
        "16-bit images of %s hold no value over %d of 65535 (%d looked at), so they are nearly black: %s",
        where, highest, len(peaks), remedy,
    )  # fmt: skip


def _depth(file: Callable[[int], bytes], index: int, config: DataConfig) -> tuple[str, int] | None:
    """Of what kind an image's values are, and of those of 16 bits the largest, where Pillow keeps the high byte to the
    next 256. None for an image that cannot be read."""
    try:
        data = file(index)
        if not data.startswith(MAGIC) and (config.channels in (1, 3) or not is_tiff(data)):
            with _open(data, _PLAIN.max_pixels) as image:
                deep = _is_deep_colour(image)
                if deep and config.range is None and _gives_high_bytes(image):
                    kind = "16-bit TIFF" if is_tiff(data) else "16-bit colour"
                    return kind, 256 * int(np.asarray(image).max()) + 255
                if not deep and not image.mode.startswith("I;16"):
                    return "other" if image.mode in ("I", "F") else "bytes", 0
        values = _values(data, config)
        if values.dtype.kind == "u" and values.dtype.itemsize == 2:
            return "16 bits", int(values.max())
        return "bytes" if values.dtype.kind in "bu" and values.dtype.itemsize == 1 else "other", 0
    except Exception:
        return None  # said when it is decoded

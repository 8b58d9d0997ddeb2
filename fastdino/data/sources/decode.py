"""A file becomes an RGB image, or one clear error."""

import stat
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# Formats that Pillow recognises but cannot decode by itself: they need an outside program, or hold no raster.
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


MAX_PIXELS = 178_956_970  # beyond it Pillow takes an image for a decompression bomb


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


def decode(path: Path, name: str, max_pixels: int = MAX_PIXELS, bits: int = 16) -> Image.Image:
    """The image at ``path`` as 8-bit RGB; raises :class:`BadImage`, which calls it ``name``, whatever is wrong.

    As in torchvision's ImageFolder, alpha is dropped, the first frame is taken and the EXIF orientation is ignored, so
    that numbers compare with published ones. Of 16-bit gray the upper 8 of the lower ``bits`` are kept, where Pillow
    would clip all but the darkest 1/256 to white; of 16-bit colour Pillow keeps the high byte. JPEG is decoded at full
    size: Pillow's draft mode is faster but changes pixels.
    """
    try:
        with _open(path, max_pixels) as image:
            if image.mode == "RGB":
                image.load()
                return image
            if image.mode.startswith("I;16"):
                pixels = np.minimum(np.asarray(image) >> (bits - 8), 255)
                return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"Pillow mode {image.mode} has no fixed range; store the image with 8 or 16 bits")
            return image.convert("RGB")
    except Exception as error:  # a decoder raises anything on a damaged file, and Pillow has sixty
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _open(path: Path, max_pixels: int) -> Image.Image:
    """The file's header, before any pixel is decoded. Raises ValueError for an image of more than ``max_pixels``."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file but a pipe or a device")  # which may never answer
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, of the whole process, may not be the lower one
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(path, formats=formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels={max_pixels}")
    return image


def peak_of_16_bit(path: Path) -> tuple[str, int] | None:
    """Kind ("gray" or "colour") of an image with 16 bits per channel and the largest value in it, of colour to the
    next 256; None for all other images, also for those that cannot be read."""
    try:
        with _open(path, MAX_PIXELS) as image:
            if image.mode.startswith("I;16"):
                return "gray", int(np.asarray(image).max())
            if ";16" in str(getattr(image, "tile", "")):
                return "colour", 256 * int(np.asarray(image).max()) + 255
    except Exception:
        pass  # said when it is decoded
    return None

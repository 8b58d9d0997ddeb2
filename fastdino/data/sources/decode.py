"""A file becomes an RGB image, or one clear error."""

import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# Formats that Pillow recognises but cannot decode by itself: they need an outside program, or hold no raster.
_NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# What Pillow's decoders raise on files that are missing, cut off, damaged or huge.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,  # Pillow's own word for a damaged PNG header
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(Exception):
    """An image that could not be read: its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that the error survives pickling
        self.name, self.reason = name, reason

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


def decode(path: Path, name: str) -> Image.Image:
    """The image at ``path`` as 8-bit RGB; raises :class:`BadImage`, which calls it ``name``.

    As in torchvision's ImageFolder, alpha is dropped, the first frame is taken and the EXIF orientation is ignored, so
    that numbers compare with published ones. 16-bit gray keeps its high byte, where Pillow would clip all but the
    darkest 1/256 to white. JPEG is decoded at full size: Pillow's draft mode is faster but changes pixels.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            if image.mode == "RGB":
                image.load()
                return image
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"Pillow mode {image.mode} has no fixed range; store the image with 8 or 16 bits")
            return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from error

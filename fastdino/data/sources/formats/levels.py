"""Values of any type become bytes, the 256 levels that views are made of."""

from functools import lru_cache

import numpy as np

_BLOCK = 1 << 20  # values that are mapped at once: in fp64 they take 8 MB, whatever the image's size


def wrong_channels(found: int, wanted: int) -> ValueError:
    """The error of an image that has others than are asked for."""
    plural = "s" * (found != 1)
    return ValueError(f"it has {found} channel{plural}, and data.channels={wanted}: set it to what all images have")


def to_bytes(values: np.ndarray, bits: int, span: tuple[float, float] | None) -> np.ndarray:
    """``values`` (h, w, ...) as uint8 of the same shape. Bytes stay as they are, booleans become 0 and 255.

    Args:
        values: of booleans, whole numbers or floats, in either order of bytes.
        bits: of 16-bit values the upper 8 of the lower ``bits`` are kept where there is no ``span``.
        span: low and high, see data.range.

    Raises ValueError for values that have no range by themselves when there is no ``span``, and for those that are no
    numbers.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"values of type {values.dtype} are no image")
    is_16_bit = values.dtype.kind == "u" and values.dtype.itemsize == 2
    if span is None:
        if is_16_bit:
            return np.minimum(values >> (bits - 8), 255).astype(np.uint8)
        raise ValueError(f"values of type {values.dtype.name} have no range of their own: set data.range=LOW HIGH")
    if is_16_bit:
        return _table(span)[values]
    return _mapped(values, span)


def _mapped(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """floor(255 (value - low) / (high - low) + 1/2) in fp64, within 0 and 255; 0 for NaN."""
    low, high = span
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        with np.errstate(all="ignore"):  # of NaN and infinities
            level = (values[start : start + rows].astype(np.float64) - low) * (255 / (high - low)) + 0.5
            levels[start : start + rows] = np.fmin(np.fmax(level, 0), 255).astype(np.uint8)  # fmax drops NaN
    return levels


@lru_cache(maxsize=4)
def _table(span: tuple[float, float]) -> np.ndarray:
    """(65536,) levels of all 16-bit values."""
    return _mapped(np.arange(1 << 16), span)

"""Arrays as numpy.save writes them: an image is (h, w), (h, w, c) or (c, h, w).

Format: NEP 1 of NumPy, versions 1 and 2 (3 is for names of fields, which no image has).
"""

import io

import numpy as np
from numpy.lib import format as header

MAGIC = b"\x93NUMPY"


def read_npy(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """The values, (h, w, c), in the memory of ``data``; ``channels`` tells (h, w, c) from (c, h, w).

    Nothing in the file is run and its header is checked before its values are looked at. Raises ValueError for an array
    that is no image, is cut off, or has more than ``max_pixels`` pixels.
    """
    file = io.BytesIO(data)
    version = header.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a .npy file of version {version[0]}.{version[1]}, which holds no plain array")
    read_header = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
    shape, by_columns, dtype = read_header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}, and an image is of numbers")
    axis = _channel_axis(shape, channels)
    height, width = (side for place, side in enumerate(shape) if place != axis)
    if height * width > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
    count, start = height * width * (1 if axis is None else shape[axis]), file.tell()
    if (missing := count * dtype.itemsize - (len(data) - start)) > 0:
        raise ValueError(f"the file is cut off: {missing} bytes of its values are missing")
    values = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if by_columns else "C")
    return values[..., None] if axis is None else np.moveaxis(values, axis, 2)


def _channel_axis(shape: tuple[int, ...], channels: int) -> int | None:
    """Which axis counts channels; None: there is one. Raises ValueError where it cannot be told, or none does.

    An axis of as many as are wanted; else, where colour and gray become one another, one of 1 or 3.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an array of shape {shape}, and an image is (h, w), (h, w, c) or (c, h, w)")
    if len(shape) == 2:
        return None
    for counts in ({channels}, {1, 3} if channels in (1, 3) else set[int]()):
        fit = [axis for axis in (0, 2) if shape[axis] in counts]
        if len(fit) == 2:
            raise ValueError(
                f"an array of shape {shape} may be (h, w, c) or (c, h, w): data.channels={channels} fits both"
            )
        if fit:
            return fit[0]
    raise ValueError(f"an array of shape {shape} has no axis of {channels}, and data.channels={channels}")

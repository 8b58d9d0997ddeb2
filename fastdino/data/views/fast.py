"""Parameters and an image become views, by C: every byte equals the reference's, the interpreter is free meanwhile."""

import os
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.views import reference
from fastdino.data.views.params import Column, crop_boxes

try:
    import fastdino.data.views._fast as _fast
except ImportError as error:
    _REASON = f"it is not built ({error})"
else:
    _REASON = ""

Write = Callable[[np.ndarray, Tensor, dict[str, Tensor]], None]
"""Makes the views of an image that its parameters describe, in place; see :func:`reference.write`."""

SIMD = "FASTDINO_SIMD"
"""Environment variable that names the instruction set to use, for tests and measurements; default: the widest."""

_BUILD = "python setup.py build_ext --inplace builds it, with a C compiler and Python's headers"


def implementation(wanted: Literal["auto", "reference", "fast"], channels: int = 3) -> tuple[Write, str]:
    """What makes the views of images of ``channels`` as data.views asks, and in a few words for the log which it is.

    Raises ConfigError for ``fast`` where it cannot be used, and for an instruction set that this processor lacks.
    """
    reason = why_not()
    if channels != 3 and wanted != "reference":
        reason = f"it makes views of 3 channels, and data.channels={channels}"
        if wanted == "fast":
            raise ConfigError(f"data.views='fast' cannot be used: {reason}. Set data.views=auto or reference")
        return reference.write, f"reference, because fast cannot be used: {reason}"
    if wanted == "fast" and reason:
        raise ConfigError(
            f"data.views='fast' cannot be used: {reason}. {_BUILD}; data.views=auto makes the same pixels without it"
        )
    if wanted == "reference":
        return reference.write, "reference"
    if reason:
        cost = "the pixels are the same, and each worker makes several times fewer images per second"
        return reference.write, f"reference, because fast cannot be used: {reason}. {_BUILD}; without it {cost}"
    level = os.environ.get(SIMD, levels()[-1])
    if level not in levels():
        raise ConfigError(f"{SIMD}={level!r} must be one of {', '.join(levels())}, which this processor has")
    return partial(write, level=levels().index(level)), f"fast, {level}"


def write(image: np.ndarray, params: Tensor, out: dict[str, Tensor], level: int = -1) -> None:
    """As :func:`reference.write`, to the byte; ``level`` indexes the instruction sets, :func:`levels`."""
    views = [view for group in out.values() for view in group.numpy()]
    boxes, turns = crop_boxes(params, (image.shape[1], image.shape[0])), turns_of(params)
    _fast.make_views(image, boxes, params.numpy(), turns, views, level % len(_fast.LEVELS))


def turns_of(params: Tensor) -> np.ndarray:
    """(V, 2) fp64 cosine and sine of each view's rotation, as the reference has them: another library's may differ."""
    return np.array([reference.turn(degrees) for degrees in params[:, Column.ROTATE].tolist()])


def levels() -> tuple[str, ...]:
    """Instruction sets that it can use on this processor, narrow to wide; empty when it cannot be used: why_not()."""
    return () if why_not() else _fast.LEVELS


def why_not() -> str:
    """Why this module cannot be used here; empty when it can."""
    return _REASON or ("" if _digest() == _fast.SOURCES else "it was built from C files other than those beside it")


@cache
def _digest() -> str:
    """Of the C files beside this one, as setup.py takes it: a build of last week's may have other pixels."""
    files = sorted(Path(__file__).parent.glob("fast*.[ch]"))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"

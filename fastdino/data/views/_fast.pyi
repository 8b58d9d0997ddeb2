"""Types of the extension that setup.py builds from fast.c."""

from collections.abc import Sequence

import numpy as np

LEVELS: tuple[str, ...]
"""Instruction sets that this processor has, of those that are built, narrow to wide."""
SOURCES: str
"""Digest of the C files it was built from, as setup.py takes it."""

def make_views(
    pixels: np.ndarray,
    boxes: np.ndarray,
    params: np.ndarray,
    turns: np.ndarray,
    views: Sequence[np.ndarray],
    level: int,
) -> None: ...

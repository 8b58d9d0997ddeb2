"""Figures without a display."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdino.config import ConfigError

SHEET_ROWS = 8  # images on a sheet


def sheet_path(out: Path | None, folder: Path, name: str) -> Path:
    """Where a PNG goes: the file ``out``, or ``name`` in the folder that it is, or without one in ``folder``.

    Raises ConfigError for a file of another ending.
    """
    out = folder if out is None else out.expanduser()
    if os.path.isdir(out):  # unlike Path.is_dir, false whatever the file system answers
        return out / name
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out={str(out)!r} must end in .png: the sheet is a PNG; or name a folder that exists")
    return out


def new_figure(width: float, height: float, dpi: int = 100) -> Any:
    """An empty matplotlib Figure of that many inches on the Agg canvas; ``figure.canvas.print_png(path)`` writes it."""
    with _agg():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _agg() -> Iterator[None]:
    """MPLBACKEND is agg for the first import of matplotlib, which fails when it names a backend that is not installed.

    A notebook's does so in the processes that it starts, when they run in another environment.
    """
    before = os.environ.get("MPLBACKEND")
    if before and "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if before:
            os.environ["MPLBACKEND"] = before

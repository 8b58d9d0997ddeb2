"""Figures without a display."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHEET_ROWS = 8  # images on a sheet


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

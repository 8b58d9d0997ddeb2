"""Figures without a display, and files of them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastdino.eval.features import EvaluationError


def new_figure(width: float, height: float, dpi: int = 100) -> Any:
    """An empty matplotlib Figure of that many inches on the Agg canvas; ``figure.canvas.print_png(file)`` writes it."""
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


@contextmanager
def png_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write a picture to: it is at ``path`` whole when the block ends, and not at all when the block fails.

    Makes the folder. Raises EvaluationError, before the block runs, when nothing can be written there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise EvaluationError(
            f"cannot write {path}: {error.strerror or error}. Name another file with --out"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()

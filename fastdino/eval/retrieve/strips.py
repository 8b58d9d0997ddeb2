"""A picture of what was found: queries and the first images of their rankings, right and wrong ones framed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source
from fastdino.data.views.evaluation import thumbnail_view
from fastdino.eval.pictures import new_figure
from fastdino.eval.retrieve.ranking import JUNK, RIGHT

TOP = 5  # images beside a query
EACH = 8  # queries: so many of the best, and of the worst
SIDE, FRAME, GAP = 72, 4, 6  # pixels of an image, of the frame around it, and between frames
CELL = SIDE + 2 * FRAME + GAP
LABEL, HEADER, DPI = 44, 24, 100  # room at the left of a row for its score, and above all rows
COLOURS = {True: (42, 157, 42), False: (214, 39, 40)}
WHITE = (255, 255, 255)


class Tops(NamedTuple):
    """The first TOP images of each ranking, junk apart."""

    order: Tensor  # (q, TOP) int64, places in the database's rows
    right: Tensor  # (q, TOP) bool


def tops(order: Tensor, ranked: Tensor) -> Tops:
    """Of (q, n) rankings and what their images are: RIGHT, JUNK or WRONG. Fewer than TOP where there are fewer."""
    kept = (ranked == JUNK).to(torch.uint8).sort(dim=1, stable=True).indices[:, :TOP]
    return Tops(order.gather(1, kept), ranked.gather(1, kept) == RIGHT)


def extremes(scores: np.ndarray) -> tuple[list[int], list[int]]:
    """Of (q,) scores: places of the best queries, best first, and of the worst, worst first; NaN is neither, and no
    query is both."""
    order = np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())].tolist()
    each = min(EACH, (len(order) + 1) // 2)
    return order[:each], order[each:][::-1][:EACH]


def draw_strips(
    path: Path, scores: np.ndarray, found: Tops, queries: list[tuple[Source, int]], database: Source
) -> None:
    """Writes a PNG: a row per query, the best ones at the left and the worst at the right.

    Args:
        path: where to.
        scores: (q,) in [0, 1].
        found: of each query; places are those of ``database``.
        queries: source and place of each.
        database: what was searched.
    """
    sides, columns = extremes(scores), 1 + found.order.shape[1]
    width = columns * CELL + LABEL
    canvas = np.full((HEADER + max(map(len, sides)) * CELL, 2 * width, 3), 255, np.uint8)
    figure = new_figure(canvas.shape[1] / DPI, canvas.shape[0] / DPI, DPI)
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    for left, side, title in zip((0, width), sides, ("best queries", "worst queries"), strict=True):
        ax.text(left + LABEL + FRAME, HEADER - 6, title, fontsize=10)
        for row, query in enumerate(side):
            top = HEADER + row * CELL
            ax.text(left + LABEL - 4, top + CELL / 2, f"{100 * scores[query]:.0f} %", fontsize=7, ha="right")
            _place(canvas, top, left + LABEL, *queries[query], WHITE)
            for column, (place, right) in enumerate(zip(found.order[query], found.right[query], strict=True), 1):
                _place(canvas, top, left + LABEL + column * CELL, database, int(place), COLOURS[bool(right)])
    ax.imshow(canvas, interpolation="nearest", aspect="auto")
    ax.set_axis_off()
    figure.canvas.print_png(path)


def _place(canvas: np.ndarray, top: int, left: int, source: Source, place: int, colour: tuple[int, int, int]) -> None:
    """An image, SIDE pixels at its longer side, in the middle of a frame."""
    cell = canvas[top + GAP : top + CELL, left + GAP : left + CELL]
    cell[:] = colour
    cell[FRAME:-FRAME, FRAME:-FRAME] = WHITE
    try:
        image = thumbnail_view(source.read(place)[0], SIDE)
    except BadImage:  # it could be read a moment ago
        return
    times = max(1, SIDE // max(image.shape[:2]))
    image = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    height, width = image.shape[:2]
    y, x = (FRAME + (SIDE - side) // 2 for side in (height, width))
    cell[y : y + height, x : x + width] = image

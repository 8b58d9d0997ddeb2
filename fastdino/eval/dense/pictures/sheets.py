"""Sheets of pictures: cells in rows, each at the shape of its image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastdino.eval.pictures import new_figure

GAP = 0.08  # inches between cells
TEXT = 0.22  # inches of a line of text


class Cell(NamedTuple):
    """A picture of a sheet."""

    pixels: np.ndarray
    """(h, w, 3) uint8, or in [0, 1]: of any size, for it is drawn at that of the image."""
    size: tuple[int, int]
    """Width and height of the image."""
    title: str = ""
    dot: tuple[float, float] | None = None
    """Where a red dot is drawn, in pixels of the image."""
    outline: np.ndarray | None = None
    """(height, width) bool, whose border is drawn in cyan."""
    smooth: bool = False
    """Enlarged bilinearly, not by the nearest."""


def in_colour(pixels: np.ndarray) -> np.ndarray:
    """uint8 (h, w, C) -> (h, w, 3): the first three channels as red, green, blue; of one or two the first as gray."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)


def heat(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """(h, w) -> (h, w, 3) fp64 in [0, 1], black over red to yellow from ``low`` to ``high``; default: its extremes."""
    new_figure(1, 1)  # matplotlib, whatever display there is
    from matplotlib import colormaps

    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    return colormaps["inferno"](np.clip((values - low) / max(high - low, 1e-12), 0, 1))[..., :3]


def over(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) under the :func:`heat` of (rows, columns), bilinear, the more of it the higher the value."""
    scaled = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    enlarged = torch.from_numpy(scaled)[None, None].float()
    strength = F.interpolate(enlarged, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    alpha = 0.8 * strength[..., None]
    return ((1 - alpha) * pixels + alpha * 255 * heat(strength, 0, 1)).round().astype(np.uint8)


def class_colours(num_classes: int, first_is_nothing: bool) -> np.ndarray:
    """(num_classes + 1, 3) uint8, far apart for neighbours; the last, for VOID, is white.

    With ``first_is_nothing`` class 0 is black, as a background is.
    """
    import colorsys

    turns = (0.618034 * np.arange(num_classes)) % 1  # the golden ratio: any few after one another lie far apart
    tones = [(0.75, 0.95), (0.55, 0.75), (0.9, 0.6)]
    colours = [colorsys.hsv_to_rgb(hue, *tones[i % 3]) for i, hue in enumerate(turns.tolist())]
    if first_is_nothing:
        colours[0] = (0, 0, 0)
    return (np.array([*colours, (1, 1, 1)]) * 255).round().astype(np.uint8)


def draw_cells(
    path: Path, rows: Sequence[Sequence[Cell]], *, inches: float = 1.6, legend: Sequence[tuple[str, np.ndarray]] = ()
) -> None:
    """Writes a PNG of rows of cells.

    Args:
        path: where to.
        rows: from top to bottom, and from left to right.
        inches: the longer side of the largest cell.
        legend: names and colours, (3,) uint8, below the cells.
    """
    columns = max(len(row) for row in rows)
    ratios = [[_box(cell.size, inches) for cell in row] for row in rows]
    widths = [max(row[j][0] for row in ratios if j < len(row)) for j in range(columns)]
    heights = [max(height for _, height in row) for row in ratios]
    titled = [TEXT * max(1 + cell.title.count("\n") if cell.title else 0 for cell in row) for row in rows]
    width = sum(widths) + GAP * (columns + 1)
    across = max(1, int(width / 1.5))
    below = TEXT * -(-len(legend) // across) + (GAP if legend else 0)
    height = sum(heights) + sum(titled) + GAP * (len(rows) + 1) + below
    figure = new_figure(width, height, dpi=110)
    figure.set_layout_engine("none")
    top = height - GAP
    for row, cell_height, text in zip(rows, heights, titled, strict=True):
        left, bottom = GAP, top - text - cell_height
        for cell, cell_width in zip(row, widths, strict=False):
            place = (left / width, bottom / height, cell_width / width, cell_height / height)
            _draw(figure.add_axes(place), cell)
            left += cell_width + GAP
        top = bottom - GAP
    for i, (name, colour) in enumerate(legend):
        x, y = GAP + (i % across) * (width - GAP) / across, below - TEXT * (i // across + 1)
        square = figure.add_axes((x / width, (y + 0.05) / height, 0.14 / width, 0.14 / height))
        square.set_facecolor(colour / 255)
        square.set(xticks=[], yticks=[])
        figure.text((x + 0.2) / width, (y + 0.12) / height, name, fontsize=7, va="center")
    figure.canvas.print_png(path)


def draw_pairs(path: Path, pairs: Sequence[tuple[Cell, Cell]], *, across: int = 4, inches: float = 2.2) -> None:
    """Writes a PNG of pairs side by side, the second of each below the first."""
    rows: list[list[Cell]] = []
    for start in range(0, len(pairs), across):
        upper, lower = zip(*pairs[start : start + across], strict=True)
        rows += [[*upper], [*lower]]
    draw_cells(path, rows, inches=inches)


def _box(size: tuple[int, int], inches: float) -> tuple[float, float]:
    longest = max(size)
    return inches * size[0] / longest, inches * size[1] / longest


def _draw(axes: Any, cell: Cell) -> None:
    width, height = cell.size
    extent = (0, width, height, 0)
    how = "bilinear" if cell.smooth else "nearest"
    if max(cell.pixels.shape) > 200:
        how = "antialiased"
    axes.imshow(cell.pixels, extent=extent, interpolation=how)
    if cell.outline is not None:
        axes.contour(cell.outline, levels=[0.5], colors="cyan", linewidths=0.8, extent=extent, origin="upper")
    if cell.dot is not None:
        axes.plot(*cell.dot, "o", color="red", markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title(cell.title, fontsize=8, pad=3)

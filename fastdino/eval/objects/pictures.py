"""What was found, drawn over the images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdino.data.benchmarks.davis import palette
from fastdino.eval.dense.pictures.sheets import in_colour
from fastdino.eval.pictures import new_figure

COLUMNS = 4
FOUND, TRUE = "#ff5d3b", "#41e0ff"  # of boxes


class Discovered(NamedTuple):
    """An image with the object that was found in it."""

    image: np.ndarray  # uint8 (h, w, channels)
    mask: np.ndarray  # (h, w) bool
    box: np.ndarray  # (4,)
    true: np.ndarray  # (m, 4)
    title: str


class Followed(NamedTuple):
    """Frames of a video with what was found in them."""

    title: str
    frames: list[np.ndarray]  # uint8 (h, w, channels)
    masks: list[np.ndarray]  # uint8 (h, w) of each
    names: list[str]


def draw_discovered(path: Path, shown: Sequence[Discovered]) -> None:
    """Writes a PNG of images, dark but for the patches that were found, with the box around these and the true ones."""
    rows = -(-len(shown) // COLUMNS)
    height = max(x.image.shape[0] / x.image.shape[1] for x in shown)
    figure = new_figure(2.2 * COLUMNS, (2.2 * height + 0.25) * rows + 0.25, dpi=110)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, one in zip(axes, shown, strict=False):
        image = in_colour(one.image)
        ax.imshow(np.where(one.mask[..., None], image, image // 3), interpolation="nearest")
        for box in one.true:
            _rectangle(ax, box, TRUE, "true")
        _rectangle(ax, one.box, FOUND, "found")
        ax.set_title(one.title, fontsize=8)
    handles = {patch.get_label(): patch for ax in figure.axes for patch in ax.patches}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.canvas.print_png(path)


def draw_followed(path: Path, shown: Sequence[Followed]) -> None:
    """Writes a PNG with a row per video: frames with the objects' masks over them, each object in its own colour."""
    columns = max(len(video.frames) for video in shown)
    height = max(video.frames[0].shape[0] / video.frames[0].shape[1] for video in shown)
    figure = new_figure(2 * columns, (2 * height + 0.45) * len(shown), dpi=110)
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, video in zip(grid, shown, strict=True):
        for ax in row:
            ax.set_axis_off()
        for ax, frame, mask, name in zip(row, video.frames, video.masks, video.names, strict=False):
            ax.imshow(_over(in_colour(frame), mask > 0, palette()[mask]), interpolation="nearest")
            ax.set_title(name, fontsize=8)
        row[0].set_title(f"{video.title}: {video.names[0]}", fontsize=8)
    figure.canvas.print_png(path)


def _over(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Half the image and half the colour where the mask is."""
    return np.where(mask[..., None], (image.astype(int) + colour) // 2, image).astype(np.uint8)


def _rectangle(ax: Any, box: np.ndarray, colour: str, label: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box - 0.5  # pixels are drawn around their places
    patch = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, label=label, linewidth=1.6)
    patch.set(linestyle="--" if label == "true" else "-", clip_on=False)
    ax.add_patch(patch)

"""How well a mask covers an object (J) and how well it follows its outline (F), in an image and over a video."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE = 0.008  # of the image's diagonal: how far apart two outlines may be
BETA = 0.3  # how much precision counts against recall in the F of saliency
QUARTERS = 4  # of a video, whose first and last the decay compares


class Saliency(NamedTuple):
    """How well a mask tells the objects of an image from the rest, shares of 1."""

    iou: float
    accuracy: float
    """Of pixels."""
    f: float
    """(1 + b) P R / (b P + R) of precision P and recall R, with b = 0.3."""


class Course(NamedTuple):
    """A measure over the frames of a video, as the DAVIS challenge sums it up; shares of 1."""

    mean: float
    recall: float
    """Share of the frames where it is above a half."""
    decay: float
    """Mean of the first quarter of the frames less that of the last."""


def region(found: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two (h, w) bool masks; 1 when both are empty."""
    union = np.count_nonzero(found | true)
    return float(np.count_nonzero(found & true) / union) if union else 1.0


def saliency(found: np.ndarray, true: np.ndarray) -> Saliency:
    """Of two bool masks of one shape. Source: metric.py of TokenCut, whose maximum over thresholds is
    that of one mask."""
    right, f = np.count_nonzero(found & true), 0.0
    if right:
        precision, recall = right / np.count_nonzero(found), right / np.count_nonzero(true)
        f = (1 + BETA) * precision * recall / (BETA * precision + recall)
    return Saliency(region(found, true), float((found == true).mean()), f)


def outline_f(found: np.ndarray, true: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the outlines of two (h, w) bool masks.

    A pixel of one outline is right when the other is at most ceil(0.008 x diagonal) pixels away. Two empty masks score
    1. An outline that only one has scores 0.

    Source: f_measure of davis2017-evaluation, which dilates by a disk of that radius.
    """
    ours, theirs = outline(found), outline(true)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    radius = np.ceil(TOLERANCE * np.hypot(*found.shape))
    rows, columns = (np.flatnonzero((ours | theirs).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # distances beyond it are not asked for
    ours, theirs = ours[box], theirs[box]
    precision = _near(theirs, radius)[ours].mean()
    recall = _near(ours, radius)[theirs].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def outline(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool -> the same: the pixels that differ from that to the right, below, or both; none beyond the edges."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def course(values: Sequence[float]) -> Course:
    """Of a measure in each frame, at least one. Source: db_statistics of davis2017-evaluation."""
    x = np.asarray(values, np.float64)
    ends = np.floor(np.linspace(1, len(x), QUARTERS + 1) + 0.5).astype(int) - 1  # a frame on a border is of both sides
    first, last = x[ends[0] : ends[1] + 1], x[ends[-2] : ends[-1] + 1]
    return Course(float(x.mean()), float((x > 0.5).mean()), float(first.mean() - last.mean()))


def _near(line: np.ndarray, radius: float) -> np.ndarray:
    """Where ``line``, which is not empty, is at most ``radius`` pixels away: its dilation by a disk."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(~line) <= radius

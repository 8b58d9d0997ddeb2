"""Mean intersection over union, by one confusion matrix of all pixels."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastdino.data.benchmarks.masks import VOID
from fastdino.eval.features import EvaluationError
from fastdino.eval.intervals import Shares


def confusion(truth: Tensor, told: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: how many pixels of each class are told to be of each. Pixels that are VOID are not counted.

    Args:
        truth: (h, w) classes, or VOID.
        told: (h, w) classes.
        num_classes: C.
    """
    judged = truth != VOID
    pairs = truth[judged].long() * num_classes + told[judged].long()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def overlaps(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Of (C, C) counts by true and by told class: pixels in the intersection and in the union of each class, (C,)."""
    both = confusion.diagonal()
    return both, confusion.sum(0) + confusion.sum(1) - both


def add_up(images: Iterable[tuple[str, Tensor]]) -> tuple[Tensor, Shares]:
    """Names and confusions of images -> the confusion of all pixels, (C, C), and what each image adds to the mean
    over classes of intersection over union, of those classes that occur. An image without a pixel adds nothing.

    Raises EvaluationError where there is none at all.
    """
    total = torch.zeros((), dtype=torch.int64)
    names: list[str] = []
    rows: list[Tensor] = []
    for name, found in images:
        if not found.any():
            continue
        both, union = overlaps(found)
        there = union.nonzero().flatten()
        rows.append(torch.stack([torch.full_like(there, len(names)), there, both[there], union[there]]))
        names.append(name)
        total = total + found
    if not rows:
        raise EvaluationError("the masks of the images that are judged are of no class at all")
    item, group, part, whole = torch.cat(rows, dim=1).numpy()
    return total, Shares(names, item, group, part.astype(np.float64), whole.astype(np.float64))

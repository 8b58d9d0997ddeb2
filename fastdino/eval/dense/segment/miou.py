"""Mean intersection over union, by one confusion matrix of all pixels."""

from torch import Tensor

from fastdino.data.benchmarks.masks import VOID


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


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that occur, from (C, C) counts by true and by given class."""
    both, union = overlaps(confusion)
    return (both.double() / union)[union > 0].mean().item()

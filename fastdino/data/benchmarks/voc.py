"""PASCAL VOC's folders: which images are segmented, by the lists that come with them."""

import os
from pathlib import Path

from fastdino.config import ConfigError

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
BELOW = (".", "VOC2012", "VOCdevkit/VOC2012", "VOC2007", "VOCdevkit/VOC2007")
"""Folders below that of --data where the data may lie."""


def find_voc(root: Path) -> Path | None:
    """The folder at ``root``, or one of VOC's below it, that holds JPEGImages/ and SegmentationClass/; else None."""
    folders = (root / below for below in BELOW)
    return next((x for x in folders if all(map(os.path.isdir, (x / "JPEGImages", x / "SegmentationClass")))), None)


def voc_pairs(folder: Path, split: str, masks: str) -> list[tuple[bytes, bytes]]:
    """Image and mask below ``folder`` of each line of ImageSets/Segmentation/``split``.txt.

    Args:
        folder: what :func:`find_voc` found.
        split: "train", "val" or another list that is there.
        masks: "SegmentationClass", or "SegmentationObject" whose values count the objects of an image.

    Raises ConfigError where list or masks are missing, or the list names no image.
    """
    path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder} has the folders of VOC, and its list {path} cannot be read: {error}") from error
    if not names:
        raise ConfigError(f"{path} names no image")
    if not os.path.isdir(folder / masks):
        raise ConfigError(f"{folder} holds no {masks}/, where VOC has its masks")
    return [(f"JPEGImages/{name}.jpg".encode(), f"{masks}/{name}.png".encode()) for name in names]

"""ADE20K's folders: scenes of which every pixel is of one of 150 classes."""

import os
from pathlib import Path

from fastdino.config import ConfigError

NUM_CLASSES = 150
_NAMES = "objectInfo150.txt"  # a table of the classes, whose last column is a name


def find_ade20k(root: Path) -> Path | None:
    """The folder at ``root``, or ADEChallengeData2016 below it, with images/training/ and annotations/training/."""
    folders = (root, root / "ADEChallengeData2016")
    return next((x for x in folders if all(os.path.isdir(x / y / "training") for y in ("images", "annotations"))), None)


def ade20k_pairs(folder: Path, split: str) -> list[tuple[bytes, bytes]]:
    """Image and mask below ``folder`` of its split "training" or "validation". Raises ConfigError where it is empty."""
    names = sorted(path.stem for path in (folder / "images" / split).glob("*.jpg"))
    if not names:
        raise ConfigError(f"{folder} has the folders of ADE20K, and no .jpg in images/{split}/")
    return [(f"images/{split}/{name}.jpg".encode(), f"annotations/{split}/{name}.png".encode()) for name in names]


def ade20k_classes(folder: Path) -> list[str]:
    """Their names by objectInfo150.txt, which comes with the images; without it, or in another form, 1 to 150."""
    try:
        lines = (folder / _NAMES).read_text().splitlines()[1:]
    except (OSError, UnicodeDecodeError):
        lines = []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    return names if len(names) == NUM_CLASSES and all(names) else [str(i) for i in range(1, NUM_CLASSES + 1)]

"""Copydays (Douze et al. 2009): altered copies of 157 photographs, each of which is searched among the originals."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.folder import FolderSource
from fastdino.data.sources.source import Source

BLOCKS = (
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
ORIGINALS = "original"
SIZES = {ORIGINALS: 157, "strong": 229}
"""Images of the blocks of the real data set; the others have as many as there are originals."""
PREFIX = 4  # characters of a name that an original and its copies share


@dataclass(frozen=True)
class CopySets:
    """Originals, and blocks of copies of them."""

    name: str
    originals: Source
    blocks: dict[str, Source]
    """Copies by what was done to them, the hardest first."""
    original: dict[str, np.ndarray]
    """Of each block, int64: which of the originals an image is a copy of."""


def is_copydays(root: str | Path) -> bool:
    """Whether ``root`` holds originals and a block of copies: its folders are not classes."""
    folder = Path(root).expanduser()
    return (folder / ORIGINALS).is_dir() and any((folder / block).is_dir() for block in BLOCKS)


def open_copydays(root: str | Path, config: DataConfig) -> CopySets:
    """The layout original/, strong/, jpegqual/N/, crops/N/; blocks may be missing, but for the originals.

    Raises ConfigError for a folder without originals or copies, and for names that do not match: a copy and its
    original have the first four characters in common.
    """
    folder = Path(root).expanduser()
    if not is_copydays(folder):
        try:
            found = ", ".join(sorted(os.listdir(folder))[:6]) or "nothing"
        except (OSError, ValueError) as error:
            found = str(error)
        raise ConfigError(
            f"{root} is not laid out as Copydays: found {found}; looked for original/ and one or more of strong/, "
            "jpegqual/N/, crops/N/. Copies of your own images are made with --make-copies FOLDER"
        )
    originals = FolderSource(folder / ORIGINALS, config)
    place: dict[str, int] = {}
    for i in range(len(originals)):
        if (prefix := _prefix(originals, i)) in place:
            raise ConfigError(
                f"{folder / ORIGINALS}: {originals.name(place[prefix])} and {originals.name(i)} begin with the same "
                f"{PREFIX} characters, which tell what a copy is of: rename one, and its copies"
            )
        place[prefix] = i
    blocks = {block: FolderSource(folder / block, config) for block in BLOCKS if (folder / block).is_dir()}
    return CopySets(
        "copydays", originals, dict(blocks), {name: _of(block, place, name) for name, block in blocks.items()}
    )


def _prefix(source: Source, index: int) -> str:
    return os.path.basename(source.name(index))[:PREFIX]


def _of(block: Source, place: dict[str, int], name: str) -> np.ndarray:
    prefixes = [_prefix(block, i) for i in range(len(block))]
    if lost := [i for i, prefix in enumerate(prefixes) if prefix not in place]:
        raise ConfigError(
            f"{name}/{block.name(lost[0])} is a copy of no image in {ORIGINALS}/ ({len(lost)} such): names match by "
            f"their first {PREFIX} characters"
        )
    return np.array([place[prefix] for prefix in prefixes], np.int64)

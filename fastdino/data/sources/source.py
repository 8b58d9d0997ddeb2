"""Where images come from: a folder, or rendered objects. An index becomes an RGB image and a label."""

from pathlib import Path
from typing import Protocol

from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.folder import FolderSource, split_folders
from fastdino.data.sources.shapes import ShapesSource


class Source(Protocol):
    """Images by index. Reading an index gives the same image in every process."""

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty when there are none."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and class (-1: none). Raises BadImage when the image cannot be read."""

    def label(self, index: int) -> int:
        """The class alone (-1: none), at no cost."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""

    def fingerprint(self) -> str:
        """Short text that is equal for equal images in equal order, wherever they lie; made without reading them."""


def open_source(root: str, config: DataConfig) -> Source:
    """What to train on: the word ``shapes``, or a folder of images (``./shapes`` for a folder of that name).

    Raises ConfigError for a folder that FolderSource refuses, and for one that holds a data set's training images
    beside its others: they would be trained on as well.
    """
    if not root:
        raise ConfigError("data.root is empty: point it at a folder of images, or use --data.root shapes")
    if root == "shapes":
        return ShapesSource(config.num_images, config.image_size)
    parts = split_folders(root)
    if len(parts) > 1:
        raise ConfigError(
            f"data.root={root!r} holds {' and '.join(f'{path.name}/' for path in parts.values())}: give "
            f"{parts.get('train', next(iter(parts.values())))}. To train on all of them, give a folder of links to "
            "them under other names"
        )
    return open_folder(root, config)


def open_folder(root: str | Path, config: DataConfig) -> FolderSource:
    """Every image below ``root``, read as ``config`` says."""
    return FolderSource(root, max_pixels=config.max_pixels, bits=config.bits)

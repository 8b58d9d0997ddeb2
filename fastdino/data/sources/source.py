"""Where images come from: a folder, or rendered objects. An index becomes an RGB image and a label."""

from typing import Protocol

from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.folder import FolderSource
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
        """Equal for sources of the same images in the same order, wherever they are; no image is read for it."""


def open_source(root: str, config: DataConfig) -> Source:
    """The word ``shapes``, or a folder of images (``./shapes`` for a folder of that name)."""
    if not root:
        raise ConfigError("data.root is empty: point it at a folder of images, or use --data.root shapes")
    if root == "shapes":
        return ShapesSource(config.num_images, config.image_size)
    return FolderSource(root)

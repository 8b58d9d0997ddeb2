"""What a source of images is: an index becomes an image and a label."""

from typing import Protocol

import numpy as np


class Source(Protocol):
    """Images by index. Reading an index gives the same image in every process."""

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty when there are none."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Bytes (height, width, channels), by default RGB, and class (-1: none).

        Raises BadImage when the image cannot be read.
        """

    def encoded(self, index: int) -> bytes:
        """The image as it is stored, or as a PNG where it is rendered. Raises BadImage when it is not there."""

    def label(self, index: int) -> int:
        """The class alone (-1: none), at no cost."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""

    def fingerprint(self) -> str:
        """Short text that is equal for equal images in equal order, wherever they lie; made without reading them."""

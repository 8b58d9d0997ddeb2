"""What a source of images is: an index becomes an image and a label."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

Room = Callable[[int, int], np.ndarray | None]
"""Height and width become memory for an RGB image, uint8 (height, width, 3), or None where there is too little."""


class Source(Protocol):
    """Images by index. Reading an index gives the same image in every process."""

    @property
    def labels(self) -> list[str]:
        """Names of the classes; empty when there are none."""

    def __len__(self) -> int: ...

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Bytes (height, width, channels), by default RGB, and class (-1: none).

        ``room`` gives memory that the image may be decoded into, or not; from a failure it may hold anything.
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

    def stamp(self) -> str:
        """Like the fingerprint, and another one where a file has another size or was written at another time."""

"""Sources that are made of others."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fastdino.data.sources.source import Source


class Subset:
    """Some images of a source, under its labels."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.labels = source, indices, source.labels

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and label, as in the source."""
        return self.source.read(self.indices[index])

    def encoded(self, index: int) -> bytes:
        """As in the source."""
        return self.source.encoded(self.indices[index])

    def label(self, index: int) -> int:
        """As in the source."""
        return self.source.label(self.indices[index])

    def name(self, index: int) -> str:
        """Its name in the source."""
        return self.source.name(self.indices[index])

    def fingerprint(self) -> str:
        """Of the source, and of which images of it."""
        indices = np.asarray(self.indices, np.int64).tobytes()
        return hashlib.sha256(self.source.fingerprint().encode() + indices).hexdigest()[:16]

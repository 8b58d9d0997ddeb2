"""Sources that are made of others."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fastdino.data.draws import Purpose, random_bits, uniform
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Room, Source


class Subset:
    """Some images of a source, under its labels."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices, self.labels = source, indices, source.labels

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Image and label, as in the source."""
        return self.source.read(self.indices[index], room)

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
        return self._of(self.source.fingerprint())

    def stamp(self) -> str:
        """Likewise."""
        return self._of(self.source.stamp())

    def _of(self, source: str) -> str:
        indices = np.asarray(self.indices, np.int64).tobytes()
        return hashlib.sha256(source.encode() + indices).hexdigest()[:16]


class Mixture:
    """Several sources, each a share of the images that are seen.

    As a source it is all of them, one after the other. An epoch is as many images as they have together: which source
    comes at a place is drawn with the weights, and each source goes through its own images in a random order, again
    and again where its share asks for more than it has. Index ``i`` and ``i + len`` are the same image, so that the
    views of an image that comes twice in an epoch differ.

    Args:
        sources: by the names that messages call them.
        weights: positive; only their ratios count.
    """

    def __init__(self, sources: dict[str, Source], weights: Sequence[float]) -> None:
        self._names, self._sources = list(sources), list(sources.values())
        self._weights = np.array(weights, np.float64) / sum(weights)
        self._ends = np.cumsum([len(source) for source in self._sources])
        every = [source.labels for source in self._sources]
        self.labels = every[0] if all(labels == every[0] for labels in every) else sorted(set().union(*every))
        place = {label: i for i, label in enumerate(self.labels)}
        self._labels = [[*(place[label] for label in labels), -1] for labels in every]  # of none: the last

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(len,) int64: the images of an epoch in their order, a pure function of (seed, epoch)."""
        drawn = uniform(Purpose.MIXTURE, seed, epoch, 0, len(self))
        chosen = np.searchsorted(np.cumsum(self._weights)[:-1], drawn, side="right")
        order = np.empty(len(self), np.int64)
        for number, source in enumerate(self._sources):
            places, start = np.flatnonzero(chosen == number), int(self._ends[number]) - len(source)
            for turn, first in enumerate(range(0, len(places), len(source))):
                bits = random_bits(Purpose.MIXTURE, seed, epoch, 1 + turn * len(self._sources) + number, len(source))
                some = places[first : first + len(source)]
                order[some] = turn * len(self) + start + np.argsort(bits, kind="stable")[: len(some)]
        return order

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Image and label, as in its source; the label counts the labels of all."""
        number, place = self._place(index)
        with self._named(index):
            image, label = self._sources[number].read(place, room)
        return image, self._labels[number][label]

    def encoded(self, index: int) -> bytes:
        """As in its source."""
        number, place = self._place(index)
        with self._named(index):
            return self._sources[number].encoded(place)

    def label(self, index: int) -> int:
        """The label alone."""
        number, place = self._place(index)
        return self._labels[number][self._sources[number].label(place)]

    def name(self, index: int) -> str:
        """The source's name and the image's in it."""
        number, place = self._place(index)
        return f"{self._names[number]}: {self._sources[number].name(place)}"

    def fingerprint(self) -> str:
        """Of the sources in order, and their weights."""
        return self._of(source.fingerprint() for source in self._sources)

    def stamp(self) -> str:
        """Likewise."""
        return self._of(source.stamp() for source in self._sources)

    def _of(self, parts: Iterable[str]) -> str:
        whole = "".join(part + " " for part in parts)
        return hashlib.sha256(whole.encode() + self._weights.tobytes()).hexdigest()[:16]

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """A bad image is called as :meth:`name` calls it."""
        try:
            yield
        except BadImage as error:
            raise BadImage(self.name(index), error.reason) from error

    def _place(self, index: int) -> tuple[int, int]:
        """Which source an image is of, and its index there."""
        inside = index % len(self)
        number = int(np.searchsorted(self._ends, inside, side="right"))
        return number, inside - (int(self._ends[number - 1]) if number else 0)

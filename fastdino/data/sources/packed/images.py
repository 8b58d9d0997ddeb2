"""Images that lie in larger files, read in place: any of them at the cost of one read."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.decode import BadImage, decode, warn_of_unused_bits
from fastdino.data.sources.names import Classes, Names
from fastdino.data.sources.packed.index import FLAWS, Index, Stamp, indexes
from fastdino.data.sources.source import Room


@dataclass(frozen=True)
class Archive:
    """A file that holds many images."""

    name: str
    """What to call it in a message, and in names of images."""
    path: Path
    """Where it lies on this machine."""
    restore: Callable[[], None] | None = None
    """Makes a file of the cache again that was removed to make room; then it has the same bytes and times."""

    def read(self, offset: int, size: int, stamp: Stamp) -> bytes:
        """``size`` bytes from ``offset``. Raises OSError, also for a file that is not the one that ``stamp`` knew.

        The file is opened for each read, so there is nothing to share between threads and processes. What a read costs
        beside decoding an image is little, and the bytes of a file that was replaced are never taken for an image.
        """
        file = os.open(self.here(), os.O_RDONLY)
        try:
            found = Stamp.of(os.fstat(file))
            if found != stamp:
                raise OSError("the file has changed since it was indexed: start the run again to index what is there")
            if offset + size > found.size:
                raise OSError(f"the file is cut off: it ends {offset + size - found.size} bytes before the image does")
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def here(self) -> Path:
        """The path, of a file that is there if it can be. Raises ConfigError when it cannot be made again."""
        if self.restore and not self.path.exists():
            self.restore()
        return self.path


class PackedSource:
    """Every image of some archives: an archive's own in their order, archive by archive.

    Args:
        archives: in the order of their images.
        make: the index of one archive, by its path.
        kind: what ``make`` does, and with which settings.
        config: how images are decoded; where indexes are kept.
        classes: names of the classes, if the data set states them; else they are the words beside the images.

    Raises ConfigError when there is no image, and whatever ``make`` raises.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        make: Callable[[Path], Index],
        kind: str,
        config: DataConfig,
        classes: list[str] | None = None,
    ) -> None:
        where = archives[0].name if len(archives) == 1 else f"{archives[0].name} to {archives[-1].name}"
        found = _indexes(archives, make, kind, config)
        self._archives, self._config = list(archives), config
        self._stamps, indexes = [stamp for stamp, _ in found], [index for _, index in found]
        self._names: list[Names] = [index.names for index in indexes]
        self._ends = np.cumsum([len(index) for index in indexes])
        if not len(self):
            raise ConfigError(f"{where}: no image in {len(archives)} file{'s' * (len(archives) != 1)}")
        self._offset = np.concatenate([index.offset for index in indexes])
        self._size = np.concatenate([index.size for index in indexes])
        words = Classes((word for index in indexes for word in index.words), classes, where)
        self.labels = words.labels
        self._labels = np.concatenate([words.of(index.words)[index.word] for index in indexes])
        warn_of_unused_bits(where, len(self), self.encoded, config)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Bytes (height, width, channels) and label (-1: none is stated); raises BadImage."""
        return decode(self.encoded(index), self.name(index), self._config, room), self.label(index)

    def encoded(self, index: int) -> bytes:
        """The image's bytes in its archive; raises BadImage."""
        archive, _ = self._place(index)
        offset, size = int(self._offset[index]), int(self._size[index])
        if size < 0:
            raise BadImage(self.name(index), FLAWS[size])
        try:
            return self._archives[archive].read(offset, size, self._stamps[archive])
        except (OSError, ConfigError) as error:
            raise BadImage(self.name(index), f"{type(error).__name__}: {error}") from error

    def label(self, index: int) -> int:
        """The label alone, without reading the image."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """The archive's name and the image's in it, or its number."""
        archive, place = self._place(index)
        names = self._names[archive]
        inside = names[place].decode("utf-8", "backslashreplace") if len(names) else f"row {place}"
        return f"{self._archives[archive].name}: {inside}"

    def fingerprint(self) -> str:
        """Of the images' names and sizes in order: archives that were moved keep it."""
        return self._digest(self._size)

    def stamp(self) -> str:
        """Of these, and of the archives' sizes and times."""
        return self._digest(self._size, np.array(self._stamps, np.int64))

    def _digest(self, *more: np.ndarray) -> str:
        return Names(bytes(names.digest(), "ascii") for names in self._names).digest(*more)

    def _place(self, index: int) -> tuple[int, int]:
        """The archive of an image, and its place among the images there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        archive = int(np.searchsorted(self._ends, index, side="right"))
        return archive, index - (int(self._ends[archive - 1]) if archive else 0)


def _indexes(
    archives: Sequence[Archive], make: Callable[[Path], Index], kind: str, config: DataConfig
) -> list[tuple[Stamp, Index]]:
    try:
        return indexes([archive.path for archive in archives], make, kind, config.cache)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or archives[0].name}: {error.strerror or error}") from error

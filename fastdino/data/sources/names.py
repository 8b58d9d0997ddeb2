"""What images and classes are called."""

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from fastdino.config import ConfigError


class Names:
    """Many names in one block of bytes.

    A list of a million strings would be copied into every worker, page by page, as reference counts are written.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.block = b"".join(names)
        self.ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))

    @classmethod
    def of(cls, block: bytes, ends: np.ndarray) -> "Names":
        """The names that lie in ``block``, each up to its place of ``ends`` (n,) int64."""
        names = cls([])
        names.block, names.ends = block, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.block[start : self.ends[index]]

    def digest(self, *more: np.ndarray) -> str:
        """16 characters that are equal for equal names, and equal arrays, in equal order."""
        parts = self.block, self.ends.tobytes(), *(array.tobytes() for array in more)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Classes:
    """Classes of images, told by the words that stand beside them, such as ``cat`` or ``7``.

    With ``names`` the words are numbers that count these. Without, they are the different words themselves: by value
    where all are whole numbers, else by name. Numbers below 0 stand for no class.

    Args:
        words: the different words, in any order.
        names: of the classes, where a data set states them.
        where: what to call the data set in a message.

    Raises ConfigError for a word that does not count ``names``.
    """

    def __init__(self, words: Iterable[str], names: Sequence[str] | None, where: str) -> None:
        words = sorted(set(words))
        numbers = {word: int(word) for word in words if word.removeprefix("-").isdecimal()}
        if names is not None:
            self.labels, self._places = list(names), {w: max(n, -1) for w, n in numbers.items() if n < len(names)}
        elif len(numbers) == len(words):
            self.labels = sorted((word for word in words if numbers[word] >= 0), key=int)
            self._places = dict.fromkeys(words, -1) | {word: i for i, word in enumerate(self.labels)}
        else:
            self.labels, self._places = words, {word: i for i, word in enumerate(words)}
        if unknown := [word for word in words if word not in self._places]:
            raise ConfigError(
                f"{where} names {len(self.labels)} classes, and an image is of class {unknown[0]!r}: a class is stated "
                "as a number that counts these from 0"
            )

    def of(self, words: Sequence[str]) -> np.ndarray:
        """int32: the class of each word; one more at the end, -1, so that index -1 is no class."""
        return np.array([*(self._places[word] for word in words), -1], np.int32)


def printable(path: bytes | str) -> str:
    """A path as text for a message, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")

"""Random numbers by address: the same numbers for the same purpose, seed and counters, in any process and any order."""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np

_BLOCK = 256  # numbers that a stream draws at once


class Purpose(IntEnum):
    """What the numbers are for; two purposes never share a number."""

    ORDER = 1
    VIEWS = 2
    REPLACEMENT = 3
    SHAPES = 4
    MASKS = 5
    MIXTURE = 6
    SUPERVISED = 7


def random_bits(purpose: Purpose, seed: int, first: int, second: int, count: int) -> np.ndarray:
    """``count`` random uint64 of the counter-based generator Philox (Salmon et al. 2011), a pure function.

    ``first`` and ``second`` are 64-bit counters, such as epoch and index. Raw output only: numpy promises that it never
    changes, which it does not promise for ``Generator.permutation`` and the like.
    """
    return _philox(purpose, seed, first, second).random_raw(count)


def uniform(purpose: Purpose, seed: int, first: int, second: int, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1), of :func:`random_bits`."""
    return _unit(random_bits(purpose, seed, first, second, count))


def stream(purpose: Purpose, seed: int, first: int, second: int) -> Iterator[float]:
    """The numbers of :func:`uniform` one by one, without end: for draws whose number depends on what was drawn."""
    generator = _philox(purpose, seed, first, second)
    while True:
        yield from _unit(generator.random_raw(_BLOCK)).tolist()


def _philox(purpose: Purpose, seed: int, first: int, second: int) -> np.random.Philox:
    return np.random.Philox(key=(seed, int(purpose)), counter=(0, 0, second, first))


def _unit(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from uint64."""
    return (bits >> np.uint64(11)) * 2.0**-53

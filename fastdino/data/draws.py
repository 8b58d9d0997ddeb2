"""Random numbers by address: the same numbers for the same purpose, seed and counters, in any process and any order."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers are for; two purposes never share a number."""

    ORDER = 1
    VIEWS = 2
    REPLACEMENT = 3
    SHAPES = 4


def random_bits(purpose: Purpose, seed: int, first: int, second: int, count: int) -> np.ndarray:
    """``count`` random uint64 of the counter-based generator Philox (Salmon et al. 2011), a pure function.

    ``first`` and ``second`` are 64-bit counters, such as epoch and index. Raw output only: numpy promises that it never
    changes, which it does not promise for ``Generator.permutation`` and the like.
    """
    return np.random.Philox(key=(seed, int(purpose)), counter=(0, 0, second, first)).random_raw(count)


def uniform(purpose: Purpose, seed: int, first: int, second: int, count: int) -> np.ndarray:
    """``count`` float64 in [0, 1), of :func:`random_bits`."""
    return (random_bits(purpose, seed, first, second, count) >> np.uint64(11)) * 2.0**-53

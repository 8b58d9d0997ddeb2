"""What the tests of several kernels share."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from fastdino_kernels._backend import INTERPRETED
from tests.kernels.sample_drop import use_small_tiles
from tests.kernels.sanitizer import sanitized


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is full of NaN, and an operation that is not deterministic raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens, so that few of them have several."""
    use_small_tiles(monkeypatch)


@pytest.fixture(autouse=True)
def _sanitized() -> Iterator[None]:
    with sanitized() if INTERPRETED else contextlib.nullcontext():
        yield

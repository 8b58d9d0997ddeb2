"""Sources for the tests of this room."""

from pathlib import Path

import pytest

from fastdino.data import ShapesSource
from tests.data.pictures import noise


@pytest.fixture(scope="session")
def shapes() -> ShapesSource:
    return ShapesSource(22, 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 readable images."""
    for i in range(20):
        noise(i, 36).save(tmp_path / f"{i:02d}.png")
    return tmp_path

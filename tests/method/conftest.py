"""A lone rank, for methods that reduce over ranks."""

import pytest

from fastdino import distributed


@pytest.fixture(scope="module")
def alone():
    with distributed.init("cpu") as ranks:
        yield ranks

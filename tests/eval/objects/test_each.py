"""Work that ranks share: each place once, every rank has all of it in order."""

from typing import Any

import pytest

from fastdino.data.sources.decode import BadImage
from fastdino.eval.evaluation import alone
from fastdino.eval.features import EvaluationError
from fastdino.eval.objects.each import each
from tests.eval.test_cache import together


@pytest.mark.parametrize("count", [7, 3, 1, 0])
def test_ranks_share_the_work(count: int) -> None:
    done: list[int] = []

    def work(place: int) -> int:
        done.append(place)
        return place**2

    def on(ranks: Any) -> Any:
        return each(ranks, count, work, "image")

    assert together(3, on) == [[place**2 for place in range(count)]] * 3
    assert sorted(done) == list(range(count))


def test_an_image_that_cannot_be_read() -> None:
    def work(place: int) -> None:
        raise BadImage("a.png", "torn")

    with pytest.raises(EvaluationError, match=r"a\.png: torn: mend or delete it"):
        each(alone(), 2, work, "image")

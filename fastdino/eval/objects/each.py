"""What both kinds share: work on one image or video after the other, by all ranks; and the package they need."""

from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from fastdino.data.sources.decode import BadImage
from fastdino.distributed import Ranks
from fastdino.eval.features import EvaluationError

T = TypeVar("T")


def check_scipy(kind: str) -> None:
    """Raises EvaluationError where it is not installed."""
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"fastdino eval {kind} needs scipy: pip install 'fastdino[eval]'") from error


def each(ranks: Ranks, count: int, work: Callable[[int], T], unit: str) -> list[T]:
    """``work`` of every place below ``count``, in order, on every rank; each of them works on every world_size-th.

    Raises EvaluationError for an image that cannot be read.
    """

    def mine() -> list[T]:
        places = range(ranks.rank, count, ranks.world_size)
        shown = tqdm(places, desc=f"{unit}s", unit=unit, leave=False, disable=not ranks.is_main or None)
        try:
            return [work(place) for place in shown]
        except BadImage as error:
            raise EvaluationError(f"{error}: mend or delete it") from error

    parts = ranks.gather(ranks.everywhere(mine))
    return [parts[place % ranks.world_size][place // ranks.world_size] for place in range(count)]

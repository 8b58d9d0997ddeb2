"""Images for dense evaluations: read in batches, one ahead, and squeezed whole."""

import threading

import numpy as np
import pytest
import torch

from fastdino.data.views.evaluation import nearest, whole_view
from fastdino.eval.dense.tokens import shown
from fastdino.eval.features import EvaluationError


class Counted:
    """Images of an own gray, and how many were read."""

    labels: list[str]

    def __init__(self, count: int) -> None:
        self.count, self.read_places, self.labels = count, [], []
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, room: object = None) -> tuple[np.ndarray, int]:
        self.read_places.append(index)
        self.threads.add(threading.get_ident())
        return np.full((4 + index % 3, 6, 3), index, np.uint8), -1

    def mask(self, index: int) -> np.ndarray:
        return np.full((4 + index % 3, 6), index, np.uint8)

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return "counted"


def test_one_batch_is_read_ahead_and_no_more() -> None:
    """However many images there are, two batches are held; and one thread reads them, in their order."""
    source, seen = Counted(50), 0
    for images in shown(source, 8, 7):
        seen += len(images.indices)
        assert len(source.read_places) <= seen + 7
        assert images.masks == []
        assert images.pixels.shape[1:] == (3, 8, 8)
    assert source.read_places == [*range(50)]
    assert len(source.threads) == 1


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_images_masks_and_sizes_belong_together(batch: int) -> None:
    places = [9, 2, 5, 5, 0]
    found = [x for images in shown(Counted(10), 8, batch, places, masks=True) for x in zip(*images, strict=True)]
    assert [place for place, *_ in found] == places
    for place, pixels, size, mask in found:
        assert size == (6, 4 + place % 3)
        assert (pixels == place).all()
        assert (mask == place).all()


def test_none_is_read_after_a_loop_that_ends_early() -> None:
    source = Counted(50)
    for _ in shown(source, 8, 5):
        break
    assert len(source.read_places) <= 10


def test_an_image_that_fails_ends_the_work() -> None:
    class Failing(Counted):
        def read(self, index: int, room: object = None) -> tuple[np.ndarray, int]:
            if index == 7:
                raise MemoryError("too large")
            return super().read(index)

    with pytest.raises(MemoryError, match="too large"):
        list(shown(Failing(20), 8, 4))
    assert issubclass(EvaluationError, ValueError)


def test_the_whole_image_is_squeezed() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = 200
    view = whole_view(image, 6)
    assert view.shape == (3, 6, 6)
    assert (view[..., :2] < 20).all()
    assert (view[..., 4:] > 180).all()
    assert torch.equal(whole_view(image[..., :1], 6), view[:1]), "of any channels"


def test_nearest_takes_what_lies_at_the_middle() -> None:
    values = np.array([[1, 2, 3]])
    assert nearest(values, 1, 6).tolist() == [[1, 1, 2, 2, 3, 3]]
    assert nearest(values, 2, 1).tolist() == [[2], [2]]
    assert nearest(values, 1, 2).tolist() == [[1, 3]]
    assert nearest(values, 1, 4).tolist() == [[1, 2, 2, 3]]

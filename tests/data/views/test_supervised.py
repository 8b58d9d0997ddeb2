"""The random views that classifiers are fine-tuned on: what they show, and that each is a function of its address."""

import builtins

import numpy as np
import pytest
import torch

from fastdino.config import ConfigError
from fastdino.data.loader import augmented_batches
from fastdino.data.makers import Augmented
from fastdino.data.sources.decode import BadImage
from fastdino.data.views import center_view
from fastdino.data.views.supervised import RandomView, augmentation_for


def ramp(height: int = 48, width: int = 48, channels: int = 3) -> np.ndarray:
    """Red rises to the right, green downwards: a view tells which part of the image it is."""
    image = np.zeros((height, width, channels), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)[None, :]
    if channels > 1:
        image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


@pytest.mark.parametrize(("kind", "least"), [("gentle", 0.6), ("strong", 0.35)])
def test_a_crop_has_its_share_of_the_image_and_half_are_flipped(kind: str, least: float) -> None:
    view = RandomView(32, kind, seed=0)  # type: ignore[arg-type]
    if kind == "strong":
        view._transform.transforms.pop()  # type: ignore[attr-defined]  # RandAugment moves the colours
    views = [view(ramp(), 0, i).float() for i in range(200)]
    right = torch.stack([x[0, :, -1].mean() - x[0, :, 0].mean() for x in views])
    down = torch.stack([x[1, -1].mean() - x[1, 0].mean() for x in views])
    share = right.abs() * down / 255**2  # pixels at the edge are blends
    assert least - 0.06 < share.min() < least + 0.1
    assert share.max() > 0.85
    assert 70 < (right < 0).sum() < 130


def test_strong_views_change_more_than_the_crop() -> None:
    grey = np.full((40, 40, 3), 100, np.uint8)
    gentle = torch.stack([RandomView(32, "gentle", 0)(grey, 0, i) for i in range(40)])
    strong = torch.stack([RandomView(32, "strong", 0)(grey, 0, i) for i in range(40)])
    assert (gentle == 100).all()
    assert (strong != 100).flatten(1).any(1).sum() > 10


def test_a_view_is_a_function_of_seed_epoch_and_index() -> None:
    def made(seed: int, epoch: int, index: int) -> torch.Tensor:
        return RandomView(32, "strong", seed)(ramp(), epoch, index)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    want = made(0, 1, 2)
    torch.rand(5)
    assert torch.equal(made(0, 1, 2), want)
    for other in (made(1, 1, 2), made(0, 2, 2), made(0, 1, 3)):
        assert not torch.equal(other, want)
    torch.set_rng_state(before)
    drawn = torch.rand(1)
    torch.set_rng_state(before)
    made(0, 0, 0)
    assert torch.equal(torch.rand(1), drawn), "the caller's generator has not moved"


@pytest.mark.parametrize(("channels", "kind"), [(1, "strong"), (5, "gentle")])
def test_other_channels(channels: int, kind: str) -> None:
    assert RandomView(16, kind, 0)(ramp(channels=channels), 0, 0).shape == (channels, 16, 16)  # type: ignore[arg-type]


def test_small_pictures_and_pictures_without_colour_are_treated_gently() -> None:
    assert [augmentation_for(size) for size in (28, 95, 96, 224)] == ["gentle", "gentle", "strong", "strong"]
    assert [augmentation_for(224, channels) for channels in (1, 3, 5)] == ["strong", "strong", "gentle"]


class Ramps:
    """Eight images, of which the sixth cannot be read; each is of its own class."""

    labels = tuple("abcdefgh")

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> tuple[np.ndarray, int]:
        if index == 5:
            raise BadImage("five", "torn")
        return ramp() // (1 + index), index

    def name(self, index: int) -> str:
        return str(index)


KEYS = [[(0, 3), (0, 5), (0, 1)], [(0, 5)], [(1, 3), (1, 7)]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_what_the_keys_say(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    view = RandomView(24, "gentle", seed=4)
    maker = Augmented(Ramps(), 24, 3, 0.875, 3, view)  # type: ignore[arg-type]
    batches = [*augmented_batches(maker, iter(KEYS), workers)]
    assert [labels.tolist() for _, labels in batches] == [[3, 1], [], [3, 7]]
    assert torch.equal(batches[0][0][1], view(ramp() // 2, 0, 1))
    assert torch.equal(batches[2][0][0], view(ramp() // 4, 1, 3))
    assert [record.message for record in caplog.records] == ["left out of the training: cannot read image five: torn"]


def test_without_random_views_each_epoch_shows_what_is_evaluated() -> None:
    maker = Augmented(Ramps(), 24, 3, 0.875, 3, None)  # type: ignore[arg-type]
    (first, _), _, (last, _) = augmented_batches(maker, iter(KEYS), 0)
    assert torch.equal(first[0], center_view(ramp() // 4, 24))
    assert torch.equal(first[0], last[0])


def test_without_torchvision_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("torchvision"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"random views need torchvision .*: pip install torchvision"):
        RandomView(32, "gentle", 0)

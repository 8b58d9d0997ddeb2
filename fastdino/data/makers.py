"""What workers make of keys: views, or decoded images and what is drawn for their views; and labelled images."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdino.config import Config, UserError
from fastdino.data import views
from fastdino.data.batch import Masks
from fastdino.data.draws import Purpose, random_bits
from fastdino.data.masks import check_masks, masks_of, sample_masks
from fastdino.data.sampler import Key
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Room, Source
from fastdino.data.views import device
from fastdino.data.views.supervised import RandomView
from fastdino.data.workers import Fields, Hold, Maker, Tensors

View = Callable[[np.ndarray], Tensor]
"""An image, uint8 (h, w, C), becomes uint8 (C, s, s)."""
_MAX_ATTEMPTS = 20  # replacements in a row that may be unreadable too: beyond it the source is broken, not an image


class BadData(UserError, RuntimeError):
    """More images are unreadable than data.max_bad allows."""


class TrainMaker(Maker[Key], Protocol):
    """A maker of training batches, with what the training process does to one."""

    def upload(self, made: Tensors, to: torch.device) -> Tensors:
        """Copies of a batch's tensors on a device; from page-locked memory they do not wait."""

    def views(self, uploaded: Tensors) -> dict[str, Tensor]:
        """The views, by size, where those copies are."""


class _Images:
    """Keys (epoch, index), their images and masks."""

    fields: Fields

    def __init__(self, config: Config, source: Source) -> None:
        self.config, self.seed, self.source = config.views, config.run.seed, source
        self.grid = None
        if config.loss.patch_weight:
            self.grid = (config.views.global_size // config.model.patch_size,) * 2
            check_masks(config.run.local_batch, config.views, self.grid)
            masks = self._masks([(0, index) for index in range(config.run.local_batch)])
            self.fields = {name: (tuple(x.shape), x.dtype) for name, x in masks._asdict().items()}  # of every batch
        else:
            self.fields = {}

    def prepare(self, out: Tensors, keys: list[Key]) -> None:
        """The masks, by the images as planned, whichever stand in for them."""
        if self.grid is not None:
            for name, x in self._masks(keys)._asdict().items():
                out[name].copy_(x)

    def name(self, index: int) -> str:
        """That of the source."""
        return self.source.name(index)

    def _masks(self, keys: list[Key]) -> Masks:
        assert self.grid is not None
        (epoch,) = {epoch for epoch, _ in keys}  # a step lies within one
        return masks_of(sample_masks(self.seed, epoch, [index for _, index in keys], self.config, self.grid))

    def _params(self, keys: list[Key], images: list[np.ndarray]) -> Tensor:
        """(images, views, columns)."""
        (epoch,) = {epoch for epoch, _ in keys}
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        return views.sample_params_of_many(self.seed, epoch, [index for _, index in keys], self.config, sizes)

    def _read(self, key: Key, bad: list[str], hold: Hold, room: Room | None = None) -> np.ndarray:
        """The image of a key, or the first readable one of a random row; what was not readable is added to ``bad``.

        Raises BadData when none is.
        """
        for candidate in self._candidates(*key):
            hold(candidate)
            try:
                return (self.source.read(candidate) if room is None else self.source.read(candidate, room))[0]
            except BadImage as error:
                bad.append(f"{error.name}: {error.reason}")
                last = error
        raise BadData(
            f"{_MAX_ATTEMPTS + 1} images drawn at random cannot be read, so data.root itself looks gone or damaged. "
            f"The last: {last}"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        row = random_bits(Purpose.REPLACEMENT, self.seed, epoch, index, _MAX_ATTEMPTS) % np.uint64(len(self.source))
        yield from row.tolist()


class Views(_Images):
    """Views, made by the workers."""

    def __init__(self, config: Config, source: Source, write: views.Write) -> None:
        super().__init__(config, source)
        self.write, self.groups = write, views.groups(config.views)
        for name, (count, side) in self.groups.items():
            self.fields[name] = ((count, config.run.local_batch, config.data.channels, side, side), torch.uint8)

    def make(self, out: Tensors, first: int, keys: list[Key], hold: Hold) -> list[list[str]]:
        """The views of some images. Returns the name and reason of each that could not be read in its place."""
        bad = [list[str]() for _ in keys]
        images = [self._read(key, told, hold) for key, told in zip(keys, bad, strict=True)]
        params = self._params(keys, images)
        for place, image in enumerate(images):
            here = {name: out[name][:, first + place] for name in self.groups}
            self.write(image, params[place], here)
        return bad

    def upload(self, made: Tensors, to: torch.device) -> Tensors:
        """See TrainMaker."""
        return {name: x.to(to, non_blocking=True, copy=True) for name, x in made.items()}

    def views(self, uploaded: Tensors) -> dict[str, Tensor]:
        """As they are."""
        return {name: uploaded[name] for name in self.groups}


class Decoded(_Images):
    """Decoded images and what is drawn for their views, which the device makes.

    The images that one call makes lie back to back, from the place of the first on: few copies take a batch to the
    device, and no image needs to know how large the others are.
    """

    def __init__(self, config: Config, source: Source, patch: int = 0) -> None:
        super().__init__(config, source)
        self.side, self.patch = config.data.max_side, patch
        self.room = device.aligned(3 * self.side**2)
        self.fields |= device.fields(config.views, config.run.local_batch, self.room)

    def make(self, out: Tensors, first: int, keys: list[Key], hold: Hold) -> list[list[str]]:
        """Some images, and draws. Returns the name and reason of each that could not be read in its place."""
        bad, images, start = [list[str]() for _ in keys], list[np.ndarray](), first * self.room
        pixels = out["pixels"].numpy()
        for place, (key, told) in enumerate(zip(keys, bad, strict=True), first):

            def room(height: int, width: int, start: int = start) -> np.ndarray | None:
                end = start + 3 * height * width
                return pixels[start:end].reshape(height, width, 3) if max(height, width) <= self.side else None

            image = self._read(key, told, hold, room)
            out["reduced"][place] = max(image.shape) > self.side
            if out["reduced"][place]:
                image = device.reduced(image, self.side)
            here = room(*image.shape[:2])
            assert here is not None
            if not np.may_share_memory(here, image):
                here[:] = image
            images.append(here)
            end = start + here.size
            out["starts"][place], out["ends"][place], out["widths"][place] = start, end, here.shape[1]
            start = device.aligned(end)
        for place, (params, image) in enumerate(zip(self._params(keys, images), images, strict=True), first):
            device.enter_draws(out, place, params, image)
        return bad

    def upload(self, made: Tensors, to: torch.device) -> Tensors:
        """See TrainMaker."""
        return device.upload(made, to)

    def views(self, uploaded: Tensors) -> dict[str, Tensor]:
        """By the kernels, or on a CPU by their twin in plain torch."""
        return device.make_views(uploaded, self.config, self.patch)


class _Labelled:
    """Images with their labels, at their places of a batch."""

    def __init__(self, source: Source, size: int, batch_size: int, crop: float, channels: int) -> None:
        self.source, self.size, self.crop = source, size, crop
        self.fields = {
            "pixels": ((batch_size, channels, size, size), torch.uint8),
            "labels": ((batch_size,), torch.int64),
        }

    def prepare(self, out: Tensors, keys: Sequence[Any]) -> None:
        """Nothing belongs to the batch as a whole."""

    def name(self, index: int) -> str:
        """That of the source."""
        return self.source.name(index)

    def _make(self, out: Tensors, place: int, index: int, hold: Hold, view: View) -> list[str]:
        """Why an image could not be read, if it could not."""
        hold(index)
        try:
            image, label = self.source.read(index)
        except BadImage as error:
            return [str(error)]
        out["pixels"][place] = view(image)
        out["labels"][place] = label
        return []

    def _center_view(self, image: np.ndarray) -> Tensor:
        return views.center_view(image, self.size, self.crop)


class Labelled(_Labelled):
    """Indices become centered views and labels."""

    def make(self, out: Tensors, first: int, keys: list[int], hold: Hold) -> list[list[str]]:
        """Views and labels of some images. Returns why each could not be read, if it could not."""
        return [self._make(out, place, index, hold, self._center_view) for place, index in enumerate(keys, first)]


class Augmented(_Labelled):
    """Keys (epoch, index) become random views and labels; without ``random`` views as :class:`Labelled` makes them."""

    def __init__(
        self, source: Source, size: int, batch_size: int, crop: float, channels: int, random: RandomView | None
    ) -> None:
        super().__init__(source, size, batch_size, crop, channels)
        self.random = random

    def make(self, out: Tensors, first: int, keys: list[Key], hold: Hold) -> list[list[str]]:
        """Views and labels of some images. Returns why each could not be read, if it could not."""
        notes = []
        for place, (epoch, index) in enumerate(keys, first):
            view = partial(self.random, epoch=epoch, index=index) if self.random else self._center_view
            notes.append(self._make(out, place, index, hold, view))
        return notes

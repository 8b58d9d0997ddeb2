"""Batches of views for training, and labelled images for evaluation."""

import logging
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastdino.config import Config, UserError
from fastdino.data import views
from fastdino.data.batch import Batch, Masks
from fastdino.data.draws import Purpose, random_bits
from fastdino.data.masks import check_masks, masks_of, sample_masks
from fastdino.data.sampler import Key, Plan
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source
from fastdino.data.workers import MadeAhead, affordable

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20  # replacements in a row that may be unreadable too: beyond it the source is broken, not an image
_NAMED = 3  # bad images that a message names


class BadData(UserError, RuntimeError):
    """More images are unreadable than data.max_bad allows."""


class _Views(Dataset[Batch]):
    """Keys (epoch, index) become one Batch: a pure function, wherever and in whatever order it runs."""

    def __init__(self, config: Config, source: Source) -> None:
        self.views, self.seed, self.source = config.views, config.run.seed, source
        self.grid = None
        if config.loss.patch_weight:
            self.grid = (config.views.global_size // config.model.patch_size,) * 2
            check_masks(config.run.local_batch, config.views, self.grid)

    def __getitems__(self, keys: list[Key]) -> Batch | BadImage:
        """The batch; or as a value, for the training process to raise, what makes the source unusable."""
        config, bad = self.views, list[str]()
        groups = {
            name: torch.empty((count, len(keys), 3, size, size), dtype=torch.uint8)
            for name, (count, size) in views.groups(config).items()
        }
        for position, (epoch, index) in enumerate(keys):
            image = self._read(epoch, index, bad)
            if isinstance(image, BadImage):
                return image
            params = views.sample_params(self.seed, epoch, index, config, image.size)
            for name, made in views.apply(image, params, config).items():
                groups[name][:, position] = made
        return Batch(groups, self._masks(keys), bad)

    def _masks(self, keys: list[Key]) -> Masks | None:
        """By the images as planned, whichever stand in for them."""
        if self.grid is None:
            return None
        (epoch,) = {epoch for epoch, _ in keys}  # a step lies within one
        return masks_of(sample_masks(self.seed, epoch, [index for _, index in keys], self.views, self.grid))

    def _read(self, epoch: int, index: int, bad: list[str]) -> Image.Image | BadImage:
        """Image ``index``, or the first readable one of a random row; what was not readable is added to ``bad``."""
        try:
            return self.source.read(index)[0]
        except BadImage as error:
            bad.append(f"{error.name}: {error.reason}")
        row = random_bits(Purpose.REPLACEMENT, self.seed, epoch, index, _MAX_ATTEMPTS) % np.uint64(len(self.source))
        for candidate in row.tolist():
            try:
                return self.source.read(candidate)[0]
            except BadImage as error:
                bad.append(f"{error.name}: {error.reason}")
                last = error
        return last


class TrainBatches:
    """Iterator over a rank's micro batches, without end; see :func:`train_batches`."""

    def __init__(
        self,
        batches: MadeAhead,
        plan: Plan,
        start_step: int,
        max_bad: float,
        device: torch.device,
    ) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self.plan, self.max_bad, self.device = plan, max_bad, device
        self._batches = batches
        self._made = start_step * plan.accumulate  # micro batches since the run's start
        self.num_bad = 0  # images that could not be read, since this process began
        self._bad: list[str] = []  # those of the present epoch, as far as this process read it
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None  # on its way to the device

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        """The next micro batch, on the device. Raises BadData and WorkerDied."""
        if self._stream is None:
            return self._next_on_host().to(self.device)
        batch = self._ahead or self._upload()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        batch.record_stream(torch.cuda.current_stream(self.device))
        self._ahead = self._upload()
        return batch

    def close(self) -> None:
        """Ends the workers; leaving the iterator to the garbage collector does so too."""
        self._batches.close()

    def _upload(self) -> Batch:
        with torch.cuda.stream(self._stream):
            return self._next_on_host().to(self.device)

    def _next_on_host(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch, BadImage):
            raise BadData(
                f"{_MAX_ATTEMPTS + 1} images drawn at random cannot be read, so data.root itself looks gone or "
                f"damaged. The last: {batch}"
            )
        self._count_bad(batch.bad)
        return batch

    def _count_bad(self, bad: list[str]) -> None:
        if self._made % (self.plan.accumulate * self.plan.steps_per_epoch) == 0:
            self._bad = []
        self._made += 1
        self.num_bad += len(bad)
        self._bad += bad
        for image in bad:
            log.warning("skipped an image that cannot be read: %s", image)
        in_epoch = self.plan.steps_per_epoch * self.plan.accumulate * self.plan.local_batch
        if len(self._bad) > self.max_bad * in_epoch:
            raise BadData(
                f"{len(self._bad)} of an epoch's {in_epoch} images on this rank could not be read, more than "
                f"data.max_bad={self.max_bad:g} allows: {'; '.join(self._bad[:_NAMED])}"
                f"{'; ...' if len(self._bad) > _NAMED else ''}. Mend or delete them, or raise data.max_bad"
            )


def train_batches(
    config: Config,
    source: Source,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    device: torch.device,
) -> TrainBatches:
    """This rank's micro batches from ``start_step`` on, ``config.engine.accumulate`` per step, on ``device``, endless.

    A batch is a pure function of (config, source, step, micro batch, rank): it does not depend on the number of workers
    or on where the run was resumed. On a GPU the next batch is copied on a stream of its own while one is in use.
    An unreadable image is replaced by another, counted, logged and named in ``Batch.bad``. Masks are in a batch when
    loss.patch_weight is above 0.

    Raises ConfigError when the source does not fill a global batch or the masks hide nothing, WorkerDied when no worker
    can be started.
    """
    plan = Plan(
        num_images=len(source),
        local_batch=config.run.local_batch,
        world_size=world_size,
        accumulate=config.engine.accumulate,
        seed=config.run.seed,
        order=lru_cache(maxsize=2)(source.order) if isinstance(source, Mixture) else None,
    )
    keys = plan.micro_batches(rank, start_step)
    num_workers = affordable(config.data.num_workers)
    if num_workers < config.data.num_workers and rank == 0:
        log.info("data.num_workers=%d lowered to %d, what this process can use", config.data.num_workers, num_workers)
    batches = MadeAhead(_Views(config, source), num_workers, batch_sampler=keys, pin_memory=device.type == "cuda")
    return TrainBatches(batches, plan, start_step, config.data.max_bad, device)


class _Labelled(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """Indices become centered views, labels and the names of images that could not be read."""

    def __init__(self, source: Source, size: int, crop: float) -> None:
        self.source, self.size, self.crop = source, size, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]]:
        pixels, labels, bad = (
            torch.empty((len(indices), 3, self.size, self.size), dtype=torch.uint8),
            list[int](),
            list[str](),
        )
        for index in indices:
            try:
                image, label = self.source.read(index)
            except BadImage as error:
                bad.append(str(error))
                continue
            pixels[len(labels)] = views.center_view(image, self.size, self.crop)
            labels.append(label)
        return pixels[: len(labels)], torch.tensor(labels, dtype=torch.int64), bad


def labelled_batches(
    source: Source, size: int, batch_size: int, num_workers: int, crop: float = 0.875
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``source`` once, in order: uint8 (B, 3, size, size) views on the CPU and int64 (B,) labels.

    DINO v1's evaluation transform, which shows ``crop`` of the shorter side. Images that cannot be read are left out,
    with a warning that names them.
    """
    batches = MadeAhead(_Labelled(source, size, crop), affordable(num_workers), batch_size=batch_size)
    for pixels, labels, bad in batches:
        for message in bad:
            log.warning("left out of the evaluation: %s", message)
        if len(labels):
            yield pixels, labels

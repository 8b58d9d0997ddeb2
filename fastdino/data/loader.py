"""Batches of views for training, and labelled images for evaluation."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastdino.config import Config, UserError
from fastdino.data import views
from fastdino.data.batch import Batch, Masks
from fastdino.data.draws import Purpose, random_bits
from fastdino.data.masks import check_masks, masks_of, sample_masks
from fastdino.data.sampler import Key, Plan
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source
from fastdino.data.views import reference
from fastdino.data.workers import Hold, Made, MadeAhead, Tensors, affordable

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20  # replacements in a row that may be unreadable too: beyond it the source is broken, not an image
_THREADS = 8  # of a process at most: more would wait for its interpreter, which draws and reads
_NAMED = 3  # bad images that a message names


class BadData(UserError, RuntimeError):
    """More images are unreadable than data.max_bad allows."""


class _Views:
    """Keys (epoch, index) become the views of their images, and masks."""

    def __init__(self, config: Config, source: Source, write: views.Write) -> None:
        self.views, self.seed, self.source, self.write = config.views, config.run.seed, source, write
        size = config.run.local_batch
        self.fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((count, size, config.data.channels, side, side), torch.uint8)
            for name, (count, side) in views.groups(config.views).items()
        }
        self.grid = None
        if config.loss.patch_weight:
            self.grid = (config.views.global_size // config.model.patch_size,) * 2
            check_masks(size, config.views, self.grid)
            for name, x in self._masks([(0, index) for index in range(size)])._asdict().items():
                self.fields[name] = (tuple(x.shape), x.dtype)  # the same for every batch

    def prepare(self, out: Tensors, keys: list[Key]) -> None:
        """The masks, by the images as planned, whichever stand in for them."""
        if self.grid is not None:
            for name, x in self._masks(keys)._asdict().items():
                out[name].copy_(x)

    def make(self, out: Tensors, first: int, keys: list[Key], hold: Hold) -> list[list[str]]:
        """The views of some images. Returns the name and reason of each that could not be read in its place."""
        bad = [list[str]() for _ in keys]
        images = [self._read(epoch, index, told, hold) for (epoch, index), told in zip(keys, bad, strict=True)]
        (epoch,) = {epoch for epoch, _ in keys}  # a step lies within one
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        params = views.sample_params_of_many(self.seed, epoch, [index for _, index in keys], self.views, sizes)
        for place, image in enumerate(images):
            here = {name: out[name][:, first + place] for name in views.groups(self.views)}
            self.write(image, params[place], here)
        return bad

    def name(self, index: int) -> str:
        """That of the source."""
        return self.source.name(index)

    def _masks(self, keys: list[Key]) -> Masks:
        assert self.grid is not None
        (epoch,) = {epoch for epoch, _ in keys}
        return masks_of(sample_masks(self.seed, epoch, [index for _, index in keys], self.views, self.grid))

    def _read(self, epoch: int, index: int, bad: list[str], hold: Hold) -> np.ndarray:
        """Image ``index``, or the first readable one of a random row; what was not readable is added to ``bad``.

        Raises BadData when none is.
        """
        for candidate in self._candidates(epoch, index):
            hold(candidate)
            try:
                return self.source.read(candidate)[0]
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


class TrainBatches:
    """Iterator over a rank's micro batches, without end; see :func:`train_batches`."""

    def __init__(self, batches: MadeAhead[Key], plan: Plan, start_step: int, max_bad: float, device: torch.device):
        self.steps_per_epoch = plan.steps_per_epoch
        self.plan, self.max_bad, self.device = plan, max_bad, device
        self._batches = batches
        self._made = start_step * plan.accumulate  # micro batches since the run's start
        self.num_bad = 0  # images that could not be read, since this process began
        self._bad: list[str] = []  # those of the present epoch, as far as this process read it
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None  # on its way to the device
        self._copied: Callable[[], None] = lambda: None  # waits for that, and gives the memory back

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        """The next micro batch, on the device. Raises BadData and WorkerDied."""
        if self._stream is None:
            made = next(self._batches)
            batch = self._batch(made).clone()
            made.free()
            return batch
        batch = self._ahead or self._upload(self._stream)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        batch.record_stream(torch.cuda.current_stream(self.device))
        self._ahead = self._upload(self._stream)
        return batch

    def close(self) -> None:
        """Ends the workers; leaving the iterator to the garbage collector does so too."""
        self._batches.close()

    def _upload(self, stream: torch.cuda.Stream) -> Batch:
        """Starts the copy of the next batch. That of the one before was over long ago, but for the very first."""
        self._copied()
        made = next(self._batches)
        with torch.cuda.stream(stream):
            batch = self._batch(made).to(self.device)
            over = torch.cuda.Event()
            over.record(stream)

        def copied() -> None:
            over.synchronize()
            made.free()

        self._copied = copied
        return batch

    def _batch(self, made: Made) -> Batch:
        """In the memory of ``made``."""
        bad = [image for place in made.notes for image in place]
        self._count_bad(bad)
        masks = [made.tensors.pop(name) for name in Masks._fields if name in made.tensors]
        return Batch(made.tensors, Masks(*masks) if masks else None, bad)

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

    Raises ConfigError when the source does not fill a global batch, the masks hide nothing or data.views cannot be had,
    WorkerDied when no worker can be started.
    """
    plan = Plan(
        num_images=len(source),
        local_batch=config.run.local_batch,
        world_size=world_size,
        accumulate=config.engine.accumulate,
        seed=config.run.seed,
        order=lru_cache(maxsize=2)(source.order) if isinstance(source, Mixture) else None,
    )
    num_workers = affordable(config.data.num_workers)
    if num_workers < config.data.num_workers and rank == 0:
        log.info("data.num_workers=%d lowered to %d, what this process can use", config.data.num_workers, num_workers)
    write, name = views.implementation(config.data.views, config.data.channels)
    if rank == 0:
        log.info("views by %s", name)
    keys, maker = plan.micro_batches(rank, start_step), _Views(config, source, write)
    batches = MadeAhead(maker, keys, *_shares(num_workers, write), pinned=device.type == "cuda")
    return TrainBatches(batches, plan, start_step, config.data.max_bad, device)


def _shares(num_workers: int, write: views.Write) -> tuple[int, int]:
    """Processes, and threads of each. Our C leaves the interpreter to other threads, which cost less than processes;
    Pillow keeps it for much of its work."""
    processes = num_workers if write is reference.write else math.ceil(num_workers / _THREADS)
    return processes, math.ceil(num_workers / max(processes, 1))


class _Labelled:
    """Indices become centered views and labels."""

    def __init__(self, source: Source, size: int, batch_size: int, crop: float, channels: int) -> None:
        self.source, self.size, self.crop = source, size, crop
        self.fields = {
            "pixels": ((batch_size, channels, size, size), torch.uint8),
            "labels": ((batch_size,), torch.int64),
        }

    def prepare(self, out: Tensors, keys: list[int]) -> None:
        """Nothing belongs to the batch as a whole."""

    def make(self, out: Tensors, first: int, keys: list[int], hold: Hold) -> list[list[str]]:
        """Views and labels of some images. Returns why each could not be read, if it could not."""
        return [self._make(out, place, index, hold) for place, index in enumerate(keys, first)]

    def _make(self, out: Tensors, place: int, index: int, hold: Hold) -> list[str]:
        hold(index)
        try:
            image, label = self.source.read(index)
        except BadImage as error:
            return [str(error)]
        out["pixels"][place] = views.center_view(image, self.size, self.crop)
        out["labels"][place] = label
        return []

    def name(self, index: int) -> str:
        """That of the source."""
        return self.source.name(index)


def labelled_batches(
    source: Source, size: int, batch_size: int, num_workers: int, crop: float = 0.875, channels: int = 3
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``source`` once, in order: uint8 (B, channels, size, size) views on the CPU and int64 (B,) labels.

    DINO v1's evaluation transform, which shows ``crop`` of the shorter side. Images that cannot be read are left out,
    with a warning that names them.
    """
    keys = (list(range(start, min(start + batch_size, len(source)))) for start in range(0, len(source), batch_size))
    batches = MadeAhead(_Labelled(source, size, batch_size, crop, channels), keys, affordable(num_workers))
    try:
        for made in batches:
            for message in (message for place in made.notes for message in place):
                log.warning("left out of the evaluation: %s", message)
            read = torch.tensor([place for place, notes in enumerate(made.notes) if not notes], dtype=torch.int64)
            pixels, labels = made.tensors["pixels"][read], made.tensors["labels"][read]
            made.free()
            if len(read):
                yield pixels, labels
    finally:
        batches.close()

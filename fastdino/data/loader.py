"""Batches of views for training, and labelled images for evaluation."""

import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastdino.config import Config, UserError
from fastdino.data import views
from fastdino.data.draws import Purpose, random_bits
from fastdino.data.sampler import Key, Plan
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20  # replacements in a row that may be unreadable too: beyond it the source is broken, not an image
_NAMED = 3  # bad images that a message names


class BadData(UserError, RuntimeError):
    """More images are unreadable than data.max_bad allows."""


class WorkerDied(UserError, RuntimeError):
    """A process that makes views ended before its time."""


@dataclass
class Batch:
    """The views of ``local_batch`` images, as bytes."""

    global_views: Tensor
    """uint8 (2, B, 3, G, G)"""
    local_views: Tensor
    """uint8 (L, B, 3, l, l); L may be 0"""
    bad: list[str] = field(default_factory=list)
    """Names of images that could not be read; others stand in for them."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes. DataLoader calls this."""
        return Batch(self.global_views.pin_memory(), self.local_views.pin_memory(), self.bad)

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``; from page-locked memory the copy does not wait."""
        global_views, local_views = (x.to(device, non_blocking=True) for x in (self.global_views, self.local_views))
        return Batch(global_views, local_views, self.bad)


class _Views(Dataset[Batch]):
    """Keys (epoch, index) become one Batch: a pure function, wherever and in whatever order it runs."""

    def __init__(self, config: Config, source: Source) -> None:
        self.views, self.seed, self.source = config.views, config.run.seed, source

    def __getitems__(self, keys: list[Key]) -> Batch | BadImage:
        """The batch; or as a value, for the training process to raise, what makes the source unusable."""
        config, bad = self.views, list[str]()
        shapes = ((2, config.global_size), (config.num_local, config.local_size))
        groups = [torch.empty((v, len(keys), 3, size, size), dtype=torch.uint8) for v, size in shapes]
        for position, (epoch, index) in enumerate(keys):
            image = self._read(epoch, index, bad)
            if isinstance(image, BadImage):
                return image
            params = views.sample_params(self.seed, epoch, index, config, image.size)
            for group, made in zip(groups, views.apply(image, params, config), strict=True):
                group[:, position] = made
        return Batch(groups[0], groups[1], bad)

    def _read(self, epoch: int, index: int, bad: list[str]) -> Image.Image | BadImage:
        """Image ``index``, or the first readable one of a random row; names those that were not in ``bad``."""
        try:
            return self.source.read(index)[0]
        except BadImage as error:
            bad.append(error.name)
        row = random_bits(Purpose.REPLACEMENT, self.seed, epoch, index, _MAX_ATTEMPTS) % np.uint64(len(self.source))
        for candidate in row.tolist():
            try:
                return self.source.read(candidate)[0]
            except BadImage as error:
                bad.append(error.name)
                last = error
        return last


class TrainBatches:
    """Iterator over a rank's micro batches, without end; see :func:`train_batches`."""

    def __init__(
        self,
        batches: "_MadeAhead",
        plan: Plan,
        start_step: int,
        max_bad: float,
        device: torch.device,
    ) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self.plan, self.max_bad, self.device = plan, max_bad, device
        self._batches = batches
        self._made = start_step * plan.accumulate  # micro batches since the run's start
        self._bad: list[str] = []  # names, of the present epoch, as far as this process read it
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
        for tensor in (batch.global_views, batch.local_views):
            tensor.record_stream(torch.cuda.current_stream(self.device))
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
        self._bad += bad
        in_epoch = self.plan.steps_per_epoch * self.plan.accumulate * self.plan.local_batch
        if len(self._bad) > self.max_bad * in_epoch:
            raise BadData(
                f"{len(self._bad)} of an epoch's {in_epoch} images on this rank could not be read, more than "
                f"data.max_bad={self.max_bad:g} allows: {', '.join(self._bad[:_NAMED])}"
                f"{', ...' if len(self._bad) > _NAMED else ''}. Mend or delete them, or raise data.max_bad"
            )


def train_batches(
    config: Config, source: Source, *, rank: int, world_size: int, start_step: int, device: torch.device
) -> TrainBatches:
    """This rank's micro batches from ``start_step`` on, ``config.engine.accumulate`` per step, on ``device``, endless.

    A batch is a pure function of (config, source, step, micro batch, rank): it does not depend on the number of workers
    or on where the run was resumed. On a GPU the next batch is copied on a stream of its own while one is in use.
    An unreadable image is replaced by another; its name is in ``Batch.bad``.

    Raises ConfigError when the source does not fill a global batch.
    """
    plan = Plan(
        num_images=len(source),
        local_batch=config.run.local_batch,
        world_size=world_size,
        accumulate=config.engine.accumulate,
        seed=config.run.seed,
    )
    keys = plan.micro_batches(rank, start_step)
    num_workers = affordable(config.data.num_workers)
    if num_workers < config.data.num_workers and rank == 0:
        log.info("data.num_workers=%d lowered to %d, this rank's cores", config.data.num_workers, num_workers)
    batches = _MadeAhead(_Views(config, source), num_workers, batch_sampler=keys, pin_memory=device.type == "cuda")
    return TrainBatches(batches, plan, start_step, config.data.max_bad, device)


class _Labelled(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """Indices become centered views, labels and the names of images that could not be read."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

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
            pixels[len(labels)] = views.center_view(image, self.size)
            labels.append(label)
        return pixels[: len(labels)], torch.tensor(labels, dtype=torch.int64), bad


def labelled_batches(source: Source, size: int, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``source`` once, in order: uint8 (B, 3, size, size) views on the CPU and int64 (B,) labels.

    DINO v1's evaluation transform. Images that cannot be read are left out, with a warning that names them.
    """
    batches = _MadeAhead(_Labelled(source, size), affordable(num_workers), batch_size=batch_size)
    for pixels, labels, bad in batches:
        for message in bad:
            log.warning("left out of the evaluation: %s", message)
        if len(labels):
            yield pixels, labels


def affordable(wanted: int) -> int:
    """``wanted`` workers, or as many as this rank has cores: more would only take turns."""
    # torchrun's name for the ranks of this machine, and the deepspeed launcher's
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    return min(wanted, max(1, cores // ranks_here))


class _MadeAhead:
    """Iterator over a dataset's batches, made by ``num_workers`` processes that start now, not at the first batch.

    They end when it is closed, dropped, or at the latest when this process ends.
    """

    def __init__(self, dataset: "Dataset[Any]", num_workers: int, **options: Any) -> None:
        loader = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=_set_up_worker,
            # fork, so that workers share the source's memory; they never touch the GPU.
            multiprocessing_context="fork" if num_workers else None,
            **options,
        )
        with _unchanged(signal.SIGCHLD):
            self._batches = iter(loader)
        self.close = weakref.finalize(self, _end, self._batches)

    def __iter__(self) -> "_MadeAhead":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise WorkerDied(
                "a data worker died. Most often memory ran out, or shared memory did (a container's /dev/shm: docker "
                "run --shm-size). Give it more, or lower data.num_workers or run.local_batch"
            ) from error


@contextmanager
def _unchanged(number: signal.Signals) -> Iterator[None]:
    """Takes back torch's handler, which raises wherever the trainer happens to be when a worker dies.

    Without it the next batch reports the death, within 5 seconds.
    """
    handler = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():  # no other may set one, and then torch did not
        signal.signal(number, handler or signal.SIG_DFL)


def _end(batches: Any) -> None:
    """Ends the workers of a DataLoader's iterator, also of one that a traceback still holds."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()  # one that hangs in a read; they do not listen to SIGTERM


def _as_is(batch: Any) -> Any:
    return batch


def _set_up_worker(_: int) -> None:
    """Ctrl-C and a cluster's notice reach the whole process group; the trainer finishes its step first, on our data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _tell_unless_hung_up


def _tell_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Silent when the trainer was interrupted while it took a batch: it tells, and a worker's thread need not."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)

"""Batches of views for training, and labelled images for evaluation."""

import logging
import math
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fastdino.config import Config
from fastdino.data import views
from fastdino.data.batch import Batch, Masks
from fastdino.data.makers import Augmented, BadData, Decoded, Labelled, TrainMaker, Views
from fastdino.data.sampler import Key, Plan
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.source import Source
from fastdino.data.views import reference
from fastdino.data.workers import MadeAhead, Tensors, affordable

log = logging.getLogger(__name__)

_THREADS = 8  # of a process at most: more would wait for its interpreter, which draws and reads
_NAMED = 3  # bad images that a message names


class TrainBatches:
    """Iterator over a rank's micro batches, without end; see :func:`train_batches`."""

    def __init__(
        self,
        maker: TrainMaker,
        batches: MadeAhead[Key],
        plan: Plan,
        start_step: int,
        max_bad: float,
        device: torch.device,
    ) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self.plan, self.max_bad, self.device = plan, max_bad, device
        self._maker, self._batches = maker, batches
        self._made = start_step * plan.accumulate  # micro batches since the run's start
        self.num_bad = 0  # images that could not be read, since this process began
        self.num_reduced = 0  # images that were too large for views by the device, since then
        self._reduced = 0  # those of the present epoch, likewise
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
            self._count(made.tensors, made.notes)
            uploaded = self._maker.upload(made.tensors, self.device)
            made.free()
            return self._batch(uploaded, made.notes)
        batch = self._ahead or self._upload(self._stream)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        batch.record_stream(torch.cuda.current_stream(self.device))
        self._ahead = self._upload(self._stream)
        return batch

    def close(self) -> None:
        """Ends the workers; leaving the iterator to the garbage collector does so too."""
        self._batches.close()

    def _upload(self, stream: torch.cuda.Stream) -> Batch:
        """Starts the copy of the next batch, and what the device makes of it. That of the one before was over long ago,
        but for the very first."""
        self._copied()
        made = next(self._batches)
        self._count(made.tensors, made.notes)
        with torch.cuda.stream(stream):
            uploaded = self._maker.upload(made.tensors, self.device)
            over = torch.cuda.Event()
            over.record(stream)
            batch = self._batch(uploaded, made.notes)

        def copied() -> None:
            over.synchronize()
            made.free()

        self._copied = copied
        return batch

    def _batch(self, uploaded: Tensors, notes: list[list[str]]) -> Batch:
        masks = [uploaded[name] for name in Masks._fields if name in uploaded]
        bad = [image for place in notes for image in place]
        return Batch(self._maker.views(uploaded), Masks(*masks) if masks else None, bad)

    def _count(self, made: Tensors, notes: list[list[str]]) -> None:
        self._count_bad([image for place in notes for image in place])
        if "reduced" in made:
            self._count_reduced(int(made["reduced"].sum()))

    def _count_reduced(self, count: int) -> None:
        """Said when it begins, and after each epoch how many they were."""
        if count and not self.num_reduced:
            log.info("images longer than data.max_side are reduced to it before the device sees them")
        self.num_reduced += count
        self._reduced += count
        if self._made % (self.plan.accumulate * self.plan.steps_per_epoch) == 0 and self._reduced:
            log.info("%d images of an epoch on this rank were longer than data.max_side and reduced", self._reduced)
            self._reduced = 0

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
    maker, threads, name = _maker(config, source, device)
    if rank == 0:
        log.info("views by %s", name)
    keys, shares = plan.micro_batches(rank, start_step), _shares(num_workers, threads)
    batches = MadeAhead(maker, keys, *shares, pinned=device.type == "cuda")
    return TrainBatches(maker, batches, plan, start_step, config.data.max_bad, device)


def _maker(config: Config, source: Source, device: torch.device) -> tuple[TrainMaker, int, str]:
    """What makes the batches, how many threads of a process help each other with it, and what to call it in the log."""
    if config.data.views == "device":
        # Normalised and in patches, where the step would make the same of them.
        as_read = config.model.is_vit and config.data.normalize == "imagenet" and config.engine.uses_bf16(device.type)
        slow = "" if device.type == "cuda" else ", a CPU, where this is slower than data.views=auto"
        return Decoded(config, source, config.model.patch_size if as_read else 0), _THREADS, f"the device{slow}"
    write, name = views.implementation(config.data.views, config.data.channels)
    # Our C leaves the interpreter to other threads, which cost less than processes; Pillow keeps it most of the time.
    return Views(config, source, write), 1 if write is reference.write else _THREADS, name


def _shares(num_workers: int, threads: int) -> tuple[int, int]:
    """Processes, and threads of each, at most ``threads``."""
    processes = math.ceil(num_workers / threads)
    return processes, math.ceil(num_workers / max(processes, 1))


def labelled_batches(
    source: Source,
    size: int,
    batch_size: int,
    num_workers: int,
    crop: float = 0.875,
    channels: int = 3,
    indices: range | None = None,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Every image of ``source`` once, in order: uint8 (B, channels, size, size) views on the CPU, int64 (B,) labels and
    indices.

    DINO v1's evaluation transform, which shows ``crop`` of the shorter side. ``indices``: these images alone. Images
    that cannot be read are left out, with a warning that names them; a batch may have none left.
    """
    images = range(len(source)) if indices is None else indices
    keys = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    batches = MadeAhead(Labelled(source, size, batch_size, crop, channels), map(list, keys), affordable(num_workers))
    try:
        for made, seen in zip(batches, keys, strict=True):
            for message in (message for place in made.notes for message in place):
                log.warning("left out of the evaluation: %s", message)
            read = torch.tensor([place for place, notes in enumerate(made.notes) if not notes], dtype=torch.int64)
            pixels, labels = made.tensors["pixels"][read], made.tensors["labels"][read]
            made.free()
            yield pixels, labels, torch.tensor(seen)[read]
    finally:
        batches.close()


def augmented_batches(
    maker: Augmented, keys: Iterator[list[Key]], num_workers: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The images of ``keys``, in their order: uint8 (B, C, s, s) views on the CPU and int64 (B,) labels.

    Images that cannot be read are left out, with a warning when it first happens; a batch may have none left.
    """
    batches, told = MadeAhead(maker, keys, affordable(num_workers)), set[str]()
    try:
        for made in batches:
            for message in {message for place in made.notes for message in place} - told:
                log.warning("left out of the training: %s", message)
                told.add(message)
            read = torch.tensor([place for place, notes in enumerate(made.notes) if not notes], dtype=torch.int64)
            pixels, labels = made.tensors["pixels"][read], made.tensors["labels"][read]
            made.free()
            yield pixels, labels
    finally:
        batches.close()

"""What the input pipeline costs on this machine and these images, step by step, and what would make it cheaper."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Literal, TypeVar

import numpy as np
import torch

from fastdino.config import Config, ConfigError
from fastdino.data import views
from fastdino.data.loader import train_batches
from fastdino.data.makers import Decoded
from fastdino.data.sources.decode import BadImage, decode
from fastdino.data.sources.opening import open_source
from fastdino.data.sources.packed.shard import Packing
from fastdino.data.sources.source import Source
from fastdino.data.views import fast
from fastdino.data.workers import TOGETHER, affordable

Item = TypeVar("Item")

SAMPLE = 64  # images, evenly over the source
SHORT_SIDE = 512  # of images as `fastdino shard` would pack them
SECONDS = 3.0  # that each step is repeated, at least once over the sample
WORTH_IT = 1.3  # times faster, from which a change is advised
AHEAD = 4  # batches of each worker that are taken before the loader is timed


@dataclass(frozen=True)
class Speed:
    """Seconds per image on one core: processor time, but for reading. None: not to be had here."""

    read: float
    """Wall time of the first reading of each image of the sample: a disk, a network, or what the system remembers."""
    decode: float
    packed: float
    """Decoding the same images as ``fastdino shard --short-side 512`` stores them."""
    reference: float
    """Drawing and making the views by Pillow."""
    fast: float | None
    """The same by our C."""
    device: float | None
    """All that is left to a core where the device makes the views: reading, decoding into a slot, drawing. Of other
    channels than three neither this nor ``fast`` is to be had."""
    loader: float
    """Wall time between images of the loader, of which nothing else waits for its turn."""
    num_workers: int
    shorter: int
    """Median of the images' shorter side."""
    bytes: float
    """Median of the files' bytes."""

    @property
    def best(self) -> float:
        """Processor time of an image by what data.views=auto takes."""
        return self.decode + (self.reference if self.fast is None else self.fast)

    def table(self, wanted: float, what: str) -> str:
        """The figures in a few lines, with the cores that ``wanted`` images/s need, and what to do.

        Args:
            what: what the views are called.
        """
        steps = {
            "read, at first": self.read,
            "decode": self.decode,
            f"decode, packed at {SHORT_SIDE} pixels": self.packed,
            "views, reference": self.reference,
            "views, fast": self.fast,
            "decode and views, reference": self.decode + self.reference,
            "decode and views, fast": None if self.fast is None else self.decode + self.fast,
            "for views by the device": self.device,
            f"loader, {self.num_workers} worker{'s' * (self.num_workers != 1)}": self.loader * max(1, self.num_workers),
        }
        lines = [
            f"{SAMPLE} images, of {self.shorter} pixels at the shorter side and {self.bytes / 1000:.0f} kB; {what}",
            f"{'':32}{'images/s per core':>18}{f'cores for {wanted:,.0f} images/s':>28}",
        ]
        for name, seconds in steps.items():
            if seconds is None:
                lines.append(f"{name:32}{'not to be had':>18}")
            else:
                lines.append(f"{name:32}{1 / seconds:18,.0f}{wanted * seconds:28,.1f}")
        return "\n".join([*lines, *self.advice(wanted)])

    def advice(self, wanted: float) -> list[str]:
        """What makes the pipeline faster, most first; that it is fast enough if nothing does."""
        found = []
        if self.fast is None and self.device is not None:
            found.append(f"build the fast views, which make the same pixels several times as fast: {fast.why_not()}")
        packed = self.best - self.decode + self.packed
        if self.best > WORTH_IT * packed:
            found.append(
                f"pack the images once: fastdino shard SRC DST --short-side {SHORT_SIDE}, of which a core makes "
                f"{self.best / packed:.1f} times as many"
            )
        if self.read > self.best:
            found.append(
                "reading takes longer than all else: pack the images (fastdino shard SRC DST), on a local disk"
            )
        found.append(f"{wanted:,.0f} images/s need {_cores(wanted * self.best)}")
        if self.device is not None and self.best > WORTH_IT * self.device:
            cores = _cores(wanted * self.device)
            found.append(f"where there are fewer, let the GPU make the views, --data.views device: {cores}")
        return found


def _cores(number: float) -> str:
    cores = math.ceil(number)
    return f"{cores} core{'s' * (cores != 1)} per GPU: --data.num-workers {cores}"


def measure(config: Config, seconds: float = SECONDS) -> Speed:
    """Reads, decodes and makes views of a sample of data.root.

    Raises ConfigError for a source that cannot be opened, or of whose sample nothing can be read.
    """
    source = open_source(config.data.root, config.data)
    sample = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)).tolist()
    files, images, read = dict[int, bytes](), list[np.ndarray](), 0.0
    for index in sample:
        started = time.perf_counter()
        try:
            data = source.encoded(index)
            read += time.perf_counter() - started
            images.append(_decode(config, data))
        except BadImage:
            continue
        files[index] = data
    if not files:
        raise ConfigError(f"none of {len(sample)} images of data.root={config.data.root!r} can be read")
    packing = Packing(short_side=SHORT_SIDE, max_pixels=config.data.max_pixels, bits=config.data.bits)
    small = [packing.stored(source, index)[1] for index in files]
    workers, in_colour = affordable(config.data.num_workers), config.data.channels == 3
    return Speed(
        read=read / len(files),
        decode=each([*files.values()], lambda _, data: _decode(config, data), seconds),
        packed=each(small, lambda _, data: _decode(config, data), seconds),
        reference=_views(config, "reference", images, seconds),
        fast=None if fast.why_not() or not in_colour else _views(config, "fast", images, seconds),
        device=_slots(config, source, [*files], seconds) if in_colour else None,
        loader=_loader(config, source, workers, seconds),
        num_workers=workers,
        shorter=round(median(min(image.shape[:2]) for image in images)),
        bytes=median(map(len, files.values())),
    )


def _decode(config: Config, data: bytes) -> np.ndarray:
    return decode(data, "", config.data)


def _views(config: Config, by: Literal["reference", "fast"], images: Sequence[np.ndarray], seconds: float) -> float:
    write, _ = views.implementation(by, config.data.channels)
    out = views.new_views(config.views, config.data.channels)

    def work(turn: int, image: np.ndarray) -> None:
        write(image, views.sample_params(config.run.seed, 0, turn, config.views, (image.shape[1], image.shape[0])), out)

    return each(images, work, seconds)


def _slots(config: Config, source: Source, indices: Sequence[int], seconds: float) -> float:
    """As many together as a worker makes."""
    maker = Decoded(config, source)
    out = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in maker.fields.items()}
    together = min(TOGETHER, config.run.local_batch)
    parts = [[indices[(first + i) % len(indices)] for i in range(together)] for first in range(len(indices))]

    def work(turn: int, part: list[int]) -> None:
        maker.make(out, 0, [(turn, index) for index in part], lambda _: None)

    return each(parts, work, seconds) / together


def each(items: Sequence[Item], work: Callable[[int, Item], object], seconds: float) -> float:
    """Processor time of this thread for an item, once all of them warmed up."""
    for turn, item in enumerate(items):
        work(turn, item)
    started, until = time.thread_time(), time.perf_counter() + seconds
    for turn in count():
        if turn and turn % len(items) == 0 and time.perf_counter() > until:
            return (time.thread_time() - started) / turn
        work(turn, items[turn % len(items)])
    raise AssertionError("count() has no end")


def _loader(config: Config, source: Source, workers: int, seconds: float) -> float:
    run = dataclasses.replace(config.run, local_batch=min(config.run.local_batch, len(source)))
    config = dataclasses.replace(config, run=run, data=dataclasses.replace(config.data, max_bad=1.0))
    cpu = torch.device("cpu")
    batches = train_batches(config, source, rank=0, world_size=1, start_step=0, device=cpu)
    try:
        for _ in range(AHEAD * max(workers, 1)):
            next(batches)
        started, made = time.perf_counter(), 0
        while made < AHEAD or time.perf_counter() - started < seconds:
            next(batches)
            made += 1
        return (time.perf_counter() - started) / (made * run.local_batch)
    finally:
        batches.close()

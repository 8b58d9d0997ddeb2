"""Packs a source into tar shards: in parallel, each verified, and going on where it was stopped."""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastdino.config import ConfigError, DataConfig, UserError
from fastdino.config.errors import require
from fastdino.data.sources.decode import BadImage, decode, ending
from fastdino.data.sources.opening import open_source
from fastdino.data.sources.packed.tar import CLASSES, index_tar
from fastdino.data.sources.source import Source
from fastdino.data.views.reference import joined, pictures
from fastdino.data.workers import end_with
from fastdino.files import whole_file

log = logging.getLogger(__name__)

JOURNAL = "shards.jsonl"
"""A file beside the shards: what they are made of, then a line for each that is finished."""
_VERSION = 1
_QUALITY = 90
_NAMED = 3  # images that a message names
_LOOK = 0.2  # seconds between looks at how far the workers are
_REMEDY = "Make room, or give another folder"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Packs images into tar shards in WebDataset's layout, which load faster than single files.

    SRC is anything that --data.root takes: a folder, other shards, a manifest. DST gets 000000.tar and so on, with
    KEY.jpg and KEY.cls (the class as a number) for each image, in the order of SRC, so that training on DST shows the
    same batches as training on SRC. classes.txt names the classes. Images are stored as they are, byte for byte, unless
    --short-side is given.

    Every image is decoded once: one that cannot be is named and left out. Every shard is read back before it gets its
    name. The command goes on where it was stopped when it is given again; finished shards are verified and kept.

    examples:
      fastdino shard /data/imagenet/train /fast/imagenet
      fastdino shard /data/photos /fast/photos --short-side 512     # large originals: decoding them is what takes time
      fastdino train vit_small_16 --data.root /fast/imagenet
    """

    short_side: int | None = None
    """Images whose shorter side is longer are resized to it (bicubic) and stored as JPEG, those of 2 or more than 3
    channels as .npy of bytes; others are left as they are. Of 512 pixels the smallest local view, 5 % of the area,
    still covers 114."""
    quality: int | None = None
    """Of those JPEGs, 1 to 95; default: 90."""
    per_shard: int = 5000
    """Images per shard."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that pack; default: one per core."""
    max_bad: float = 0.01
    """Largest share of the images that may be unreadable; above it the command ends."""
    max_pixels: int = DataConfig.max_pixels
    """Larger images count as unreadable."""
    bits: int = DataConfig.bits
    """Bits that 16-bit values use, as --data.bits."""
    channels: int = DataConfig.channels
    """Of an image, as --data.channels."""
    range: tuple[float, float] | None = DataConfig.range
    """Values that become 0 and 255, as --data.range."""
    image_column: str = ""
    """Of a table: the column of images, as --data.image-column."""
    label_column: str = ""
    """Of a table: the column of classes."""
    cache: Path = DataConfig.cache
    """As --data.cache: where indexes of shards, and what comes from a URL, are kept."""
    cache_gb: float = DataConfig.cache_gb
    """Size of the cache in GB."""

    def __post_init__(self) -> None:
        require(self.short_side is None or self.short_side >= 1, "--short-side", self.short_side, "at least 1")
        require(self.quality is None or 1 <= self.quality <= 95, "--quality", self.quality, "in [1, 95]")
        needless = self.quality is not None and self.short_side is None
        require(not needless, "--quality", self.quality, "given with --short-side", "else images stay as they are")
        require(self.per_shard >= 1, "--per-shard", self.per_shard, "at least 1")
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
        require(0 <= self.max_bad <= 1, "--max-bad", self.max_bad, "a share in [0, 1]")

    def __call__(self, src: str, dst: Path) -> str:
        """Packs ``src`` into the folder ``dst``; what was done, as a line of text.

        Raises ConfigError, and BadShards for too many bad images or a shard that reads back differently.
        """
        source = open_source(src, replace(self.data, root=src))
        with _Journal(dst, self._what(source)) as journal:
            if source.labels:
                with whole_file(dst / CLASSES, _REMEDY) as path:
                    path.write_text("".join(" ".join(label.split("\n")) + "\n" for label in source.labels), "utf-8")
            bad = self._run(source, dst, journal)
        count, total = -(-len(source) // self.per_shard), len(source) - len(bad)
        left_out = f"; {len(bad)} that cannot be read are left out: {_some(bad)}" if bad else ""
        return f"{total} images in {count} shard{'s' * (count > 1)}: {dst}{left_out}"

    @cached_property
    def data(self) -> DataConfig:
        """How images are read."""
        names = "max_pixels", "bits", "channels", "range", "image_column", "label_column", "cache", "cache_gb"
        return DataConfig(**{name: getattr(self, name) for name in names})

    def _what(self, source: Source) -> dict[str, Any]:
        """What decides the bytes of the shards."""
        names = "short_side", "quality", "per_shard", "max_pixels", "bits", "channels"
        settings = {name: getattr(self, name) for name in names} | {"range": self.range and [*self.range]}
        return {"version": _VERSION, "images": len(source), "source": source.fingerprint(), **settings}

    def _run(self, source: Source, dst: Path, journal: "_Journal") -> list[str]:
        """Packs what is not there yet; the images that were left out."""
        with _pool(self, source, dst) as (pool, progress):
            numbers = range(-(-len(source) // self.per_shard))
            waiting = {pool.submit(_pack, number, journal.records.get(number)) for number in numbers}
            made: dict[int, list[str]] = {}
            with tqdm(total=len(source), desc="shard", unit="image", disable=None) as bar:
                while waiting:
                    done, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
                    for record in map(_result, done):
                        journal.add(record)
                        made[record["shard"]] = record["bad"]
                    bar.update(progress.value - bar.n)
                    bad = [image for number in sorted(made) for image in made[number]]
                    self._check_bad(bad, len(source))
        return bad

    def _check_bad(self, bad: list[str], total: int) -> None:
        if len(bad) > self.max_bad * total:
            raise BadShards(
                f"{len(bad)} of {total} images cannot be read, more than --max-bad {self.max_bad:g} allows: "
                f"{_some(bad)}. Mend or delete them, or raise --max-bad; finished shards are kept"
            )

    def stored(self, source: Source, index: int) -> tuple[str, bytes]:
        """Ending and bytes under which an image is stored. Raises BadImage when it cannot be decoded."""
        data, name = source.encoded(index), source.name(index)
        image = decode(data, name, self.data)
        height, width = image.shape[:2]
        shorter = min(height, width)
        if self.short_side is None or shorter <= self.short_side:
            return ending(data), data
        width, height = (max(1, round(side * self.short_side / shorter)) for side in (width, height))
        small = [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures(image)]
        buffer = io.BytesIO()
        if self.channels not in (1, 3):
            np.save(buffer, joined(small))
            return ".npy", buffer.getvalue()
        try:
            small[0].save(buffer, "JPEG", quality=self.quality or _QUALITY)
        except (OSError, ValueError) as error:
            raise BadImage(name, f"as a JPEG of {width} x {height} pixels: {error}") from error
        return ".jpg", buffer.getvalue()


class BadShards(UserError, RuntimeError):
    """Images or a disk that shards cannot be made of, or on."""


class _Journal:
    """What is finished, in a file that is only ever added to: a line that was cut off is a shard that is made again.

    Raises ConfigError for a folder whose shards are of something else, or that cannot be written.
    """

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.path, self.what = folder / JOURNAL, what
        self.records: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "_Journal":
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tars = sorted(path.name for path in folder.glob("*.tar"))
            self._file = open(self.path, "a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            lines = self._file.read().split(b"\n")
        except BlockingIOError as error:
            raise ConfigError(f"another fastdino shard is packing into {folder}: wait for it") from error
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error.strerror or error}. {_REMEDY}") from error
        if lines == [b""]:
            if tars:
                raise ConfigError(f"{folder} holds {tars[0]}, which this command did not make: give a new folder")
            self._write(self.what)
        else:
            self._read(lines)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Writes down a finished shard, unless it was."""
        if self.records.get(record["shard"]) != record:
            self.records[record["shard"]] = record
            self._write(record)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, lines: list[bytes]) -> None:
        if lines[-1]:
            self._file.write(b"\n")  # ends the line that was cut off
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        was = {"channels": 3, "range": None} | found.pop(0) if found else {}  # which older journals do not name
        for name, now in self.what.items():
            if was.get(name, "missing") != now:
                raise ConfigError(
                    f"{self.path.parent} holds shards of another packing: {name} was {was.get(name)}, now it is {now}. "
                    "Give a new folder, or the same images and flags as before"
                )
        self.records = {record["shard"]: record for record in found}


@dataclass
class _Work:
    """What a worker was forked with."""

    packing: Packing
    source: Source
    folder: Path
    parent: int
    progress: Any
    stop: Any


_work: _Work | None = None


@contextlib.contextmanager
def _pool(packing: Packing, source: Source, folder: Path) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that pack, and the number of images that they are through with. They end with the block."""
    context = multiprocessing.get_context("fork")
    work = _Work(packing, source, folder, os.getpid(), context.Value("q", 0), context.Value("b", 0))
    pool = ProcessPoolExecutor(packing.workers, context, _set_up, (work,))
    try:
        yield pool, work.progress
    finally:
        work.stop.value = 1
        pool.shutdown(cancel_futures=True)


def _set_up(work: _Work) -> None:
    """Ctrl-C reaches the whole process group; the parent says what is to be done."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(work.parent,), daemon=True).start()


def _result(done: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return done.result()
    except BrokenProcessPool as error:
        raise BadShards("a worker died, most often because memory ran out: lower --workers and go on") from error


def _pack(number: int, record: dict[str, Any] | None) -> dict[str, Any]:
    """Makes a shard and reads it back, unless ``record`` is of a shard that is there as it was made; its record."""
    assert _work
    packing, path = _work.packing, _work.folder / f"{number:06d}.tar"
    first = number * packing.per_shard
    indices = range(first, min(first + packing.per_shard, len(_work.source)))
    if record and path.exists() and _digest(path) == record["sha256"]:
        _advance(len(indices))
        return record
    bad: list[str] = []
    with whole_file(path, _REMEDY) as partial:
        written = _write(partial, indices, bad)
        _check_read_back(partial, path, written)
        digest = _digest(partial)
    return {"shard": number, "sha256": digest, "images": len(written), "bad": bad}


def _write(path: Path, indices: range, bad: list[str]) -> list[tuple[bytes, str]]:
    """The shard; digest and class of each image in it. Those that cannot be read are added to ``bad``."""
    assert _work
    source, written = _work.source, []
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            try:
                suffix, data = _work.packing.stored(source, index)
            except BadImage as error:
                bad.append(f"{error.name}: {error.reason}")
            else:
                label = source.label(index)
                word = str(label) if label >= 0 else ""
                _add(tar, f"{index:09d}{suffix}", data)
                if word:
                    _add(tar, f"{index:09d}.cls", word.encode())
                written.append((hashlib.sha256(data).digest(), word))
            _advance(1)
        tar.close()
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the memory
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _advance(images: int) -> None:
    assert _work
    if _work.stop.value or os.getppid() != _work.parent:
        raise BadShards("stopped")
    with _work.progress.get_lock():
        _work.progress.value += images


def _check_read_back(path: Path, name: Path, written: list[tuple[bytes, str]]) -> None:
    """Raises BadShards unless the shard holds what was written."""
    index = index_tar(path, arrays=True)
    with open(path, "rb") as file:
        found = []
        for offset, size, word in zip(index.offset.tolist(), index.size.tolist(), index.word.tolist(), strict=True):
            data = os.pread(file.fileno(), max(size, 0), offset)
            found.append((hashlib.sha256(data).digest(), index.words[word] if word >= 0 else ""))
    if found != written:
        raise BadShards(f"{name} reads back differently from what was written: the disk is not to be trusted")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(bad: list[str]) -> str:
    return "; ".join(bad[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")

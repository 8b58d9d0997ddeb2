"""Where each image lies in the files that hold many: arrays, made once for each state of a file and kept."""

import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fastdino.data.sources.names import Names
from fastdino.data.workers import affordable

log = logging.getLogger(__name__)

_VERSION = 1  # of what is kept; another one is made anew
_WORKERS = 16  # processes that index, at most


class Stamp(NamedTuple):
    """The state of a file: another size or time means other images."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Index:
    """The n images of one file."""

    offset: np.ndarray
    """(n,) int64: the image's first byte."""
    size: np.ndarray
    """(n,) int64: its bytes. Below 0 there is none, for a reason in FLAWS."""
    word: np.ndarray
    """(n,) int32: which of ``words`` names its class; -1: none."""
    words: list[str]
    """The different words that name classes in this file."""
    names: Names
    """What the images are called in this file; empty where they have numbers only."""

    def __len__(self) -> int:
        return len(self.offset)


DAMAGED, DUPLICATE, NULL = -1, -2, -3
FLAWS = {
    DAMAGED: "damaged, so the image behind it is lost",
    DUPLICATE: "a second image of this name in its shard; the first is used",
    NULL: "null: the row holds no bytes of an image",
}
"""Why there is no image where one should be, by the size that says so."""


def indexes(files: Sequence[Path], make: Callable[[Path], Index], kind: str, cache: Path) -> list[tuple[Stamp, Index]]:
    """The index of each file and the state that it describes, from ``cache`` where that is still the file's state.

    Args:
        files: absolute paths.
        make: reads an index off a file.
        kind: what ``make`` does, and with which settings: others are kept apart.
        cache: a folder. Where it cannot be written, the next run makes the indexes again.

    Raises whatever ``make`` does; OSError for a file that is not there.
    """
    key = hashlib.sha256(json.dumps([_VERSION, kind, *map(str, files)]).encode()).hexdigest()[:32]
    kept = cache / "index" / f"{key}.npz"
    with locked(kept):  # the other ranks of this machine wait, and find it made
        known = _load(kept)
        stamps = [Stamp.of(os.stat(file)) for file in files]
        missing = [i for i, stamp in enumerate(stamps) if i >= len(known) or known[i][0] != stamp]
        if not missing:
            return known
        found: list[Any] = [*known, *[None] * (len(files) - len(known))]
        made = _made(make, [files[i] for i in missing])
        bar = tqdm(made, total=len(missing), desc="index", unit="file", leave=False, disable=None, delay=1)
        for i, index in zip(missing, bar, strict=True):
            found[i] = (stamps[i], index)
        _save(kept, found)
    return found


def _made(make: Callable[[Path], Index], files: list[Path]) -> Iterator[Index]:
    workers = min(affordable(_WORKERS), len(files))
    if workers < 2:
        yield from map(make, files)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(make, files)


def _save(path: Path, known: list[tuple[Stamp, Index]]) -> None:
    """Keeps them; without a place for them the next run is slower, and nothing else."""
    every = [index for _, index in known]
    arrays = {name: np.concatenate([getattr(i, name) for i in every]) for name in ("offset", "size", "word")}
    arrays |= {"ends": np.concatenate([i.names.ends for i in every]), "count": np.array([*map(len, every)])}
    arrays |= {"named": np.array([len(i.names) for i in every]), "stamp": np.array([stamp for stamp, _ in known])}
    arrays["block"] = np.frombuffer(b"".join(i.names.block for i in every), np.uint8)
    arrays["words"] = np.frombuffer(json.dumps([i.words for i in every]).encode(), np.uint8)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # a lock may not reach other machines
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        log.warning("the index of the images cannot be kept, so the next run makes it again: %s", error)
        with suppress(OSError):
            partial.unlink()


def _load(path: Path) -> list[tuple[Stamp, Index]]:
    """What was kept; none where nothing was, or it is damaged."""
    try:
        with np.load(path) as kept:
            arrays = dict(kept)
        words = json.loads(arrays["words"].tobytes())
        block, at = arrays["block"].tobytes(), np.cumsum(arrays["count"])[:-1]
        offset, size, word = (np.split(arrays[name], at) for name in ("offset", "size", "word"))
        names = _cut(block, np.split(arrays["ends"], np.cumsum(arrays["named"])[:-1]))
        every = map(Index, offset, size, word, words, names)
        return list(zip((Stamp(*stamp) for stamp in arrays["stamp"].tolist()), every, strict=True))
    except Exception:  # whatever a damaged file makes of numpy, zipfile and json
        return []


def _cut(block: bytes, ends: list[np.ndarray]) -> Iterator[Names]:
    """The names of each file out of the block of all."""
    start = 0
    for part in ends:
        stop = start + (int(part[-1]) if len(part) else 0)
        yield Names.of(block[start:stop], part)
        start = stop


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time; all at once where no lock can be had, as on some network disks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

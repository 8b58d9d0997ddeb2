"""A folder of files that can be made again: downloads and the like. The least recently used go when room is needed."""

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.packed.images import Archive
from fastdino.data.sources.packed.index import locked

_AT_ONCE = 8  # files that are made at once
_ABANDONED = 24 * 3600  # seconds after which a partial file is nobody's


@dataclass(frozen=True)
class Item:
    """A file of the cache."""

    name: str
    """What to call it in a message."""
    key: str
    """What decides its bytes: another key is another file."""
    size: int
    """Its bytes, as far as they are known before it is made."""
    make: Callable[[Path], None]
    """Writes it to a path. Raises OSError or ConfigError."""


def cached(items: Sequence[Item], config: DataConfig, what: str) -> list[Archive]:
    """The items as files of ``config.cache``, made where they are not there. ``what`` is done is for a progress bar.

    All of them stay while there is room: a run reads its images in random order, so each file is needed all the time.
    One that another run's files pushed out is made again when it is read.

    Raises ConfigError when they are larger than config.cache_gb, or cannot be made.
    """
    folder, limit = config.cache / "files", int(config.cache_gb * 1e9)
    paths = [_path(folder, item) for item in items]
    needed = sum(item.size for item in items)
    if needed > limit:
        raise ConfigError(
            f"{items[0].name} and the files with it take {needed / 1e9:.3g} GB, and data.cache_gb={config.cache_gb:g} "
            "holds fewer: images are read in random order, so all have to be there. Raise data.cache_gb"
        )
    missing = [(item, path) for item, path in zip(items, paths, strict=True) if not _touch(path)]
    _make_room(folder, limit - sum(item.size for item, _ in missing), {*paths})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        made = pool.map(lambda pair: _make(*pair), missing)
        for _ in tqdm(made, total=len(missing), desc=what, unit="file", leave=False, disable=None):
            pass
    again = [partial(_make_again, item, path, {*paths}, limit) for item, path in zip(items, paths, strict=True)]
    return [Archive(item.name, path, make) for item, path, make in zip(items, paths, again, strict=True)]


def _path(folder: Path, item: Item) -> Path:
    return folder / f"{hashlib.sha256(item.key.encode()).hexdigest()[:24]}-{os.path.basename(item.name)[-100:]}"


def _touch(path: Path) -> bool:
    """Marks the file as used now, by its time of access; its time of change is 0 for good. False where it is not."""
    try:
        os.utime(path, ns=(time.time_ns(), 0))
    except OSError:
        return False
    return True


def _make(item: Item, path: Path) -> None:
    """The file, unless another process made it meanwhile. Raises ConfigError."""
    with locked(path):
        if _touch(path):
            return
        work = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # a lock may not reach other machines
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            item.make(work)
            _touch(work)
            os.replace(work, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}. Set another data.cache") from error
        finally:
            with suppress(OSError):
                work.unlink()


def _make_again(item: Item, path: Path, keep: set[Path], limit: int) -> None:
    _make_room(path.parent, limit - item.size, keep)
    _make(item, path)


def _make_room(folder: Path, limit: int, keep: set[Path]) -> None:
    """Removes the least recently used files, none of ``keep``, until the others take ``limit`` bytes at most.

    What is being written stays, but not what was left by a process that was killed long ago.
    """
    with locked(folder / "room"):
        files = _listed(folder)
        total = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_atime_ns):
            if total <= limit:
                break
            written = path.suffix == ".partial" and time.time() - status.st_mtime < _ABANDONED
            if path not in keep and path.suffix != ".lock" and not written:
                with suppress(OSError):
                    path.unlink()
                total -= status.st_size


def _listed(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # it has just been removed
                found.append((Path(entry.path), entry.stat()))
    return found

"""Where checkpoints are kept: in a folder, one below it for each step, or behind a URL (objects.py)."""

import contextlib
import logging
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastdino.training.checkpoint.manifest import MANIFEST, CheckpointError
from fastdino.training.checkpoint.tensors import copied

log = logging.getLogger(__name__)

Content = Callable[[], Iterable[memoryview]]
"""What a file holds, from its first byte to its last, each time it is called."""


class Draft(NamedTuple):
    """A checkpoint that is being written, which nobody takes for one."""

    step: int
    attempt: str
    """Another one for each save, and the same on all ranks."""


class Store(ABC):
    """Where a run's checkpoints are kept: each is there whole, or not at all.

    What the system refuses is an OSError, but for the steps that cannot be listed.
    """

    @abstractmethod
    def name(self, step: int) -> str:
        """Of the checkpoint of ``step``, for a person."""

    @abstractmethod
    def steps(self) -> list[int]:
        """Of the checkpoints that are there, ascending. Whatever else lies there, copies and notes, is passed over.

        Raises CheckpointError when they cannot be listed.
        """

    @abstractmethod
    def manifest(self, step: int) -> bytes:
        """What the manifest of ``step`` holds."""

    @abstractmethod
    def open(self, step: int, file: str) -> BinaryIO:
        """A file of a checkpoint, to be read from any position."""

    @abstractmethod
    def write(self, draft: Draft, file: str, content: Content) -> tuple[str, dict[str, int]]:
        """Writes a file of a draft, each rank its own; returns the name that it has there, its bytes and crc32."""

    @abstractmethod
    def commit(self, draft: Draft, manifest: str) -> None:
        """From here on the draft, whose files are all written, is the checkpoint of its step; rank 0 only."""

    @abstractmethod
    def abandon(self, draft: Draft) -> None:
        """Removes a draft, as far as the system lets it; rank 0 only."""

    @abstractmethod
    def remove(self, step: int) -> None:
        """Removes the checkpoint of ``step``."""

    @abstractmethod
    def clear(self) -> None:
        """Removes what a killed process did not finish; only for who alone writes here."""

    @abstractmethod
    def mark(self, name: str) -> None:
        """Leaves a small file, to find out whether it can; makes the place where there is none."""

    @abstractmethod
    def marked(self, name: str) -> bool:
        """Whether such a file is to be seen from here."""

    @abstractmethod
    def unmark(self, name: str) -> None:
        """Removes it."""

    def prune(self, keep: int, keep_for_good: Iterable[int]) -> None:
        """Removes all but the newest ``keep`` checkpoints and the steps in ``keep_for_good``; rank 0 only.

        A disk that refuses is warned of: too many checkpoints end no run.
        """
        kept = set(keep_for_good)
        try:
            for step in self.steps()[:-keep]:
                if step not in kept:
                    self.remove(step)
        except (OSError, CheckpointError) as error:
            log.warning("an old checkpoint could not be removed: %s", error)


class Folder(Store):
    """A folder that all ranks share, with ``step-00001234`` below it for each checkpoint.

    A draft has another name and is renamed when it is whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def name(self, step: int) -> str:
        return str(self._of(step))

    def steps(self) -> list[int]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be listed: {error.strerror}") from error
        found = [(name, int(name[5:])) for name in names if re.fullmatch("step-[0-9]+", name)]
        return sorted(step for name, step in found if self._of(step).name == name and self._of(step).is_dir())

    def manifest(self, step: int) -> bytes:
        return (self._of(step) / MANIFEST).read_bytes()

    def open(self, step: int, file: str) -> BinaryIO:
        return (self._of(step) / file).open("rb")

    def write(self, draft: Draft, file: str, content: Content) -> tuple[str, dict[str, int]]:
        folder = self._draft(draft)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / file).open("wb") as opened:
            size = copied(content(), opened)
            opened.flush()
            os.fsync(opened.fileno())
        return file, size

    def commit(self, draft: Draft, manifest: str) -> None:
        folder, final = self._draft(draft), self._of(draft.step)
        (folder / MANIFEST).write_text(manifest)
        _sync(folder / MANIFEST)
        _sync(folder)
        # the same step again: it was damaged, so training resumed from an older one
        doomed = _doom(final) if os.path.lexists(final) else None
        folder.rename(final)
        _sync(self.path)
        if doomed:
            _remove(doomed)

    def abandon(self, draft: Draft) -> None:
        _remove(self._draft(draft))

    def remove(self, step: int) -> None:
        _remove(_doom(self._of(step)))

    def clear(self) -> None:
        for stale in (*self.path.glob(".writing-*"), *self.path.glob(".removing-*")):
            _remove(stale)

    def mark(self, name: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text("fastdino")

    def marked(self, name: str) -> bool:
        return (self.path / name).exists()

    def unmark(self, name: str) -> None:
        (self.path / name).unlink()

    def _of(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _draft(self, draft: Draft) -> Path:
        return self.path / f".writing-{draft.step:08d}-{draft.attempt}"


def at(place: str, run: Path) -> Store:
    """What ``run.checkpoints`` names: a URL, or a folder, which is in the folder ``run`` unless its path is absolute.

    Raises ConfigError for a URL of a kind that is not known here.
    """
    if "://" not in place or place.startswith("file://"):
        return Folder(run / place.removeprefix("file://"))
    from fastdino.training.checkpoint.objects import Objects  # fsspec, which a folder needs not

    return Objects(place)


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _doom(path: Path) -> Path:
    """Gives a checkpoint that is removed another name, which it returns: half a folder never has a valid one."""
    doomed = path.with_name(f".removing-{path.name}")
    _remove(doomed)  # where something of that name was left
    return path.rename(doomed)


def _remove(path: Path) -> None:
    """Removes a file or a folder, as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()

"""Checkpoints behind a URL, of any kind that fsspec knows: objects that are never written over, and manifests."""

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import fsspec

from fastdino.config import ConfigError
from fastdino.training.checkpoint.manifest import CheckpointError, Manifest, NewerFormatError
from fastdino.training.checkpoint.storage import Content, Draft, Store
from fastdino.training.checkpoint.tensors import PIECE, blocks, copied

log = logging.getLogger(__name__)


class Objects(Store):
    """``data/STEP-RANK-HASH`` below a URL for what ranks write, and ``manifests/STEP.json``, which make checkpoints.

    A store has no rename, but puts one object whole or not at all: so a checkpoint is there with its manifest, and gone
    with it. An object is named by its content, so that two writers never disagree on one. No list of a store decides
    whether a checkpoint is complete.

    Raises ConfigError for a URL that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self._url)
        except Exception as error:  # of a hundred libraries
            raise ConfigError(
                f"run.checkpoints={url!r} cannot be used: {_said(error)}. Give a URL that fsspec knows, such as "
                "s3://bucket/run, and install the package that it asks for"
            ) from error

    def name(self, step: int) -> str:
        return f"{self._url}/manifests/{step:08d}.json"

    def steps(self) -> list[int]:
        try:
            names = self._listed("manifests")
        except OSError as error:
            raise CheckpointError(f"{self._url}/manifests cannot be listed: {_said(error)}") from error
        found = [re.fullmatch(r"([0-9]{8,})\.json", name) for name in names]
        return sorted(int(match[1]) for match in found if match)

    def manifest(self, step: int) -> bytes:
        with _os_errors():
            return bytes(self._system.cat_file(f"{self._root}/manifests/{step:08d}.json"))

    def open(self, step: int, file: str) -> BinaryIO:
        with _os_errors():
            opened: BinaryIO = self._system.open(f"{self._root}/{file}", "rb")
            if opened.seekable():
                return opened
            with opened, contextlib.ExitStack() as stack:  # one without ranges: through a file that nobody sees
                local = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(opened, local, PIECE)
                local.seek(0)
                stack.pop_all()
                return local

    def write(self, draft: Draft, file: str, content: Content) -> tuple[str, dict[str, int]]:
        digest = hashlib.blake2b(digest_size=8)
        size = copied(_hashed(content(), digest))
        name = f"data/{draft.step:08d}-{file.removesuffix('.safetensors')}-{digest.hexdigest()}"
        path = f"{self._root}/{name}"
        with _os_errors():
            self._system.invalidate_cache()
            if self._system.exists(path):
                with self._system.open(path, "rb") as opened:
                    if copied(blocks(opened)) == size:
                        return name, size
                self._system.rm_file(path)  # the rest of a write that was cut off: no checkpoint can be of it
            with self._system.open(path, "wb") as opened:
                copied(content(), opened)
        return name, size

    def commit(self, draft: Draft, manifest: str) -> None:
        with _os_errors():
            self._system.pipe_file(f"{self._root}/manifests/{draft.step:08d}.json", manifest.encode())

    def abandon(self, draft: Draft) -> None:
        """Nothing: what no manifest names goes when the next checkpoint is there."""

    def clear(self) -> None:
        """Nothing, as in :meth:`abandon`."""

    def remove(self, step: int) -> None:
        with _os_errors():
            self._system.rm_file(f"{self._root}/manifests/{step:08d}.json")

    def prune(self, keep: int, keep_for_good: Iterable[int]) -> None:
        super().prune(keep, keep_for_good)
        try:
            self._sweep()
        except (OSError, CheckpointError) as error:
            log.warning("objects of old checkpoints could not be removed: %s", error)

    def mark(self, name: str) -> None:
        with _os_errors():
            for folder in ("", "/data", "/manifests"):  # which some kinds have to make; never a bucket that is mistyped
                with contextlib.suppress(FileExistsError, NotImplementedError):
                    self._system.mkdir(self._root + folder, create_parents=False)
            self._system.pipe_file(f"{self._root}/{name}", b"fastdino")

    def marked(self, name: str) -> bool:
        with _os_errors():
            self._system.invalidate_cache()
            return bool(self._system.exists(f"{self._root}/{name}"))

    def unmark(self, name: str) -> None:
        with _os_errors():
            self._system.rm_file(f"{self._root}/{name}")

    def _sweep(self) -> None:
        """Removes objects that no manifest names; of steps after the newest, they may be of a save under way."""
        named, newest = set[str](), -1
        for step in self.steps():
            try:
                named |= Manifest.from_json(self.manifest(step), self.name(step)).files.keys()
            except NewerFormatError:
                raise
            except CheckpointError:  # damaged: what it named cannot be loaded
                continue
            newest = step
        for name in self._listed("data"):
            if f"data/{name}" not in named and int(name.partition("-")[0]) <= newest:
                with _os_errors():
                    self._system.rm_file(f"{self._root}/data/{name}")

    def _listed(self, folder: str) -> list[str]:
        """The names of what is below ``folder``."""
        with _os_errors():
            self._system.invalidate_cache()
            try:
                found = self._system.ls(f"{self._root}/{folder}", detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)


def _hashed(content: Iterable[memoryview], digest: Any) -> Iterator[memoryview]:
    for piece in content:
        digest.update(piece)
        yield piece


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Makes an OSError of whatever the many libraries, and the network, raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(_said(error)) from error


def _said(error: BaseException) -> str:
    """In one line."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")

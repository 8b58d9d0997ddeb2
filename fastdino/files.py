"""Files that people are given: whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdino.config import ConfigError


def check_folder(folder: Path) -> None:
    """Raises ConfigError where nothing could be written in ``folder``, which it does not make: better before hours of
    work than after them."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write to {folder}: {reason}. Name another folder with --out") from error


@contextmanager
def whole_file(path: Path, remedy: str = "Name another file with --out") -> Iterator[Path]:
    """A path to write to: what it holds when the block ends is at ``path``, and nothing is left when the block fails.

    Makes the folder. Raises ConfigError, which ``remedy`` ends, before the block runs where that can be known, when
    nothing can be written.
    """
    partial = path.with_name(path.name + ".partial")
    if os.path.exists(path) and not os.path.isfile(path):  # such as a folder, or a device that a rename would replace
        raise ConfigError(f"cannot write {path}: it is there and no file. {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. {remedy}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def whole_folder(path: Path, names: set[str]) -> Iterator[Path]:
    """A folder to fill with files ``names``: it is at ``path`` when the block ends, and gone when the block fails.

    A folder there that holds nothing but such files is replaced. Raises ConfigError, before the block runs where that
    can be known, when nothing can be written.
    """
    path = Path(os.path.realpath(path))
    work: Path | None = None
    try:
        if strangers := {*os.listdir(path)} - names if os.path.lexists(path) else set():
            raise ConfigError(f"cannot write {path}: it holds {min(strangers)}. Name a new folder with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        (work / "new").mkdir()
        yield work / "new"
        if path.exists():
            os.rename(path, work / "old")
        try:
            os.rename(work / "new", path)
        except OSError:
            os.rename(work / "old", path)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. Name another folder with --out") from error
    finally:
        if work and (path.exists() or not (work / "old").exists()):
            shutil.rmtree(work, ignore_errors=True)

"""Files that people are given: whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdino.config import ConfigError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to: what it holds when the block ends is at ``path``, and nothing is left when the block fails.

    Makes the folder. Raises ConfigError, before the block runs where that can be known, when nothing can be written.
    """
    partial = path.with_name(path.name + ".partial")
    if os.path.exists(path) and not os.path.isfile(path):  # such as a folder, or a device that a rename would replace
        raise ConfigError(f"cannot write {path}: it is there and no file. Name another file with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. Name another file with --out") from error
    finally:
        with suppress(OSError):
            partial.unlink()

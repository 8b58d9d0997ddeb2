"""A folder of images, as people have them: nested, linked, of any format that Pillow reads."""

import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.decode import decode, extensions, file_bytes, image_endings, warn_of_unused_bits
from fastdino.data.sources.names import Names, printable
from fastdino.data.sources.source import Room

log = logging.getLogger(__name__)

TAKEN = (
    "a folder of images, .tar shards or .parquet files (a folder, a glob or shards/{000..099}.tar), also behind a URL, "
    "a folder of datasets.save_to_disk, a .csv or .jsonl with paths; several with weights as a:0.7 b:0.3, or a .yaml"
)
"""What ``--data.root`` takes, for a message about what it does not."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split that a folder's name in lower case stands for. Such a name is never that of a class."""


def split_folders(root: str | Path) -> dict[str, Path]:
    """The folders directly below ``root`` that hold a split of the data: "train", "val" and "test", those that exist.

    Raises ConfigError when two folders stand for one split.
    """
    found: dict[str, Path] = {}
    for folder in _folders(Path(os.path.expanduser(root))):
        split = SPLITS.get(folder.name.lower())
        if split is None:
            continue
        if split in found:
            raise ConfigError(
                f"{root} holds {found[split].name}/ and {folder.name}/, two folders of one split: rename one of them"
            )
        found[split] = folder
    return found


def _folders(root: Path) -> list[Path]:
    """Those below ``root`` by name; none where it cannot be listed, which reading its images will say."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError):
        return []


class FileSource:
    """Images that are files of their own.

    Args:
        folder: what the paths are relative to.
        paths: in the order of the images.
        labels: (len(paths),) int32, -1: none.
        config: how images are decoded.
    """

    labels: list[str]

    def __init__(self, folder: bytes, paths: list[bytes], labels: np.ndarray, config: DataConfig) -> None:
        self.folder, self._paths, self._labels, self._config = folder, Names(paths), labels, config

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Bytes (height, width, channels) and label (-1: none); raises BadImage."""
        return decode(self.encoded(index), self.name(index), self._config, room), self.label(index)

    def encoded(self, index: int) -> bytes:
        """The file; raises BadImage."""
        path = Path(os.fsdecode(os.path.join(self.folder, self._paths[index])))
        return file_bytes(path, self.name(index))

    def label(self, index: int) -> int:
        """The label alone, without reading the image."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Path below the folder."""
        return printable(self._paths[index])

    def fingerprint(self) -> str:
        """Of the paths, in order: a data set that was moved whole keeps it."""
        return self._paths.digest()

    def stamp(self) -> str:
        """Of the paths, and of the size and time of each file, 0 where there is none."""
        return self._paths.digest(np.array([self._state(i) for i in range(len(self))], np.int64))

    def _state(self, index: int) -> tuple[int, int]:
        try:
            found = os.stat(os.path.join(self.folder, self._paths[index]))
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns


class FolderSource(FileSource):
    """Every image under a folder, in any nesting: a folder's own in the order of their names, then its subfolders'.

    The label of an image in a subfolder is that of the folder's topmost part (``root/cat/2021/a.jpg`` is of class
    ``cat``; classes are sorted by name); an image directly under the root has label -1. Links are followed. Names that
    begin with a dot are left out. Where .npy files count as images (data.takes_arrays) and lie beside others, the log
    says so.

    Args:
        path: the folder; ``~`` is the user's home.
        config: how images are decoded.

    Raises ConfigError when the folder is missing, is not a folder, cannot be listed or holds no image.
    """

    def __init__(self, path: str | Path, config: DataConfig | None = None) -> None:
        config = config or DataConfig()
        root = os.fsencode(os.path.expanduser(path))
        check_folder(root)
        others: Counter[str] = Counter()
        paths = list(scan(root, image_endings(config.takes_arrays), others))
        if not paths:
            raise ConfigError(_no_images(printable(root), config.takes_arrays, others))
        classes = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        names = sorted({name for name in classes if name is not None})
        label = {name: i for i, name in enumerate(names)} | {None: -1}
        labels = np.fromiter((label[name] for name in classes), np.int32, len(paths))
        super().__init__(root, paths, labels, config)
        self.labels = [printable(name) for name in names]
        arrays = sum(path.lower().endswith(b".npy") for path in paths)
        if 0 < arrays < len(paths):
            log.warning("%s: %d .npy files count as images, like the %d others", path, arrays, len(paths) - arrays)
        warn_of_unused_bits(printable(root), len(self), self.encoded, config)


def check_folder(root: bytes) -> None:
    """Raises ConfigError that says what is at ``root`` instead of a folder."""
    try:
        if stat.S_ISDIR(os.stat(root).st_mode):
            return
        what = "is a file, not a folder of images"
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist"
    except PermissionError as error:
        what = f"may not be entered ({error.strerror}), or a folder above it"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({error})"
    raise ConfigError(f"{printable(root)!r} {what}: give {TAKEN}")


def scan(root: bytes, endings: frozenset[bytes], others: Counter[str]) -> Iterator[bytes]:
    """Paths of images below ``root``, relative to it, told by their ``endings``; counts those of ``others``."""
    pending: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [
        (b"", ())
    ]  # folders to read: path, and the identity of each folder above
    while pending:
        folder, above = pending.pop()
        full = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(full)
            identity = (status.st_dev, status.st_ino)
            if identity in above:  # a link to a folder above: following it would never end
                continue
            with os.scandir(full) as entries:
                listing = sorted((e.name, _kind(e, endings)) for e in entries if not e.name.startswith(b"."))
        except OSError as error:
            at = printable(error.filename or full)
            raise ConfigError(f"cannot list folder {at}: {error.strerror or error}") from error
        folders = []
        for name, kind in listing:
            path = folder + b"/" + name if folder else name
            if kind == "folder":
                folders.append((path, (*above, identity)))
            elif kind == "image":
                yield path
            else:
                others[printable(os.path.splitext(name)[1].lower()) or "no ending"] += 1
        pending.extend(reversed(folders))


def _kind(entry: os.DirEntry[bytes], endings: frozenset[bytes]) -> Literal["folder", "image", "other"]:
    """What a name in a folder is. Raises OSError when it may be a folder, but the file system does not say.

    A link that leads nowhere is an image by its name: reading it names it, where leaving it out would hide it.
    """
    image = os.path.splitext(entry.name)[1].lower() in endings
    try:
        if entry.is_dir():
            return "folder"
    except OSError as error:
        if not image and error.errno != errno.ELOOP:  # a circle of links is no folder
            raise
    return "image" if image and (entry.is_symlink() or entry.is_file()) else "other"


def _no_images(path: str, arrays: bool, others: Counter[str]) -> str:
    found = ", ".join(f"{count} with {ending}" for ending, count in others.most_common(5)) or "no files at all"
    hint = "" if arrays or ".npy" not in others else " (.npy files are images with data.range, or with other channels)"
    return (
        f"{path!r} holds no images. Found below it: {found}{hint}. "
        f"Looked for files ending in {' '.join(sorted(extensions(arrays)))}. "
        f"Give {TAKEN}"
    )

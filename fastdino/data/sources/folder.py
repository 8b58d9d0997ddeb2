"""A folder of images, as people have them: nested, linked, of any format that Pillow reads."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastdino.config import ConfigError
from fastdino.data.sources.decode import decode, extensions

SPLITS = {
    "train": "train",
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split that a folder's name in lower case stands for. Such a name is never that of a class."""


def split_folders(root: str | Path) -> dict[str, Path]:
    """The folders directly below ``root`` that hold a split of the data: "train", "val" and "test", those that exist.

    Raises ConfigError when two folders stand for one split.
    """
    found: dict[str, Path] = {}
    for folder in _folders(Path(root).expanduser()):
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
    except OSError:
        return []


class FolderSource:
    """Every image under a folder, in any nesting: a folder's own in the order of their names, then its subfolders'.

    The label of an image in a subfolder is that of the folder's topmost part (``root/cat/2021/a.jpg`` is of class
    ``cat``; classes are sorted by name); an image directly under the root has label -1. Links are followed. Names that
    begin with a dot are left out. Paths are kept in one block of bytes: a list of a million strings would be copied
    into every worker, page by page, as reference counts are written.

    Raises ConfigError when the folder is missing, is not a folder, cannot be listed or holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = os.fsencode(os.path.expanduser(path))
        if not os.path.isdir(self.root):
            what = "is a file, not a folder of images" if os.path.exists(self.root) else "does not exist"
            raise ConfigError(f"{os.fspath(path)!r} {what}: give a folder of images")
        others: Counter[str] = Counter()
        paths = list(_scan(self.root, others))
        if not paths:
            raise ConfigError(_no_images(os.fspath(path), others))
        self._block = b"".join(paths)
        self._ends = np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)))
        classes = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        names = sorted({name for name in classes if name is not None})
        label = {name: i for i, name in enumerate(names)} | {None: -1}
        self._labels = np.fromiter((label[name] for name in classes), np.int32, len(paths))
        self.labels = [_printable(name) for name in names]

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """RGB image and label (-1: directly under the root); raises BadImage."""
        path = Path(os.fsdecode(os.path.join(self.root, self._relative(index))))
        return decode(path, self.name(index)), self.label(index)

    def label(self, index: int) -> int:
        """The label alone, without reading the image."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Path below the root."""
        return _printable(self._relative(index))

    def fingerprint(self) -> str:
        """A checksum of the names below the root, in order."""
        return hashlib.blake2b(self._block + self._ends.tobytes(), digest_size=16).hexdigest()

    def _relative(self, index: int) -> bytes:
        start = self._ends[index - 1] if index > 0 else 0
        return self._block[start : self._ends[index]]


def _scan(root: bytes, others: Counter[str]) -> Iterator[bytes]:
    """Paths of images below ``root``, relative to it; counts the endings of ``others``, files that are no images."""
    known = {os.fsencode(ending) for ending in extensions()}
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
                listing = sorted((entry for entry in entries if not entry.name.startswith(b".")), key=lambda e: e.name)
        except OSError as error:
            raise ConfigError(f"cannot list folder {_printable(full)}: {error.strerror}") from error
        folders = []
        for entry in listing:
            path = folder + b"/" + entry.name if folder else entry.name
            if entry.is_dir():
                folders.append((path, (*above, identity)))
            elif os.path.splitext(entry.name)[1].lower() in known and (entry.is_file() or entry.is_symlink()):
                yield path  # a dangling link too: reading it names it, where leaving it out would hide it
            else:
                others[_printable(os.path.splitext(entry.name)[1].lower()) or "no ending"] += 1
        pending.extend(reversed(folders))


def _no_images(path: str, others: Counter[str]) -> str:
    found = ", ".join(f"{count} with {ending}" for ending, count in others.most_common(5)) or "no files at all"
    return (
        f"{path!r} holds no images. Found below it: {found}. "
        f"Looked for files ending in {' '.join(sorted(extensions()))}"
    )


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")

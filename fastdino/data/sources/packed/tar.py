"""Tar shards in WebDataset's layout: KEY.jpg beside KEY.cls. One pass over the headers finds every image.

The format is POSIX's ustar and pax (IEEE Std 1003.1, "pax", extended description) with GNU's long names.
"""

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.decode import image_endings
from fastdino.data.sources.names import Names
from fastdino.data.sources.packed.images import Archive, PackedSource
from fastdino.data.sources.packed.index import DAMAGED, DUPLICATE, Index

log = logging.getLogger(__name__)

_BLOCK = 512
_WINDOW = 2048  # bytes read at once: a small member and the next header come along
_STRETCH = 1 << 20  # bytes searched at once for the header after a damaged one
_MAX_NAME = 1 << 20  # bytes of a long name, above which its header is damaged
_BLANKS, _ZEROS = 8 * ord(" "), bytes(_BLOCK)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

CLASSES = "classes.txt"
"""A file beside shards: the names of the classes that KEY.cls counts, a line each."""


def open_shards(shards: Sequence[Archive], classes: str | None, config: DataConfig) -> PackedSource:
    """The images of the shards, in their order. ``classes`` is what the file CLASSES beside them holds, if it is there.

    Raises ConfigError for a shard that is none, and shards without an image.
    """
    names = None if classes is None else classes.rstrip("\n").split("\n")
    kind = "tar with arrays" if config.takes_arrays else "tar"
    return PackedSource(shards, partial(index_tar, arrays=config.takes_arrays), kind, config, names)


def index_tar(path: Path, arrays: bool = False) -> Index:
    """The images of a shard, in their order.

    As in WebDataset a member's key is its path up to the first dot of its last part, the rest is its ending. The image
    of a key is the member whose ending is one of an image (``jpg`` before ``seg.png``), with ``arrays`` also ``npy``;
    KEY.cls names its class. Links, folders and hidden files are left out. A damaged header counts as one image that
    cannot be read, and the search goes on behind it.

    Raises ConfigError for a file that is empty, compressed, or no tar; OSError.
    """
    shard = _Shard(image_endings(arrays))
    with _Window(path) as window:
        _check_tar(path, window)
        for name, offset, size in _members(window):
            shard.add(name, offset, size, window)
    if shard.further:
        log.warning(
            "%s: %d images are not used, because another one has the same key (the name up to its first dot), such as "
            "%s", path, len(shard.further), shard.further[0].decode("utf-8", "backslashreplace"),
        )  # fmt: skip
    return shard.index()


@dataclass
class _Shard:
    """What is known of a shard so far; lists have an entry per image."""

    endings: frozenset[bytes]
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    image_of: dict[bytes, int] = field(default_factory=dict)
    word_of: dict[bytes, str] = field(default_factory=dict)
    further: list[bytes] = field(default_factory=list)

    def add(self, name: bytes, offset: int, size: int, window: "_Window") -> None:
        """A member of the shard."""
        if size == DAMAGED:
            self._image(b"", b"header at byte %d" % offset, offset, size)
            return
        start = name.rfind(b"/") + 1
        dot = name.find(b".", start + 1)
        if dot < 0 or name.startswith(b".", start):
            return
        key, ending = name[:dot], name[dot:].lower()
        if ending == b".cls":
            if word := window.at(offset, min(size, _BLOCK)).strip():
                self.word_of[key] = word.decode("utf-8", "backslashreplace")
        elif ending in self.endings:
            self._add_image(key, name, offset, size)
        elif ending[ending.rfind(b".") :] in self.endings:
            self._add_image(key, name, offset, size, exact=False)

    def _add_image(self, key: bytes, name: bytes, offset: int, size: int, exact: bool = True) -> None:
        """An image, or a further one of a key: ``jpg`` is taken before ``seg.png``, else the first."""
        known = self.image_of.get(key)
        if known is None:
            self._image(key, name, offset, size)
        elif self.names[known] == name:
            self._image(b"", name, offset, DUPLICATE)
        elif exact and b"." in self.names[known][len(key) + 1 :]:
            self.further.append(self.names[known])
            self.names[known], self.offsets[known], self.sizes[known] = name, offset, size
        else:
            self.further.append(name)

    def _image(self, key: bytes, name: bytes, offset: int, size: int) -> None:
        if key:
            self.image_of[key] = len(self.keys)
        self.keys.append(key)
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def index(self) -> Index:
        words = sorted({*self.word_of.values()})
        place = {word: i for i, word in enumerate(words)}
        numbers = (place[self.word_of[key]] if key in self.word_of else -1 for key in self.keys)
        word = np.fromiter(numbers, np.int32, len(self.keys))
        offsets, sizes = np.array(self.offsets, np.int64), np.array(self.sizes, np.int64)
        return Index(offsets, sizes, word, words, Names(self.names))


class _Window:
    """A file of which pieces are looked at in ascending order, most of them out of one read."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self.end = os.fstat(self._file).st_size
        self._start, self._bytes = 0, b""

    def __enter__(self) -> "_Window":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def at(self, position: int, count: int = _BLOCK) -> bytes:
        """``count`` bytes from ``position``, fewer where the file ends."""
        start = position - self._start
        if start < 0 or start + count > len(self._bytes):
            self._bytes, self._start, start = os.pread(self._file, max(_WINDOW, count), position), position, 0
        return self._bytes[start : start + count]


def _check_tar(path: Path, window: _Window) -> None:
    head = window.at(0)
    if not head:
        raise ConfigError(f"{path} is empty, not a tar shard: copy it again, or remove it")
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise ConfigError(
                f"{path} is compressed with {name}, and images inside cannot be read one by one: unpack it "
                "(images are compressed already), or pack it again with fastdino shard"
            )
    if head != _ZEROS and _size(head) is None:
        raise ConfigError(f"{path} is not a tar: its first header is damaged. Copy it again, or remove it")


def _members(window: _Window) -> Iterator[tuple[bytes, int, int]]:
    """(path, first byte, size) of every file in the tar; of a damaged header its place and DAMAGED."""
    position, long_name, long_size = 0, b"", None
    while position < window.end:
        header = window.at(position)
        if header == _ZEROS[: len(header)]:  # the end of an archive, which another one may follow
            position += _BLOCK
            continue
        size = _size(header)
        if size is None:
            yield b"", position, DAMAGED
            position = _next_header(window, position + _BLOCK)
            long_name, long_size = b"", None
            continue
        kind, data = header[156:157], position + _BLOCK
        if kind in b"Lx":
            more = window.at(data, size) if size <= _MAX_NAME else b""
            if kind == b"L":
                long_name = more.rstrip(b"\0")
            else:
                long_name, long_size = _pax(more, long_name)
        else:
            size = size if long_size is None else long_size
            if kind in b"0\x007":  # a file; not a folder, a link or a device
                yield long_name or _name(header), data, size
            long_name, long_size = b"", None
        position = data + -(-size // _BLOCK) * _BLOCK


def _size(header: bytes) -> int | None:
    """Bytes of the member; None for what is no sound header."""
    if len(header) < _BLOCK:
        return None
    try:
        stated = int(header[148:156].partition(b"\0")[0], 8)
        # The sum of all bytes, the checksum's own taken as blanks. The low half of Adler-32 is 1 + sum, modulo 65521.
        if ((zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + _BLANKS - stated) % 65521:
            return None
        if header[124] & 0x80:  # above 8 GB: a number of 11 bytes
            return int.from_bytes(header[125:136], "big")
        size = int(header[124:136].partition(b"\0")[0] or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header.startswith(b"ustar\0", 257):
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(records: bytes, name: bytes) -> tuple[bytes, int | None]:
    """Path and size out of lines ``LENGTH key=value``, for the member that follows; ``name`` where they state none."""
    size = None
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size" and value.isdigit():
            size = int(value)
        records = records[int(length) :]
    return name, size


def _next_header(window: _Window, position: int) -> int:
    """Where the next sound header is, at ``position`` or behind; else the end of the file."""
    while position < window.end:
        stretch = window.at(position, _STRETCH)
        place = stretch.find(b"ustar")
        while place >= 0:
            block = place - 257
            if block >= 0 and block % _BLOCK == 0 and _size(stretch[block : block + _BLOCK]) is not None:
                return position + block
            place = stretch.find(b"ustar", place + 1)
        position += _STRETCH - _BLOCK if len(stretch) == _STRETCH else _STRETCH
    return window.end

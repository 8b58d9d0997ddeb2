"""A list of images, as a table has them: CSV with a header, or JSONL."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.decode import warn_of_unused_bits
from fastdino.data.sources.folder import FileSource
from fastdino.data.sources.names import Classes, printable

PATHS = ("path", "file", "file_name", "filename", "image", "image_path", "img")
LABELS = ("label", "labels", "class", "cls", "target", "category")
"""Names of columns that are looked for, the first of them first, where the settings name none."""


class ManifestSource(FileSource):
    """The images that a file lists, in its order, a row each.

    Args:
        path: a .csv whose first line names the columns, or a .jsonl with an object per line. A column holds paths,
            relative to the manifest's folder; another one may hold classes. Further ones are not read.
        config: which columns (data.image_column, data.label_column); how images are decoded.

    Raises ConfigError, with the number of the line, for a file that is no such table, and for a row without a path.
    """

    def __init__(self, path: str | Path, config: DataConfig) -> None:
        self._path = Path(path)
        numbers, paths, words = list[int](), list[bytes](), list[str]()
        for number, file, word in self._rows(config):
            if not file:
                raise ConfigError(f"{self._path}, line {number}: the row names no file")
            numbers.append(number)
            paths.append(os.fsencode(file))
            words.append(word)
        if not paths:
            raise ConfigError(f"{self._path} lists no images")
        self._lines = np.array(numbers, np.int64)
        different = sorted({*words} - {""})
        classes = Classes(different, None, str(self._path))
        label = dict(zip([*different, ""], classes.of(different).tolist(), strict=True))
        labels = np.fromiter((label[word] for word in words), np.int32, len(words))
        folder = os.fsencode(os.path.dirname(os.path.abspath(path)))
        super().__init__(folder, paths, labels, config)
        self.labels = classes.labels
        warn_of_unused_bits(str(self._path), len(self), self.encoded, config)

    def name(self, index: int) -> str:
        """The manifest's line and the path there."""
        return f"{self._path.name}, line {self._lines[index]}: {printable(self._paths[index])}"

    def _rows(self, config: DataConfig) -> Iterator[tuple[int, str, str]]:
        """Line, path and class ("": none) of each row."""
        read = _csv if self._path.suffix.lower() == ".csv" else _jsonl
        try:
            with open(self._path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                yield from read(file, str(self._path), config)
        except OSError as error:
            raise ConfigError(f"cannot read {self._path}: {error.strerror or error}") from error


def _csv(file: Iterator[str], name: str, config: DataConfig) -> Iterator[tuple[int, str, str]]:
    rows = csv.reader(file, strict=True)
    try:
        header = [column.strip() for column in next(rows, [])]
        image, label = _columns(header, name, config)
        first, second = header.index(image), header.index(label) if label else -1
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ConfigError(
                    f"{name}, line {rows.line_num}: {len(row)} values, and the first line names {len(header)} columns"
                )
            yield rows.line_num, row[first], row[second].strip() if label else ""
    except csv.Error as error:
        raise ConfigError(f"{name}, line {rows.line_num}: not CSV: {error}") from error


def _jsonl(file: Iterator[str], name: str, config: DataConfig) -> Iterator[tuple[int, str, str]]:
    image, label = "", ""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{name}, line {number}: not an object such as {{"path": "cat/1.jpg"}}')
        if not image:
            image, label = _columns(list(row), name, config)
        path, word = row.get(image), row.get(label)
        if not isinstance(path, str):
            raise ConfigError(f"{name}, line {number}: the row names no file: {image} is {json.dumps(path)}")
        if not isinstance(word, str | int | None):
            raise ConfigError(f"{name}, line {number}: {label} is {json.dumps(word)}, not a class by name or number")
        yield number, path, "" if word is None else str(word)


def _columns(found: Sequence[str], name: str, config: DataConfig) -> tuple[str, str]:
    """The columns of paths and classes ("": none) among those ``found``: those that the settings name, or the first of
    PATHS and LABELS that is there. Raises ConfigError, which names those that are there."""
    have = f"it has {', '.join(found) or 'none'}"
    check_columns(found, name, have, config)
    image = config.image_column or next((column for column in PATHS if column in found), "")
    if not image:
        usual = " or ".join(PATHS)
        raise ConfigError(f"{name} has no column {usual}: {have}. Name that of the images: data.image_column")
    return image, config.label_column or next((column for column in LABELS if column in found), "")


def check_columns(found: Sequence[str], name: str, have: str, config: DataConfig) -> None:
    """Raises ConfigError for a column that the settings name and that is not among those ``found``."""
    for setting in ("image_column", "label_column"):
        asked = getattr(config, setting)
        if asked and asked not in found:
            raise ConfigError(f"{name} has no column data.{setting}={asked}: {have}")

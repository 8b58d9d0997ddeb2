"""Tables with a column of encoded images: parquet, and datasets that Hugging Face's ``datasets`` saved to a disk.

A row of parquet cannot be read without its page, which holds many others, so a file is unpacked once, into a tar shard
in the cache. Arrow's files hold the bytes of images as they are: they are indexed and read in place.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.manifest import LABELS, check_columns
from fastdino.data.sources.names import Names
from fastdino.data.sources.packed.cache import Item, cached
from fastdino.data.sources.packed.images import Archive, PackedSource
from fastdino.data.sources.packed.index import NULL, Index
from fastdino.data.sources.packed.tar import index_tar

_IMAGES = ("image", "img", "jpg", "png", "webp", "bytes", "image_bytes", "picture", "photo")
_ROWS = 256  # of parquet that are in memory at once
_OVERHEAD = 2048  # bytes that a tar takes for an image and its class, beside the image


def open_parquet(files: Sequence[Archive], config: DataConfig) -> PackedSource:
    """The images of the files, a row each, in their order.

    Raises ConfigError without pyarrow, for a file that is no parquet, and for one without the columns.
    """
    arrow, items, names = _pyarrow(), [], None
    for file in files:
        try:
            path = file.here()
            status, metadata = os.stat(path), arrow.parquet.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (OSError, arrow.ArrowException) as error:
            raise ConfigError(f"cannot read {file.path} as parquet: {' '.join(str(error).split())}") from error
        image, label = _columns(schema, file.name, config)
        own = _class_names(_described(schema), label)
        if file is not files[0] and own != names:
            raise ConfigError(f"{file.name} names other classes than {files[0].name}: train on one of the data sets")
        names = own
        key = json.dumps(["parquet", str(path), status.st_size, status.st_mtime_ns, image, label])
        unpack = partial(_unpack, file, image, label)
        items.append(Item(file.name, key, _unpacked_size(metadata, image), unpack))
    return PackedSource(cached(items, config, "unpack"), index_tar, "tar", config, names)


def open_saved(folder: str, config: DataConfig) -> PackedSource:
    """The images of a folder that ``Dataset.save_to_disk`` wrote, in its order.

    Raises ConfigError without pyarrow, for a folder that is not whole, and for one without the columns.
    """
    arrow, root = _pyarrow(), Path(os.path.abspath(folder))
    try:
        state = json.loads((root / "state.json").read_text("utf-8"))
        info = json.loads((root / "dataset_info.json").read_text("utf-8"))
        paths = [root / entry["filename"] for entry in state["_data_files"]]
        with arrow.memory_map(str(paths[0])) as file:
            schema = _batches(arrow, file).schema
    except (OSError, ValueError, LookupError, TypeError, arrow.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{folder} is not a whole dataset as datasets.save_to_disk writes it: {reason}") from error
    image, label = _columns(schema, folder, config)
    make = partial(index_arrow, image=image, label=label)
    archives = [Archive(path.name, path) for path in paths]
    return PackedSource(archives, make, f"arrow {image} {label}", config, _class_names(info, label))


def index_arrow(path: Path, image: str, label: str) -> Index:
    """Where the images of an Arrow file lie in it, a row each. Raises ConfigError for a file that is damaged."""
    arrow = _pyarrow()
    offsets, sizes, words = [np.empty(0, np.int64)], [np.empty(0, np.int64)], list[str]()
    try:
        with arrow.memory_map(str(path)) as file:
            whole = file.read_buffer()
            for batch in _batches(arrow, arrow.BufferReader(whole)):
                column = _encoded(arrow, batch.column(image))
                _, ends, data = column.buffers()
                kind = np.int64 if arrow.types.is_large_binary(column.type) else np.int32
                at = np.frombuffer(ends, kind)[: len(column) + 1].astype(np.int64)
                start = data.address - whole.address if data else 0
                if not 0 <= start <= whole.size:
                    raise ConfigError(f"{path} is compressed: save the dataset again, with datasets.save_to_disk")
                null = column.is_null().to_numpy(zero_copy_only=False)
                offsets.append(start + at[:-1])
                sizes.append(np.where(null, NULL, np.diff(at)))
                words += _words(batch, label)
    except arrow.ArrowException as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    different = sorted({*words} - {""})
    place = {word: i for i, word in enumerate(different)} | {"": -1}
    word = np.fromiter((place[word] for word in words), np.int32, len(words))
    return Index(np.concatenate(offsets), np.concatenate(sizes), word, different, Names([]))


def _batches(arrow: Any, file: Any) -> Any:
    """A reader of record batches of a file in either of Arrow's two formats."""
    try:
        return arrow.ipc.open_stream(file)
    except arrow.ArrowInvalid:
        file.seek(0)
        reader = arrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return arrow.RecordBatchReader.from_batches(reader.schema, batches)


def _unpack(file: Archive, image: str, label: str, path: Path) -> None:
    """Writes the tar shard of a parquet file: ``row 7.jpg``, of no bytes where the row is null, and ``row 7.cls``."""
    arrow = _pyarrow()
    try:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (data, word) in enumerate(_rows(arrow, file.here(), image, label)):
                for ending, content in ((".jpg", data), (".cls", word.encode())):
                    if content or ending == ".jpg":
                        member = tarfile.TarInfo(f"row {row}{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    except (OSError, arrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:  # of the cache's disk
            raise
        raise ConfigError(f"cannot read {file.path} as parquet: {' '.join(str(error).split())}") from error


def _rows(arrow: Any, path: Path, image: str, label: str) -> Iterator[tuple[bytes, str]]:
    """Bytes (none: null) and class ("": none) of each row."""
    with arrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=[image, label] if label else [image]):
            column = _encoded(arrow, batch.column(image))
            for data, word in zip(column, _words(batch, label), strict=True):
                yield data.as_py() or b"", word


def _encoded(arrow: Any, column: Any) -> Any:
    """The binary array of a column of images, which Hugging Face keeps in a field beside their paths."""
    if not arrow.types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


def _words(batch: Any, label: str) -> list[str]:
    """The classes of a batch's rows, "" where there is none."""
    if not label:
        return [""] * batch.num_rows
    return ["" if value is None else str(value) for value in batch.column(label).to_pylist()]


def _columns(schema: Any, name: str, config: DataConfig) -> tuple[str, str]:
    """The columns of images and classes ("": none): those that the settings name, or that have a usual name, or the one
    column of encoded images. Raises ConfigError, which says what is there."""
    arrow = _pyarrow()
    found = {column: schema.field(column).type for column in schema.names}
    have = f"it has {', '.join(f'{column} ({kind})' for column, kind in found.items()) or 'none'}"
    check_columns(schema.names, name, have, config)
    fit = [column for column, kind in found.items() if _holds_images(arrow, kind)]
    image = config.image_column or next((c for c in _IMAGES if c in fit), fit[0] if len(fit) == 1 else "")
    if image not in fit:
        which = f"{config.image_column} holds none" if config.image_column else "name one by data.image_column"
        raise ConfigError(f"{name}: which column holds encoded images, as binary or with bytes? {which}; {have}")
    usable = {column for column, kind in found.items() if _holds_classes(arrow, kind)}
    label = config.label_column or next((column for column in LABELS if column in usable), "")
    if label and label not in usable:
        raise ConfigError(f"{name}: data.label_column={label} holds no classes by name or number; {have}")
    return image, label


def _holds_images(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(arrow, kind.field(place).type)
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def _holds_classes(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_dictionary(kind):
        return _holds_classes(arrow, kind.value_type)
    is_ = arrow.types
    return bool(is_.is_integer(kind) or is_.is_string(kind) or is_.is_large_string(kind) or is_.is_boolean(kind))


def _class_names(description: Any, label: str) -> list[str] | None:
    """Those that Hugging Face's description of a data set gives to the classes; None where it gives none."""
    for name in ("features", label):
        description = description.get(name) if isinstance(description, dict) else None
    if not isinstance(description, dict) or description.get("_type") != "ClassLabel":
        return None
    names = description.get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def _described(schema: Any) -> Any:
    """The description that ``datasets`` writes into parquet."""
    try:
        return json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]
    except (ValueError, LookupError, TypeError):
        return None


def _unpacked_size(metadata: Any, image: str) -> int:
    """Bytes of the tar shard, about."""
    total = metadata.num_rows * _OVERHEAD
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] == image:
                total += column.total_uncompressed_size
    return int(total)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install 'fastdino[parquet]'"
        raise ConfigError(f"parquet, and datasets of Hugging Face, are read with pyarrow: {remedy}") from error
    return pyarrow

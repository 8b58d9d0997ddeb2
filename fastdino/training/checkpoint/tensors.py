"""safetensors files, written in pieces and read by ranges: the length of a JSON header, the header, raw values.

The library of that name writes from memory that it owns and reads local files alone. Source: the format's description
in huggingface/safetensors. Nothing is ever unpickled.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdino.training.checkpoint.manifest import CheckpointError

PIECE = 1 << 24  # bytes that are written at a time
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """A file that holds ``tensors``, contiguous ones on the CPU, from its first byte to its last; none is copied."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        raw = _bytes(tensor.view(-1))
        for start in range(0, len(raw), PIECE):
            yield raw[start : start + PIECE]


def copied(content: Iterable[memoryview], file: BinaryIO | None = None) -> dict[str, int]:
    """Writes ``content``, if there is a file; its bytes and crc32, of the same pass."""
    size = crc = 0
    for piece in content:
        if file is not None:
            file.write(piece)
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    return {"bytes": size, "crc32": crc}


def blocks(file: BinaryIO) -> Iterator[memoryview]:
    """What an open file holds, in pieces."""
    while block := file.read(PIECE):
        yield memoryview(block)


class TensorFile:
    """The tensors of an open file, of which ranges are read.

    Args:
        file: that seeks.
        name: for messages.

    Raises CheckpointError for what is no such file, or ends too early.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            found = json.loads(file.read(length))
            found.pop("__metadata__", None)
            self._places = {
                key: (_DTYPES[entry["dtype"]], [*entry["shape"]], 8 + length + entry["data_offsets"][0])
                for key, entry in found.items()
            }
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{name} is not a safetensors file: {error!r}") from error

    def whole(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {key: self.read(key).view(shape) for key, (_, shape, _) in self._places.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the tensor ``key``, flattened."""
        if key not in self._places:
            raise CheckpointError(f"{self._name} holds no {key}")
        dtype, shape, offset = self._places[key]
        values = torch.empty((torch.Size(shape).numel() if stop is None else stop) - start, dtype=dtype)
        try:
            self._file.seek(offset + start * values.element_size())
            read = self._file.readinto(_bytes(values))  # type: ignore[attr-defined]
        except Exception as error:  # a store's library has its own
            raise CheckpointError(f"{self._name} cannot be read: {error}") from error
        if read != values.numel() * values.element_size():
            raise CheckpointError(f"{self._name} ends within {key}")
        return values


def _bytes(flat: Tensor) -> memoryview:
    array: Any = flat.detach().view(torch.uint8).numpy()
    return memoryview(array)

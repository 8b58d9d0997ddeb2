"""What a checkpoint says of itself: its manifest, and the names of what it holds."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from fastdino.config import UserError

FORMAT = 1  # raised when an older fastdino could not read what this one writes
MANIFEST = "manifest.json"


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be written or read; the message says which one, why and what to do."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer fastdino wrote: passing it over for an older one would lose work silently."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds; written last, so that its presence means that the rest is there."""

    format: int
    step: int
    world_size: int
    shapes: dict[str, list[int]]  # of every parameter of the network
    files: dict[str, dict[str, int]]  # file name -> bytes, crc32
    pieces: dict[str, list[tuple[str, int, int]]]  # name of a rank's file -> (parameter, start, stop)
    meta: dict[str, Any]  # the trainer's own: epoch, global batch

    @property
    def shared(self) -> str:
        """The file of the small tensors that all ranks share."""
        return next(file for file in self.files if file not in self.pieces)

    def to_json(self) -> str:
        """What :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes, name: str) -> Self:
        """Raises CheckpointError, which names the checkpoint by ``name``, for what is no manifest of ours."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{name} is not a checkpoint: its manifest cannot be read ({error})") from error
        version = content.get("format") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise NewerFormatError(
                f"{name} has format {version}, this fastdino reads up to {FORMAT}: install the fastdino that wrote it"
            )
        try:
            manifest = cls(**content)
            manifest.files.items()
            assert manifest.shared
        except (TypeError, AttributeError, StopIteration) as error:
            raise CheckpointError(f"the manifest of {name} is not one of fastdino's: {error!r}") from error
        return manifest


def key(kind: str, parameter: str, start: int) -> str:
    """The name of a fragment's tensor in the file of its rank."""
    return f"{kind}:{start}:{parameter}"

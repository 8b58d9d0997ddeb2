"""Tar files that tests make, and sources opened as a user would."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastdino.config import DataConfig
from fastdino.data import Source, open_source
from tests.data.pictures import noise


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def opened(root: object, cache: Path, **settings: Any) -> Source:
    return open_source(str(root), DataConfig(root=str(root), cache=cache, **settings))


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]

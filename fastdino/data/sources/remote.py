"""Shards behind a URL, of any kind that fsspec knows: whole files come into the cache, and are read there."""

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.packed.cache import Item, cached
from fastdino.data.sources.packed.images import Archive

# What tells the state of a file, by the names that stores give it; such as the time of access are left out.
_STATE = (
    *("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "generation"),
    *("blob_id", "md5Hash", "checksum"),
)
_AT_ONCE = 16  # addresses that are asked at once
_TRIES = 3
_PAUSE = 1.0  # seconds before a second try, twice that before a third

T = TypeVar("T")


class Remote(NamedTuple):
    """A file behind a URL."""

    url: str
    plain: str
    """The URL without what follows a question mark, such as a signature that is another one tomorrow."""
    info: dict[str, Any]
    """Its state, as the store tells it."""


def is_url(root: str) -> bool:
    """True for ``s3://bucket/shards``, ``https://...`` and the like."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.\-]+://", root) is not None


def listed(urls: Sequence[str], endings: tuple[str, ...]) -> list[Remote]:
    """Every file that is named: by its URL, by a glob (``*[``), or by a folder that holds files of these ``endings``.

    Raises ConfigError, one message whatever is wrong, for a URL that names none.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda url: _asked(url, partial(_files, url, endings)), urls))
    for url, files in zip(urls, found, strict=True):
        if not files:
            raise ConfigError(f"{url} holds no files ending in {' or '.join(endings)}")
    return [file for files in found for file in files]


def fetched(files: Sequence[Remote], config: DataConfig) -> list[Archive]:
    """The files in the cache. Raises ConfigError when one cannot be had, or they do not fit."""
    items = []
    for file in files:
        state = {name: str(file.info[name]) for name in _STATE if file.info.get(name) is not None}
        key, name = json.dumps([file.plain, state]), file.plain.rpartition("/")[2]
        items.append(Item(name, key, file.info.get("size") or 0, partial(_download, file)))
    return cached(items, config, "download")


def text(url: str) -> str | None:
    """What a small file holds; None where there is none, or none to be seen. Raises ConfigError."""
    return _asked(url, partial(_text, url))


def _text(url: str) -> str | None:
    system, path = fsspec.core.url_to_fs(url)
    try:
        return str(system.cat_file(path).decode())
    except (FileNotFoundError, PermissionError):
        return None
    except Exception as error:
        if getattr(error, "status", 0) in (401, 403, 404):
            return None
        raise


def _files(url: str, endings: tuple[str, ...]) -> list[Remote]:
    system, path = fsspec.core.url_to_fs(url)
    if re.search(r"[*\[]", _plain(path)):
        found = system.glob(path, detail=True)
    elif _plain(path).lower().endswith(endings):
        found = {path: system.info(path)}
    else:
        inside = {info["name"]: info for info in system.ls(path, detail=True)}
        found = {name: info for name, info in inside.items() if _plain(name).lower().endswith(endings)}
    urls = {name: system.unstrip_protocol(name) for name in sorted(found)}
    return [Remote(url, _plain(url), found[name]) for name, url in urls.items()]


def _plain(url: str) -> str:
    return url.partition("?")[0]


def _download(file: Remote, path: Path) -> None:
    """Raises ConfigError for a file that does not come, or not whole."""
    size, free = file.info.get("size"), shutil.disk_usage(path.parent).free
    if size is not None and size > free:
        raise ConfigError(f"{file.url} has {size} bytes, and {path.parent} has room for {free}: set another data.cache")
    _asked(file.url, partial(_get, file, path), _TRIES)


def _get(file: Remote, path: Path) -> None:
    system, source = fsspec.core.url_to_fs(file.url)  # anew: this may be a forked worker, which shares no connections
    system.get_file(source, str(path))
    size, stated = path.stat().st_size, file.info.get("size")
    if stated is not None and size != stated:
        raise EOFError(f"{size} bytes came of {stated}")


def _asked(url: str, ask: Callable[[], T], tries: int = 1) -> T:
    """What ``ask`` gives. Raises ConfigError for whatever the many stores, and the network, raise."""
    for attempt in range(tries):
        time.sleep(_PAUSE * attempt)
        try:
            return ask()
        except Exception as error:  # of a hundred libraries
            last: BaseException = error.__cause__ or error
    reason = " ".join(f"{type(last).__name__}: {last}".split()).rstrip(".: ")
    raise ConfigError(f"cannot read {url}: {reason}. Check the address, the network and your access to it") from last

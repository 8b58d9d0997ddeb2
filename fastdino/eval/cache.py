"""Features on disk: what a backbone made of a data set is made once, whatever is evaluated."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.data.sources.packed.index import locked
from fastdino.data.sources.source import Source
from fastdino.distributed import Ranks
from fastdino.eval.features import Features, Part, Reading, check_any, check_size, extract_part, feature_batches

VERSION = 1  # of what a transform makes of pixels, and of the files; another one is made anew
MANIFEST, PROGRESS_EVERY = "manifest.json", 16  # batches
ABANDONED = 24 * 3600  # seconds after which what was not finished is nobody's


@dataclass(frozen=True)
class Work:
    """How features are made, which does not change them."""

    batch: int
    num_workers: int
    ranks: Ranks


@dataclass(frozen=True)
class Cache:
    """A folder of features, shared by all evaluations. A folder in it is of one backbone, data set and reading.

    Rank r of W writes the rows of its part of the images to ``features.r-of-W.npy``; the manifest, written last, makes
    them valid. What a killed process leaves is completed by the next one that needs it.
    """

    folder: Path
    limit: float
    """GB that it may take. Those that were not used for the longest time make room."""

    def features(
        self,
        backbone: nn.Module,
        digest: Callable[[], str],
        source: Source,
        reading: Reading,
        work: Work,
        told: dict[str, Any],
    ) -> Features:
        """Features of every readable image, on the CPU, on every rank; all ranks call it.

        Args:
            backbone, source, reading: see :func:`fastdino.eval.features.extract`.
            digest: of the backbone, by :func:`weights_digest`; rank 0's is taken.
            told: what to say of the entry to a person who looks for what takes the room.

        Raises EvaluationError as extract does; ConfigError when there is no room, or the folder cannot be written or
        is not the same for all ranks.
        """
        ranks = work.ranks
        entry = self.folder / ranks.on_main(lambda: key_of(digest(), source, reading))
        manifest = ranks.on_main(lambda: _read_manifest(entry))
        if manifest is None:
            width = check_size(backbone, reading)
            ranks.on_main(lambda: self._make_room(entry, 4 * len(source) * width))
            bad = ranks.everywhere(lambda: _write(entry, backbone, source, reading, work, width))
            manifest = {"shards": ranks.world_size, "bad": [index for part in ranks.gather(bad) for index in part]}
            ranks.on_main(lambda: _commit(entry, manifest | told))
        with suppress(OSError):
            os.utime(entry / MANIFEST)  # when it was last used
        found = ranks.everywhere(lambda: _read(entry, source, manifest))
        check_any(found)
        return found

    def entries(self) -> list[tuple[Path, int, float, dict[str, Any]]]:
        """Folder, bytes, time of last use and manifest of each entry, the least recently used first; an unfinished one
        has an empty manifest."""
        found = []
        for entry in self.folder.glob("??/*"):
            files = [file.stat() for file in entry.iterdir()] if entry.is_dir() else []
            if files:
                used = max(file.st_mtime for file in files)
                found.append((entry, sum(file.st_blocks * 512 for file in files), used, _read_manifest(entry) or {}))
        return sorted(found, key=lambda item: item[2])

    def _make_room(self, entry: Path, needed: int) -> None:
        """Raises ConfigError where there is none."""
        remedy = "name another folder with --cache-dir, or keep no features with --no-cache"
        if needed > self.limit * 1e9:
            raise ConfigError(
                f"these features take {needed / 1e9:.3g} GB, and --cache-gb={self.limit:g} holds fewer: raise it, or "
                "keep no features with --no-cache"
            )
        entries = [item for item in self.entries() if item[0] != entry]
        taken = sum(size for _, size, _, _ in entries)
        for path, size, used, manifest in entries:
            if taken + needed <= self.limit * 1e9:
                break
            if manifest or time.time() - used > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
                taken -= size
        try:
            entry.mkdir(parents=True, exist_ok=True)
            there = sum(file.stat().st_blocks * 512 for file in entry.iterdir())
            free = shutil.disk_usage(entry).free + there
        except OSError as error:
            raise ConfigError(f"cannot write {self.folder}: {error.strerror or error}; {remedy}") from error
        if free < needed:
            raise ConfigError(
                f"features of {needed / 1e9:.3g} GB do not fit on the disk of {self.folder}, which has "
                f"{free / 1e9:.3g} GB free: {remedy}"
            )


def uncached(backbone: nn.Module, source: Source, reading: Reading, work: Work) -> Features:
    """What :meth:`Cache.features` returns, made here and kept nowhere."""
    ranks = work.ranks
    check_size(backbone, reading)
    part = Part(ranks.rank, ranks.world_size)
    found = ranks.everywhere(lambda: extract_part(backbone, source, reading, work.batch, work.num_workers, part=part))
    features = Features(*(torch.cat(ranks.gather(x.cpu())) for x in found))
    check_any(features)
    return features


def key_of(digest: str, source: Source, reading: Reading) -> str:
    """The entry's folder: of the weights' values, the state of the files, and how images are read."""
    how = f"{VERSION} {digest} {source.stamp()} {sorted(asdict(reading).items())}"
    key = hashlib.sha256(how.encode()).hexdigest()[:32]
    return f"{key[:2]}/{key}"


def weights_digest(backbone: nn.Module) -> str:
    """sha256 of the names, dtypes, shapes and bytes of all that a backbone holds, and of what it is.

    Weights that were copied, or exported in another format, have the same.
    """
    traits = [getattr(backbone, name, None) for name in ("arch", "patch_size", "head_width", "interpolation")]
    digest = hashlib.sha256(f"{type(backbone).__name__} {traits}\n".encode())
    for name, x in sorted(getattr(backbone, "published", backbone).state_dict().items()):
        x = x.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(entry: Path, backbone: nn.Module, source: Source, reading: Reading, work: Work, width: int) -> list[int]:
    """This rank's rows, from where a process before ended. Returns the places of images that cannot be read."""
    rank, of = work.ranks.rank, work.ranks.world_size
    path, images = entry / _name(rank, of), Part(rank, of).images(len(source))
    try:
        with locked(path):
            rows, seen, bad = _progress(path, len(images), width)
            part = Part(rank, of, seen)
            batches = feature_batches(backbone, source, reading, work.batch, work.num_workers, part=part)
            for count, features in enumerate(batches if seen < len(images) else (), 1):
                here = images[seen : seen + work.batch]
                places = features.places.cpu().numpy()
                rows[places - images.start] = features.vectors.cpu().numpy()
                bad += sorted({*here} - {*places.tolist()})
                seen += len(here)
                if count % PROGRESS_EVERY == 0 or seen == len(images):
                    rows.flush()
                    _put(path.with_suffix(".json"), {"done": seen, "bad": bad})
    except OSError as error:
        raise ConfigError(
            f"cannot keep features in {entry.parent.parent}: {error.strerror or error}; name another folder with "
            "--cache-dir, or keep none with --no-cache"
        ) from error
    return bad


def _progress(path: Path, rows: int, width: int) -> tuple[Any, int, list[int]]:
    """The rows as they lie in the file, how many images they hold, and which of these are bad."""
    progress = path.with_suffix(".json")
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(progress.read_text())
        there = np.lib.format.open_memmap(path, mode="r+")
        if there.shape == (rows, width):
            return there, int(told["done"]), list(told["bad"])
    progress.unlink(missing_ok=True)
    there = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))  # a full disk would kill who writes to memory
    return there, 0, []


def _name(rank: int, of: int) -> str:
    return f"features.{rank:05}-of-{of:05}.npy"


def _put(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def _commit(entry: Path, manifest: dict[str, Any]) -> None:
    """Now the shards are valid; what another number of ranks left is removed."""
    names = {_name(rank, manifest["shards"]) for rank in range(manifest["shards"])}
    try:
        for file in entry.iterdir():
            if file.name not in names:
                file.unlink(missing_ok=True)
        _put(entry / MANIFEST, manifest)
    except OSError as error:
        raise ConfigError(f"cannot write {entry}: {error.strerror or error}") from error


def _read_manifest(entry: Path) -> dict[str, Any] | None:
    """None where the entry is not there or not whole."""
    with suppress(OSError, ValueError, KeyError):
        manifest = json.loads((entry / MANIFEST).read_text())
        for file in _shards(entry, manifest):
            np.load(file, mmap_mode="r", allow_pickle=False)  # raises ValueError for a file that was cut off
        return manifest
    return None


def _shards(entry: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    return (entry / _name(rank, manifest["shards"]) for rank in range(manifest["shards"]))


def _read(entry: Path, source: Source, manifest: dict[str, Any]) -> Features:
    """The rows of one shard are maps of its file, those of several are copied."""
    try:
        parts = [
            torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False)) for file in _shards(entry, manifest)
        ]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the features in {entry} ({error}): all ranks have to see the same folder. Name a shared one "
            "with --cache-dir, or keep none with --no-cache"
        ) from error
    vectors: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    bad = {*manifest["bad"]}
    places = torch.tensor([i for i in range(len(source)) if i not in bad], dtype=torch.int64)
    labels = torch.tensor([source.label(i) for i in places.tolist()], dtype=torch.int64)
    return Features(vectors[places] if bad else vectors, labels, places)

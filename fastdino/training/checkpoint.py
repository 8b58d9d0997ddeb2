"""Checkpoints that survive a kill at any point and load at any number of ranks and any ZeRO stage.

A checkpoint is a folder ``step-00001234`` of safetensors files and one ``manifest.json``. Every rank writes the
fragments of the flat fp32 shards that it owns; rank 0 also writes the small tensors that all ranks share. The folder is
written under a temporary name, its manifest (sizes and checksums of all files) last, and then renamed: a folder with
its final name is complete. Loading copies the parts of fragments that a rank owns now, so neither the number of ranks
nor the ZeRO stage has to be the same. Nothing is ever unpickled.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdino.config import UserError
from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment

FORMAT = 1  # raised when an older fastdino could not read what this one writes
SHARED = "shared.safetensors"
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


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
    pieces: dict[str, list[tuple[str, int, int]]]  # file name -> (parameter, start, stop)
    meta: dict[str, Any]  # the trainer's own: epoch, global batch


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}:{start}:{name}"


def _measure(path: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    # copies, because safetensors refuses two names for the same memory: a frozen parameter is its own average
    save_file({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, path)
    _sync(path)
    return _measure(path)


def save(
    folder: Path,
    step: int,
    ranks: Ranks,
    *,
    fragments: Iterable[Fragment],
    shared: dict[str, Tensor],
    shapes: dict[str, list[int]],
    meta: dict[str, Any],
) -> Path:
    """Writes a checkpoint; every rank calls it at the same step.

    Args:
        folder: the run's checkpoints/ folder, the same on all ranks.
        fragments: what this rank has to write; none where another rank writes the same.
        shared: small tensors that are equal on all ranks: center, counters, buffers. Rank 0 writes them.
        shapes: shape of every parameter by name.
        meta: anything JSON can hold.

    Raises CheckpointError on all ranks if any could not write; checkpoints from before stay as they are.
    """
    final, temporary, failure = path_of(folder, step), folder / f".writing-{step:08d}-{uuid.uuid4().hex[:8]}", None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            failure = f"rank 0: {error}"
    failure, temporary = ranks.gather((failure, temporary))[0]
    owned, name, measured = list(fragments), f"rank-{ranks.rank:05d}.safetensors", dict[str, dict[str, int]]()
    try:
        if owned and failure is None:
            tensors = {_key(kind, p.name, p.start): tensor for p in owned for kind, tensor in p.tensors.items()}
            measured[name] = _write(temporary / name, tensors)
        if ranks.is_main and failure is None:
            measured[SHARED] = _write(temporary / SHARED, shared)
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank}: {error}"
    reports = ranks.gather((failure, measured, {name: [(p.name, p.start, p.stop) for p in owned]} if owned else {}))
    if ranks.is_main and not any(report[0] for report in reports):
        failure = _commit(temporary, final, step, reports, shapes, meta)
    failures = [failure for failure in (*(report[0] for report in reports), *ranks.gather(failure)) if failure]
    if ranks.is_main:
        _remove(temporary)
        _remove(_doomed(final))
    if failures:
        raise CheckpointError(
            f"could not write checkpoint {final} ({failures[0]}). Older checkpoints are whole: free some room "
            "and run the same command again"
        )
    return final


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, below the run's checkpoints/."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, ascending. Whatever else lies there, copies and notes, is passed over.

    Raises CheckpointError when the folder is there and cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
    found = [(name, int(name[5:])) for name in names if re.fullmatch("step-[0-9]+", name)]
    return sorted(step for name, step in found if path_of(folder, step).name == name and (folder / name).is_dir())


def clear(folder: Path) -> None:
    """Removes what a killed process did not finish; only for who alone writes in ``folder``."""
    for stale in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        _remove(stale)


def _doomed(path: Path) -> Path:
    """The name of a checkpoint that is being removed: half a folder never has a valid name."""
    return path.with_name(f".removing-{path.name}")


def _doom(path: Path) -> None:
    _remove(_doomed(path))  # where something of that name was left
    path.rename(_doomed(path))


def _remove(path: Path) -> None:
    """Removes a file or a folder, as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _commit(
    temporary: Path,
    final: Path,
    step: int,
    reports: Sequence[Any],
    shapes: dict[str, list[int]],
    meta: dict[str, Any],
) -> str | None:
    """Manifest, then rename: the moment from which the checkpoint exists. Returns what failed."""
    files = {name: size for _, measured, _ in reports for name, size in measured.items()}
    pieces = {name: owned for _, _, written in reports for name, owned in written.items()}
    manifest = Manifest(
        format=FORMAT, step=step, world_size=len(reports), shapes=shapes, files=files, pieces=pieces, meta=meta
    )
    try:
        path = temporary / MANIFEST
        path.write_text(json.dumps(asdict(manifest)))
        _sync(path)
        _sync(temporary)
        if os.path.lexists(final):  # the same step again: it was damaged, so training resumed from an older one
            _doom(final)
        temporary.rename(final)
        _sync(final.parent)
    except OSError as error:
        return f"rank 0: {error}"
    return None


def prune(folder: Path, keep: int, keep_for_good: Iterable[int]) -> None:
    """Removes all but the newest ``keep`` checkpoints and the steps in ``keep_for_good``; rank 0 only.

    A disk that refuses is warned of: too many checkpoints end no run.
    """
    kept = set(keep_for_good)
    try:
        for path in (path_of(folder, step) for step in steps(folder)[:-keep] if step not in kept):
            _doom(path)
            _remove(_doomed(path))
    except (OSError, CheckpointError) as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there and whole; raises CheckpointError otherwise."""
    try:
        content = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: its {MANIFEST} cannot be read ({error})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormatError(
            f"{path} has format {version}, this fastdino reads up to {FORMAT}: install the fastdino that wrote it"
        )
    try:
        manifest = Manifest(**content)
        files = manifest.files.items()
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/{MANIFEST} is not one of fastdino's: {error}") from error
    if path.name.startswith("step-") and path.name != path_of(path, manifest.step).name:
        raise CheckpointError(
            f"{path} was renamed: it is the checkpoint of step {manifest.step}. Give it its name back"
        )
    for name, expected in files:
        try:
            found = _measure(path / name)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is incomplete: {name} is missing. Use an older checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{path}/{name} cannot be read: {error.strerror}. Use an older checkpoint") from error
        if found != expected:
            raise CheckpointError(
                f"{path}/{name} is damaged: {found['bytes']} bytes with checksum {found['crc32']:08x}, written as "
                f"{expected['bytes']} bytes with {expected['crc32']:08x}. Use an older checkpoint"
            )
    return manifest


def newest(folder: Path, ranks: Ranks | None = None) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint; damaged ones are named in a warning and passed over. None if there is none.

    Rank 0 of ``ranks`` decides and tells the others, because a network file system may show them different folders.
    Raises CheckpointError if there are checkpoints but none is whole, or the newest is from a newer format.
    """
    chosen = _newest(folder) if ranks is None or ranks.is_main else None
    if ranks is not None:
        chosen = ranks.gather(chosen)[0]
    if isinstance(chosen, CheckpointError):
        raise chosen
    return chosen


def _newest(folder: Path) -> tuple[Path, Manifest] | CheckpointError | None:
    damage: CheckpointError | None = None
    try:
        paths = [path_of(folder, step) for step in reversed(steps(folder))]
    except CheckpointError as error:
        return error
    for path in paths:
        try:
            return path, read_manifest(path)
        except NewerFormatError as error:
            return error
        except CheckpointError as error:
            log.warning("%s; looking for an older one", error)
            damage = damage or error
    return damage


def load(
    path: Path, manifest: Manifest, fragments: Iterable[Fragment], shapes: dict[str, list[int]]
) -> dict[str, Tensor]:
    """Copies a checkpoint into the live views of ``fragments``, whatever ranks and stage it was written with.

    Returns the shared tensors. Raises CheckpointError, before anything is changed, if it is from another model.
    """
    if shapes != manifest.shapes:
        theirs, ours = manifest.shapes, shapes
        name = next(n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n))
        raise CheckpointError(
            f"{path} is from another model: {name} is {theirs.get(name, 'missing')} there, {ours.get(name, 'missing')} "
            "here. Use the run's own settings, or another run.dir"
        )
    index: dict[str, list[tuple[int, int, str]]] = {}
    for file, written in manifest.pieces.items():
        for name, start, stop in written:
            index.setdefault(name, []).append((start, stop, file))
    open_files = {file: _open(path / file) for file in (*manifest.pieces, SHARED)}
    for fragment in fragments:
        for kind, view in fragment.tensors.items():
            _copy(fragment, kind, view, index.get(fragment.name, []), open_files)
    return _all_tensors(open_files[SHARED])


def _all_tensors(file: Any) -> dict[str, Tensor]:
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _copy(
    fragment: Fragment, kind: str, view: Tensor, written: list[tuple[int, int, str]], files: dict[str, Any]
) -> None:
    """Fills one view from what was written of the same elements."""
    filled = 0
    for start, stop, file in written:
        low, high = max(fragment.start, start), min(fragment.stop, stop)
        if low < high:
            values = files[file].get_slice(_key(kind, fragment.name, start))[low - start : high - start]
            view[low - fragment.start : high - fragment.start].copy_(values)
            filled += high - low
    if filled != fragment.numel:
        raise CheckpointError(f"the checkpoint holds {filled} of {fragment.numel} values of {fragment.name}")


def read_weights(
    path: Path, manifest: Manifest, shapes: dict[str, list[int]], kind: str = "ema"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's weights by name, fp32 on the CPU, and the small tensors that all ranks share: center, buffers.

    Args:
        path, manifest: of the checkpoint, as :func:`newest` or :func:`read_manifest` gave them.
        shapes: of every parameter by name.
        kind: the teacher's weights (``ema``) or the student's (``param``).

    Raises CheckpointError when the checkpoint is of a network of other ``shapes``.
    """
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    wholes = [Fragment(name, 0, x.numel(), tensors={kind: x.view(-1)}) for name, x in weights.items()]
    return weights, load(path, manifest, wholes, shapes)

"""Checkpoints, read: the newest that is whole, at any number of ranks and any ZeRO stage."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack

from torch import Tensor

from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment
from fastdino.training.checkpoint.manifest import CheckpointError, Manifest, NewerFormatError, key
from fastdino.training.checkpoint.storage import Store
from fastdino.training.checkpoint.tensors import TensorFile, blocks, copied

log = logging.getLogger(__name__)


def newest(store: Store, ranks: Ranks | None = None) -> Manifest | None:
    """Of the newest whole checkpoint; damaged ones are named in a warning and passed over. None if there is none.

    Rank 0 of ``ranks`` decides and tells the others, because a network file system may show them different folders.
    Raises CheckpointError if there are checkpoints but none is whole, or the newest is from a newer format.
    """
    chosen = _newest(store) if ranks is None or ranks.is_main else None
    if ranks is not None:
        chosen = ranks.gather(chosen)[0]
    if isinstance(chosen, CheckpointError):
        raise chosen
    return chosen


def _newest(store: Store) -> Manifest | CheckpointError | None:
    damage: CheckpointError | None = None
    try:
        steps = store.steps()
    except CheckpointError as error:
        return error
    for step in reversed(steps):
        try:
            return read_manifest(store, step)
        except NewerFormatError as error:
            return error
        except CheckpointError as error:
            log.warning("%s; looking for an older one", error)
            damage = damage or error
    return damage


def read_manifest(store: Store, step: int) -> Manifest:
    """The manifest of a checkpoint whose files are all there and whole; raises CheckpointError otherwise."""
    name = store.name(step)
    try:
        text = store.manifest(step)
    except OSError as error:
        raise CheckpointError(f"{name} is not a checkpoint: its manifest cannot be read ({error})") from error
    manifest = Manifest.from_json(text, name)
    if manifest.step != step:
        raise CheckpointError(
            f"{name} was renamed: it is the checkpoint of step {manifest.step}. Give it its name back"
        )
    for file, expected in manifest.files.items():
        try:
            with store.open(step, file) as opened:
                found = copied(blocks(opened))
        except FileNotFoundError:
            raise CheckpointError(f"{name} is incomplete: {file} is missing. Use an older checkpoint") from None
        except Exception as error:  # a store's library has its own
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{name}: {file} cannot be read: {reason}. Use an older checkpoint") from error
        if found != expected:
            raise CheckpointError(
                f"{name}: {file} is damaged: {found['bytes']} bytes with checksum {found['crc32']:08x}, written as "
                f"{expected['bytes']} bytes with {expected['crc32']:08x}. Use an older checkpoint"
            )
    return manifest


def load(
    store: Store, manifest: Manifest, fragments: Iterable[Fragment], shapes: dict[str, list[int]]
) -> dict[str, Tensor]:
    """Copies a checkpoint into the live views of ``fragments``, whatever ranks and stage it was written with.

    Returns the shared tensors. Raises CheckpointError, before anything is changed, if it is from another model.
    """
    if shapes != manifest.shapes:
        theirs, ours = manifest.shapes, shapes
        name = next(n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n))
        raise CheckpointError(
            f"{store.name(manifest.step)} is from another model: {name} is {theirs.get(name, 'missing')} there, "
            f"{ours.get(name, 'missing')} here. Use the run's own settings, or another run.dir"
        )
    with Reader(store, manifest) as reader:
        for fragment in fragments:
            for kind, view in fragment.tensors.items():
                reader.fill(fragment, kind, view)
        return reader.shared()


class Reader:
    """An open checkpoint, of which any elements are read. A context manager; files are opened as they are needed."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store, self._manifest, self._files = store, manifest, dict[str, TensorFile]()
        self._index: dict[str, list[tuple[int, int, str]]] = {}
        for file, written in manifest.pieces.items():
            for name, start, stop in written:
                self._index.setdefault(name, []).append((start, stop, file))

    def __enter__(self) -> "Reader":
        self._open = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def fill(self, fragment: Fragment, kind: str, view: Tensor) -> None:
        """Copies what was written of a fragment's elements into its ``view``. Raises CheckpointError if any lack."""
        filled = 0
        for start, stop, file in self._index.get(fragment.name, []):
            low, high = max(fragment.start, start), min(fragment.stop, stop)
            if low < high:
                values = self._file(file).read(key(kind, fragment.name, start), low - start, high - start)
                view[low - fragment.start : high - fragment.start].copy_(values)
                filled += high - low
        if filled != fragment.numel:
            raise CheckpointError(f"the checkpoint holds {filled} of {fragment.numel} values of {fragment.name}")

    def shared(self) -> dict[str, Tensor]:
        """The small tensors that all ranks share."""
        return self._file(self._manifest.shared).whole()

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            step = self._manifest.step
            where = f"{self._store.name(step)}: {name}"
            try:
                opened = self._open.enter_context(self._store.open(step, name))
            except OSError as error:
                raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
            self._files[name] = TensorFile(opened, where)
        return self._files[name]

"""Checkpoints, written: each rank its part, then rank 0 makes a checkpoint of the parts."""

import functools
import uuid
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment
from fastdino.training.checkpoint.manifest import FORMAT, CheckpointError, Manifest, key
from fastdino.training.checkpoint.storage import Draft, Store
from fastdino.training.checkpoint.tensors import pieces

SHARED = "shared.safetensors"

Report = tuple[dict[str, dict[str, int]], dict[str, list[tuple[str, int, int]]]]
"""What a rank has written: bytes and crc32 by file, and the fragments in it."""


def save(
    store: Store,
    step: int,
    ranks: Ranks,
    *,
    fragments: Iterable[Fragment],
    shared: dict[str, Tensor],
    shapes: dict[str, list[int]],
    meta: dict[str, Any],
) -> None:
    """Writes a checkpoint; every rank calls it at the same step.

    Args:
        store: the same on all ranks.
        fragments: what this rank has to write; none where another rank writes the same.
        shared: small tensors that are equal on all ranks: center, counters, buffers. Rank 0 writes them.
        shapes: shape of every parameter by name.
        meta: anything JSON can hold.

    Raises CheckpointError on all ranks if any could not write; checkpoints from before stay as they are.
    """
    draft = Draft(step, ranks.gather(uuid.uuid4().hex[:8])[0])
    report, failure = None, None
    try:
        report = _write(store, draft, ranks, [*fragments], shared)
    except OSError as error:
        failure = f"rank {ranks.rank}: {error}"
    everyone = ranks.gather((report, failure))
    reports, failures = [told[0] for told in everyone], [told[1] for told in everyone]
    if ranks.is_main and not any(failures):
        try:
            store.commit(draft, _manifest(step, reports, shapes, meta).to_json())
        except OSError as error:
            failure = f"rank 0: {error}"
    if ranks.is_main:
        store.abandon(draft)
    failures = [failure for failure in (*failures, *ranks.gather(failure)) if failure]
    if failures:
        raise CheckpointError(
            f"could not write checkpoint {store.name(step)} ({failures[0]}). Older checkpoints are whole: free some "
            "room and run the same command again"
        )


def _write(store: Store, draft: Draft, ranks: Ranks, owned: list[Fragment], shared: dict[str, Tensor]) -> Report:
    """A rank's part."""
    files, written = dict[str, dict[str, int]](), dict[str, list[tuple[str, int, int]]]()
    if owned:
        tensors = {key(kind, p.name, p.start): tensor.cpu() for p in owned for kind, tensor in p.tensors.items()}
        file = f"rank-{ranks.rank:05d}.safetensors"
        name, files[name] = store.write(draft, file, functools.partial(pieces, tensors))
        written[name] = [(p.name, p.start, p.stop) for p in owned]
    if ranks.is_main:
        tensors = {name: tensor.detach().cpu() for name, tensor in shared.items()}
        name, files[name] = store.write(draft, SHARED, functools.partial(pieces, tensors))
    return files, written


def _manifest(step: int, reports: list[Report], shapes: dict[str, list[int]], meta: dict[str, Any]) -> Manifest:
    files = {name: size for measured, _ in reports for name, size in measured.items()}
    owned = {name: fragments for _, written in reports for name, fragments in written.items()}
    return Manifest(
        format=FORMAT, step=step, world_size=len(reports), shapes=shapes, files=files, pieces=owned, meta=meta
    )

"""Checkpoints, written while training goes on: each rank its part, then rank 0 makes a checkpoint of the parts."""

import functools
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment
from fastdino.training.checkpoint.manifest import FORMAT, Manifest, key
from fastdino.training.checkpoint.snapshot import Snapshot, Source
from fastdino.training.checkpoint.storage import Content, Draft, Store
from fastdino.training.checkpoint.tensors import pieces

SHARED = "shared.safetensors"
PATIENCE = 60.0  # seconds for a write that is given up to end

Report = tuple[dict[str, dict[str, int]], dict[str, list[tuple[str, int, int]]]]
"""What a rank has written: bytes and crc32 by file, and the fragments in each."""


class About(NamedTuple):
    """What a checkpoint says beside its tensors, the same on all ranks."""

    step: int
    shapes: dict[str, list[int]]
    """Of every parameter by name."""
    meta: dict[str, Any]
    """Anything JSON can hold."""
    keep_for_good: Iterable[int] = ()
    """Steps whose checkpoints are not removed for newer ones."""


class Outcome(NamedTuple):
    """How a save ended."""

    step: int
    failure: str | None
    """Which rank could not write, and why; None where the checkpoint is there."""
    seconds: float
    """From its copies to its commit."""


class _GivenUp(BaseException):
    """Raised in a write that has become useless. No Exception: no store's library may take it for one of its own."""


class _Work:
    """What a thread does: what it returned, or why it failed; neither when it was given up."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.failure: str | None = None
        # a daemon, because a file system that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._run, args=[work], name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except _GivenUp:
            pass
        except OSError as error:
            self.failure = str(error)
        except Exception as error:  # of a store's library; nobody else would hear of it
            self.failure = f"{type(error).__name__}: {error}"


class Saver:
    """Writes checkpoints beside the steps of a training. Every rank has one.

    A save begins with copies in host memory. A thread of each rank writes its own; when no rank writes any more, the
    ranks say how it went, and a thread of rank 0 commits. No thread takes part in a collective. Ranks see the end of a
    write at different steps: so nothing but ``flags`` that were reduced over the ranks, by maximum, and handed to
    :meth:`advance` at the same step on all, moves a save on; or :meth:`finish`, which all call.

    Args:
        store: the same on all ranks.
        ranks: of the run.
        keep: the number of newest checkpoints that are kept.
        committed: called with the step of each new checkpoint, by rank 0's thread.
    """

    def __init__(self, store: Store, ranks: Ranks, keep: int, committed: Callable[[int], None]) -> None:
        self._store, self._ranks, self._keep, self._committed = store, ranks, keep, committed
        self._snapshot = Snapshot(ranks.device)
        self._process, self._attempts = "", 0
        self._draft: Draft | None = None
        self._work: _Work | None = None  # there is one as long as there is a draft
        self._given_up = threading.Event()

    @property
    def step(self) -> int | None:
        """Of the save at hand; None when there is none."""
        return None if self._draft is None else self._draft.step

    @property
    def flags(self) -> tuple[bool, bool]:
        """Whether this rank is writing, and whether it failed."""
        work = self._work
        return (False, False) if work is None else (work.busy, work.failure is not None)

    def hold(self) -> None:
        """Makes the device finish the copies before what it is told next; called before shards are written."""
        self._snapshot.hold()

    def begin(self, about: About, fragments: Source, shared: dict[str, Tensor]) -> None:
        """Copies the state and begins to write it; every rank calls it at the same step, when no save is at hand.

        Args:
            about: the checkpoint.
            fragments: what this rank has to write; none where another rank writes the same.
            shared: small tensors that are equal on all ranks: center, counters, buffers. Rank 0 writes them.
        """
        assert self._draft is None, "one snapshot, never two"
        if not self._process:
            self._process = self._ranks.gather(uuid.uuid4().hex[:8])[0]
        self._attempts += 1
        self._about, self._started, self._commits = about, time.perf_counter(), False
        self._failure: str | None = None
        self._given_up.clear()
        self._draft = Draft(about.step, f"{self._process}-{self._attempts}")
        owned, small = self._snapshot.take(fragments, shared)
        self._work = _Work(functools.partial(self._write, self._draft, owned, small))

    def advance(self, writing: bool, failed: bool) -> Outcome | None:
        """Moves the save at hand on, given the maximum of all ranks' ``flags``; how it ended, if it has."""
        if failed:
            self._given_up.set()
        return None if writing or self._work is None else self._next(self._work)

    def finish(self) -> Outcome | None:
        """Waits for the save at hand, if there is one; how it ended. Every rank calls it."""
        outcome = None
        while self._work is not None:
            self._work.join()
            outcome = self._next(self._work)
        return outcome

    def leave(self) -> None:
        """Ends a save that the other ranks may not see to its end."""
        if self._work is not None and self._draft is not None:
            self._given_up.set()
            self._work.join(PATIENCE)
            if self._ranks.is_main:
                self._store.abandon(self._draft)
            self._work = self._draft = None

    def _next(self, work: _Work) -> Outcome | None:
        """From the ranks' writes, which are over, to rank 0's commit, and from there to the end."""
        assert self._draft is not None
        told = self._ranks.gather((work.failure, work.result))
        failures = [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(told) if failure]
        self._failure = next(iter(failures), self._failure)
        if not self._commits:
            self._commits = True
            self._work = _Work(functools.partial(self._conclude, self._draft, [report for _, report in told]))
            return None
        outcome = Outcome(self._draft.step, self._failure, time.perf_counter() - self._started)
        self._work = self._draft = None
        return outcome

    def _write(self, draft: Draft, owned: list[Fragment], shared: dict[str, Tensor]) -> Report:
        """A rank's part, from its copies."""
        self._snapshot.wait()
        files, written = dict[str, dict[str, int]](), dict[str, list[tuple[str, int, int]]]()
        if owned:
            tensors = {key(kind, p.name, p.start): tensor for p in owned for kind, tensor in p.tensors.items()}
            name, size = self._store.write(draft, f"rank-{self._ranks.rank:05d}.safetensors", self._content(tensors))
            files[name], written[name] = size, [(p.name, p.start, p.stop) for p in owned]
        if self._ranks.is_main:
            name, files[name] = self._store.write(draft, SHARED, self._content(shared))
        return files, written

    def _content(self, tensors: dict[str, Tensor]) -> Content:
        def content() -> Iterator[memoryview]:
            for piece in pieces(tensors):
                if self._given_up.is_set():
                    raise _GivenUp
                yield piece

        return content

    def _conclude(self, draft: Draft, reports: list[Report]) -> None:
        """What rank 0 does when no rank writes any more."""
        if not self._ranks.is_main:
            return
        try:
            if self._failure is None:
                self._store.commit(draft, self._manifest(reports).to_json())
                self._committed(draft.step)
        finally:
            self._store.abandon(draft)  # of one that was committed there is nothing left
        if self._failure is None:
            self._store.prune(self._keep, self._about.keep_for_good)

    def _manifest(self, reports: list[Report]) -> Manifest:
        step, shapes, meta, _ = self._about
        files = {name: size for measured, _ in reports for name, size in measured.items()}
        owned = {name: fragments for _, written in reports for name, fragments in written.items()}
        return Manifest(
            format=FORMAT, step=step, world_size=len(reports), shapes=shapes, files=files, pieces=owned, meta=meta
        )

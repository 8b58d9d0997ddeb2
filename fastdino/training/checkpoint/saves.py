"""The saves of a run: when one is waited for, what one that fails means, and what they cost."""

import contextlib
import logging
import time
from collections.abc import Callable

from torch import Tensor

from fastdino.distributed import Ranks
from fastdino.training.checkpoint.manifest import CheckpointError
from fastdino.training.checkpoint.saving import About, Outcome, Saver
from fastdino.training.checkpoint.snapshot import Source
from fastdino.training.checkpoint.storage import Store

MAX_FAILED = 3  # in a row, after which a run whose disk refuses checkpoints ends
LONG = 1.0  # seconds of waiting for a checkpoint that are worth a line

log = logging.getLogger(__name__)


class Saves:
    """Those of one process, see :class:`Saver` for the arguments. Every rank calls its methods at the same steps.

    A disk that refuses is an error in the log, and the next save tries again. Any method raises CheckpointError the
    third time in a row.

    Attributes:
        newest_step: of the newest checkpoint; None where there is none.
        failed: saves that the disk refused.
        waits: saves that had to wait until the one before was written.
    """

    def __init__(self, store: Store, ranks: Ranks, keep: int, committed: Callable[[int], None]) -> None:
        self._store, self._ranks, self._saver = store, ranks, Saver(store, ranks, keep, committed)
        self.newest_step: int | None = None
        self.failed = self.waits = self._failed_in_row = 0
        self._stall = self._seconds = 0.0

    def save(
        self, about: About, fragments: Source, shared: dict[str, Tensor], *, last: bool, wait: bool = False
    ) -> None:
        """Begins a checkpoint, which is written while training goes on; nothing for a step that is saved already.

        It is waited for where nobody will soon call :meth:`advance` (``wait``), and when it is the ``last`` of the
        process. That one has to succeed, for what was trained would be lost without a word: else CheckpointError.
        """
        began, before = time.perf_counter(), self._saver.step
        self.finish()
        if before not in (None, about.step):
            self.waits += 1
            seconds = time.perf_counter() - began
            if self._ranks.is_main and seconds > LONG:
                log.warning("training waited %.1f s until checkpoint %d was written: save less often", seconds, before)
        if about.step != self.newest_step:
            self._saver.begin(about, fragments, shared)
            if last or wait:
                self._conclude(self._saver.finish(), last)
        self._stall += time.perf_counter() - began

    @property
    def flags(self) -> tuple[bool, bool]:
        """Whether this rank is writing, and whether it failed: what the ranks tell each other at each step."""
        return self._saver.flags

    def advance(self, writing: bool, failed: bool) -> None:
        """Moves a save on by what all ranks' ``flags`` came to, by maximum."""
        if self._saver.step is not None:
            began = time.perf_counter()
            self._conclude(self._saver.advance(writing, failed))
            self._stall += time.perf_counter() - began

    def finish(self) -> None:
        """Waits for a save that has begun, if there is one."""
        self._conclude(self._saver.finish())

    def hold(self) -> None:
        """Before shards are written: what the device does next comes after it has copied them."""
        self._saver.hold()

    def leave(self) -> None:
        """Ends a save in whose midst the run ends: alone it is waited for, but other ranks may never come."""
        if self._ranks.world_size == 1:
            with contextlib.suppress(CheckpointError):
                self.finish()
        self._saver.leave()

    def figures(self) -> dict[str, float]:
        """For the metrics. Seconds: those of the host that saves took of the steps since the last call, and those from
        the newest save's beginning to its end."""
        stall, self._stall = self._stall, 0.0
        return {"failed_saves": self.failed, "checkpoint_stall_s": stall, "checkpoint_write_s": self._seconds}

    def _conclude(self, outcome: Outcome | None, last: bool = False) -> None:
        if outcome is None:
            return
        self._seconds = outcome.seconds
        if outcome.failure is None:
            self.newest_step, self._failed_in_row = outcome.step, 0
            return
        self.failed += 1
        self._failed_in_row += 1
        error = CheckpointError(
            f"could not write checkpoint {self._store.name(outcome.step)} ({outcome.failure}). Older checkpoints are "
            "whole: free some room and run the same command again"
        )
        if last or self._failed_in_row >= MAX_FAILED:
            raise error
        left = MAX_FAILED - self._failed_in_row
        if self._ranks.is_main:
            log.error("%s. Training goes on; the run ends when %d more saves in a row fail", error, left)

"""Processes that make batches ahead of the training process, and what is said when one of them dies."""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastdino.config import UserError


class WorkerDied(UserError, RuntimeError):
    """A process that makes views ended before its time."""


def affordable(wanted: int) -> int:
    """``wanted`` workers, or as many as this rank has cores: more would only take turns."""
    # torchrun's name for the ranks of this machine, and the deepspeed launcher's
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    return min(wanted, max(1, cores // ranks_here))


class MadeAhead:
    """Iterator over a dataset's batches, made by ``num_workers`` processes that start now, not at the first batch.

    They end when it is closed, dropped, or at the latest when this process ends.
    """

    def __init__(self, dataset: "Dataset[Any]", num_workers: int, **options: Any) -> None:
        loader = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=_set_up_worker,
            # fork, so that workers share the source's memory; they never touch the GPU.
            multiprocessing_context="fork" if num_workers else None,
            **options,
        )
        with _unchanged(signal.SIGCHLD):
            self._batches = iter(loader)
        self.close = weakref.finalize(self, _end, self._batches)

    def __iter__(self) -> "MadeAhead":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise WorkerDied(
                "a data worker died. Most often memory ran out, or shared memory did (a container's /dev/shm: docker "
                "run --shm-size). Give it more, or lower data.num_workers or run.local_batch"
            ) from error


@contextmanager
def _unchanged(number: signal.Signals) -> Iterator[None]:
    """Takes back torch's handler, which raises wherever the trainer happens to be when a worker dies.

    Without it the next batch reports the death, within 5 seconds.
    """
    handler = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():  # no other may set one, and then torch did not
        signal.signal(number, handler or signal.SIG_DFL)


def _end(batches: Any) -> None:
    """Ends the workers of a DataLoader's iterator, also of one that a traceback still holds."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()  # one that hangs in a read; they do not listen to SIGTERM


def _as_is(batch: Any) -> Any:
    return batch


def _set_up_worker(_: int) -> None:
    """Ctrl-C and a cluster's notice reach the whole process group; the trainer finishes its step first, on our data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _tell_unless_hung_up


def _tell_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Silent when the trainer was interrupted while it took a batch: it tells, and a worker's thread need not."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)

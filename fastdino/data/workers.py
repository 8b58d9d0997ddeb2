"""Processes that make batches ahead of the training process; whatever goes wrong between the two is one message."""

import logging
import mmap
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, NoReturn

from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastdino.config import UserError
from fastdino.launch import ranks_here

log = logging.getLogger(__name__)

_NOTE_SIZE = 500  # bytes in which a worker says what ended it
_HANGING = 2  # seconds without a batch after which a wait that is broken off may have to do with a read that hangs
_LONG = 60  # seconds without a batch that are worth a warning


class WorkerDied(UserError, RuntimeError):
    """A process that makes views could not start, ended before its time, or could not hand over what it made."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Most often memory ran out, or shared memory did (a container's /dev/shm: docker run --shm-size), "
            "or the limit of open files was reached (ulimit -n). Raise it, or lower data.num_workers or run.local_batch"
        )


def affordable(wanted: int) -> int:
    """``wanted`` workers, or as many as this rank has cores: more would only take turns.

    None in a process of a pool, which may not start processes of its own.
    """
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(wanted, max(1, cores // ranks_here(os.environ)))


class MadeAhead:
    """Iterator over a dataset's batches, made by ``num_workers`` processes that start now, not at the first batch.

    They end when it is closed, dropped, or at the latest soon after this process ends.

    Args:
        options: further arguments of DataLoader.

    Raises WorkerDied, when made and from ``next``, for all that fails between a worker and this process.
    """

    def __init__(self, dataset: "Dataset[Any]", num_workers: int, **options: Any) -> None:
        self._note = mmap.mmap(-1, _NOTE_SIZE)  # shared with the workers
        loader = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=partial(_set_up_worker, self._note, os.getpid()),
            timeout=1 if num_workers else 0,
            # fork, so that workers share the source's memory; they never touch the GPU.
            multiprocessing_context="fork" if num_workers else None,
            **options,
        )
        try:
            with _unchanged(signal.SIGCHLD):
                self._batches = iter(loader)
        except OSError as error:
            _end_half_made(error)
            raise WorkerDied(f"the data workers could not be started ({error})") from error
        self.close = weakref.finalize(self, _end, self._batches)

    def __iter__(self) -> "MadeAhead":
        return self

    def __next__(self) -> Any:
        for seconds in count(1):
            try:
                return next(self._batches)
            except StopIteration:
                raise
            except Exception as error:
                if not isinstance(self._batches, _MultiProcessingDataLoaderIter) or _of_the_dataset(error):
                    raise
                if "DataLoader timed out" not in str(error) or _pinning_ended(self._batches):
                    what = f"no batch came from the data workers ({self._cause(self._batches, error)})"
                    _kill(self._batches)
                    raise WorkerDied(what) from error
            except BaseException:  # a signal's; closing would wait in vain for a worker that hangs in a read
                if seconds > _HANGING:
                    _kill(self._batches)
                raise
            if seconds == _LONG:
                log.warning(
                    "no batch for %d seconds: reading images hangs, or the data workers are far too slow", _LONG
                )
        raise AssertionError("count() has no end")

    def _cause(self, batches: _MultiProcessingDataLoaderIter, error: Exception) -> str:
        note = self._note[:].rstrip(b"\0").decode("utf-8", "replace")
        exits = [worker.exitcode for worker in batches._workers if worker.exitcode]
        if note or not exits:
            return note or f"{type(error).__name__}: {error}"
        return f"one was ended by {signal.Signals(-exits[0]).name}" if exits[0] < 0 else f"one ended with {exits[0]}"


@contextmanager
def _unchanged(number: signal.Signals) -> Iterator[None]:
    """Takes back torch's handler, which raises wherever the trainer happens to be when a worker dies.

    Without it the next batch reports the death, within a second.
    """
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may set one, and then torch did not
            signal.signal(number, handler or signal.SIG_DFL)


def _of_the_dataset(error: Exception) -> bool:
    """True for what the dataset raised: a mistake of ours or of a source, not of the way between."""
    return "in DataLoader worker process" in str(error)


def _pinning_ended(batches: _MultiProcessingDataLoaderIter) -> bool:
    """True when the thread that page-locks what workers send has ended, as it does when a message cannot be read."""
    return batches._pin_memory and not batches._pin_memory_thread.is_alive()


def _kill(batches: Any) -> None:
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        for worker in batches._workers:
            worker.kill()  # they do not listen to SIGTERM


def _end_half_made(error: OSError) -> None:
    """Ends the workers that were started before one could not be; only the traceback holds their iterator."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        batches = frame.f_locals.get("self")
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            _kill(batches)
            batches._shutdown = True  # all of it, so that its __del__ does not look for the rest


def _end(batches: Any) -> None:
    """Ends the workers of a DataLoader's iterator, also of one that a traceback still holds."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        _kill(batches)  # one that hangs in a read


def _as_is(batch: Any) -> Any:
    return batch


def _set_up_worker(note: mmap.mmap, trainer: int, _: int) -> None:
    """Ctrl-C and a cluster's notice reach the whole process group; the trainer finishes its step first, on our data.

    A batch is handed over by a thread that would print what fails, drop the batch and live on, while the trainer
    waits for ever; so does the thread that hands over shared memory. Here both end the process, which is seen.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    failed = partial(_leave, note)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(failed)  # type: ignore[attr-defined]
    sys.excepthook = partial(_leave_unless_hung_up, failed)
    threading.Thread(target=end_with, args=(trainer,), daemon=True).start()


def _leave(note: mmap.mmap, error: BaseException, _: object = None) -> NoReturn:
    """Ends this worker, whichever thread calls; the trainer reads why."""
    note[:] = f"{type(error).__name__}: {error}".encode()[:_NOTE_SIZE].ljust(_NOTE_SIZE, b"\0")
    os._exit(1)


def _leave_unless_hung_up(
    failed: Callable[[BaseException], NoReturn],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Silent when the trainer was interrupted while it took a batch: it tells, and a worker's thread need not."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        failed(error)


def end_with(trainer: int) -> NoReturn:
    """A worker looks for its trainer between batches; one that hangs in a read never comes to it."""
    while os.getppid() == trainer:
        time.sleep(2)
    os._exit(1)

"""Processes that make batches ahead of the training process, in memory that both hold.

A batch is made in a slot, a piece of shared memory, some places at a time; only the numbers of slots and messages cross
between the processes. The order is that of the keys, whichever place is finished first.
"""

import logging
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdino.config import UserError
from fastdino.launch import ranks_here

log = logging.getLogger(__name__)

Key = TypeVar("Key")
Tensors = dict[str, Tensor]
Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a batch."""
Hold = Callable[[int], None]  # called with the index of the image that is read next, so that a message can name it

TOGETHER = 4  # places that are made together: numpy's part of each costs less, and few images are held decoded
_LONG = 60  # seconds without a batch that are worth a warning
_ALIGNED = 64  # bytes, of a tensor's place in a slot
_NOTHING = -1  # is held
_NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # to the whole process group, of which one takes care


class WorkerDied(UserError, RuntimeError):
    """A process that makes views could not start or ended before its time."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Most often memory ran out: lower data.num_workers, run.local_batch or, with views by the device, "
            "data.max_side, or give the job more"
        )


def affordable(wanted: int) -> int:
    """``wanted`` workers, or as many as this rank has cores: more would only take turns.

    None in a process of a pool, which may not start processes of its own.
    """
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(wanted, max(1, cores // ranks_here(os.environ)))


class Maker(Protocol[Key]):
    """Makes batches, some places at a time: a pure function of the keys, wherever and in whatever order it runs."""

    @property
    def fields(self) -> Fields:
        """Of a batch."""

    def prepare(self, out: Tensors, keys: list[Key]) -> None:
        """Writes what belongs to a batch as a whole."""

    def make(self, out: Tensors, first: int, keys: list[Key], hold: Hold) -> list[list[str]]:
        """Writes what belongs to the places from ``first`` on, and returns what is to be told of each.

        A UserError that it raises reaches the training process as it is.
        """

    def name(self, index: int) -> str:
        """What to call the image that is held."""


@dataclass
class Made:
    """A batch. ``free`` gives its memory back: from then on the next ones are written there."""

    tensors: Tensors
    notes: list[list[str]]
    """Of each place."""
    free: Callable[[], None]


class MadeAhead(Generic[Key]):
    """Iterator over the batches of ``keys``, made by processes that start now, not at the first batch.

    Process c of n makes batches c, c + n, ... They end when it is closed, dropped, or at the latest soon after this
    process ends.

    Args:
        processes: 0 makes a batch in this process, when it is asked for.
        threads: of each process, which share its batches' places.
        pinned: page-lock the slots, so that a GPU copies from them while it computes.

    Raises WorkerDied, when made and from ``next``, for all that fails between a worker and this process.
    """

    def __init__(
        self, maker: Maker[Key], keys: Iterator[list[Key]], processes: int, threads: int = 1, pinned: bool = False
    ) -> None:
        self._maker, self._keys, self._due, self._children = maker, keys, 0, list[_Child[Key]]()
        self.close = weakref.finalize(self, _end, self._children)
        try:
            for first in range(processes):
                self._children.append(_Child(maker, islice(keys, first, None, processes), threads))
        except OSError as error:
            self.close()
            raise WorkerDied(f"the processes that make views could not be started ({error})") from error
        if pinned:
            for child in self._children:
                child.pin()

    def __iter__(self) -> "MadeAhead[Key]":
        return self

    def __next__(self) -> Made:
        if not self._children:
            return self._make(next(self._keys))
        number, child = divmod(self._due, len(self._children))
        made = self._children[child].take(number)
        self._due += 1
        return made

    def _make(self, keys: list[Key]) -> Made:
        try:
            out = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._maker.fields.items()}
        except RuntimeError as error:
            raise WorkerDied(f"there is no room for a batch ({str(error).splitlines()[0]})") from error
        self._maker.prepare(out, keys)
        made = (self._maker.make(out, part.start, keys[part], lambda _: None) for part in _parts(keys))
        return Made(out, [notes for part in made for notes in part], lambda: None)


def _parts(keys: Sized) -> list[slice]:
    """The places of a batch, TOGETHER at a time."""
    return [slice(first, first + TOGETHER) for first in range(0, len(keys), TOGETHER)]


def _end(children: "list[_Child[Any]]") -> None:
    for child in children:
        child.end()


class _Slot:
    """Memory of one batch that a child writes and this process reads."""

    def __init__(self, fields: Fields) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in fields.items()}
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name], end = end, end + -(-size // _ALIGNED) * _ALIGNED
        self.bytes = torch.frombuffer(mmap.mmap(-1, max(end, _ALIGNED)), dtype=torch.uint8)
        self.tensors = {
            name: self.bytes[starts[name] : starts[name] + sizes[name]].view(dtype).view(shape)
            for name, (shape, dtype) in fields.items()
        }


@dataclass
class _Report:
    """What a child says of a batch."""

    number: int
    slot: int
    notes: list[list[str]] = field(default_factory=list)
    error: Exception | None = None
    """Of the batch; StopIteration: there is none."""


class _Child(Generic[Key]):
    """A process with threads, seen from the training process."""

    def __init__(self, maker: Maker[Key], batches: Iterator[list[Key]], threads: int) -> None:
        # One is read, one is ready, and the places of the others keep all threads busy.
        fields = maker.fields
        self._slots = [_Slot(fields) for _ in range(3)]
        self._held = np.frombuffer(mmap.mmap(-1, 8 * threads), np.int64)
        self._held[:] = _NOTHING
        self._maker, self._reports, self._pinned = maker, dict[int, _Report](), list[int]()
        theirs, self._free = multiprocessing.Pipe(duplex=False)
        self._ready, ready = multiprocessing.Pipe(duplex=False)
        ours = (self._free, self._ready)
        # Forked, so that it has the source and the slots as they lie; it never touches a GPU.
        context = multiprocessing.get_context("fork")
        workshop = _Workshop(maker, self._slots, self._held, ready)
        self._process = context.Process(target=workshop.run, args=(batches, theirs, ours, os.getpid()), daemon=True)
        # A notice that comes now waits: until the child ignores it, and until this process can handle it.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _NOTICES)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        ready.close()
        for slot in range(len(self._slots)):
            self._give(slot)

    def take(self, number: int) -> Made:
        """The child's batch ``number``. Raises StopIteration after the last one, and what its maker raised, again and
        again."""
        patience: float | None = _LONG
        while number not in self._reports:
            found = wait([self._ready, self._process.sentinel], patience)
            if not found:
                patience = None
                log.warning("no batch for %d seconds%s: reading hangs, or is far too slow", _LONG, self._reading())
            elif self._ready not in found or not self._receive():
                raise WorkerDied(self._cause())
        report = self._reports[number]
        if report.error is not None:
            raise report.error
        del self._reports[number]
        return Made(dict(self._slots[report.slot].tensors), report.notes, lambda: self._give(report.slot))

    def pin(self) -> None:
        """Page-locks the slots; where the driver refuses, copies wait."""
        for slot in self._slots:
            start = slot.bytes.data_ptr()
            try:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(start, slot.bytes.numel(), 0))
            except RuntimeError as error:
                log.warning("views are copied to the GPU while it waits: their memory was not page-locked (%s)", error)
                return
            self._pinned.append(start)

    def end(self) -> None:
        """Ends the process, also one that hangs in a read."""
        self._process.kill()  # it does not listen to SIGTERM
        self._process.join(1)  # one that the kernel keeps in a read ends later
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())
        self._free.close()
        self._ready.close()

    def _give(self, slot: int) -> None:
        with suppress(OSError):  # it has ended, as the next batch will say
            self._free.send_bytes(bytes([slot]))

    def _receive(self) -> bool:
        try:
            report = self._ready.recv()
        except (EOFError, OSError):
            return False
        self._reports[report.number] = report
        return True

    def _cause(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        return f"a process that makes views was ended by {how}{self._reading()}"

    def _reading(self) -> str:
        names = [self._maker.name(index) for index in self._held.tolist() if index != _NOTHING]
        return f" while it read {', '.join(names)}" if names else ""


@dataclass
class _Batch(Generic[Key]):
    """A batch that is being made."""

    keys: list[Key]
    report: _Report
    left: int  # parts that are not done


class _Workshop(Generic[Key]):
    """What runs in a child."""

    def __init__(self, maker: Maker[Key], slots: list[_Slot], held: np.ndarray, ready: "Connection[Any, Any]") -> None:
        self.maker, self.slots, self.held, self.ready = maker, slots, held, ready
        self.jobs = SimpleQueue[tuple[_Batch[Key], slice | None]]()

    def run(
        self,
        batches: Iterator[list[Key]],
        free: "Connection[Any, Any]",
        theirs: "tuple[Connection[Any, Any], ...]",
        trainer: int,
    ) -> NoReturn:
        """Makes a batch wherever a slot is free, until the trainer ends this process or ends."""
        # Ctrl-C and a cluster's notice reach the whole process group; the trainer finishes its step first, on our data.
        for notice in _NOTICES:
            signal.signal(notice, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOTICES)
        for end in theirs:
            end.close()
        threading.Thread(target=end_with, args=(trainer,), daemon=True).start()
        torch.set_num_threads(1)  # the threads that torch had are not in this process, and it would wait for them
        self.lock = threading.Lock()
        for thread in range(len(self.held)):
            threading.Thread(target=self._work, args=(thread,), daemon=True).start()
        number = 0
        while True:
            slot = _next_slot(free)
            try:
                keys = next(batches)
            except Exception as error:
                with self.lock:
                    self._report(_Report(number, slot, error=_told(error)))
                continue
            parts = _parts(keys)
            batch = _Batch(keys, _Report(number, slot, [[] for _ in keys]), 1 + len(parts))
            for part in (None, *parts):
                self.jobs.put((batch, part))
            number += 1

    def _work(self, thread: int) -> NoReturn:
        """Takes one part after another, of whatever batch comes next."""

        def hold(index: int) -> None:
            self.held[thread] = index

        while True:
            batch, part = self.jobs.get()
            out, report = self.slots[batch.report.slot].tensors, batch.report
            try:
                if part is None:
                    self.maker.prepare(out, batch.keys)
                else:
                    report.notes[part] = self.maker.make(out, part.start, batch.keys[part], hold)
            except Exception as error:
                report.error = _told(error)
            hold(_NOTHING)
            with self.lock:
                batch.left -= 1
                if not batch.left:
                    self._report(report)

    def _report(self, report: _Report) -> None:
        """Under the lock: messages of two threads would mix."""
        try:
            self.ready.send(report)
        except OSError:  # the trainer is gone
            os._exit(0)


def _next_slot(free: "Connection[Any, Any]") -> int:
    """Waits until one is free."""
    try:
        return free.recv_bytes()[0]
    except (EOFError, OSError):  # the trainer is gone
        os._exit(0)


def end_with(parent: int) -> NoReturn:
    """Ends this process soon after its parent, whatever its other threads wait for: a read may never come back."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _told(error: Exception) -> Exception:
    """An exception as it reaches the trainer: a mistake, of ours or of a source, with the trace of where it was."""
    if isinstance(error, (UserError, StopIteration)):
        return error
    trace = "".join(traceback.format_exception(error))
    return RuntimeError(f"a mistake in a process that makes views:\n{trace}")

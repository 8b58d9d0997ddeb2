"""Where a training touches other ranks and its disk, and what may be made to go wrong there, without product code.

:func:`wrap` puts itself around the entry points of torch, os, shutil and safetensors, before fastdino and DeepSpeed are
imported, which keep references of their own. A process that is armed counts its calls by rank, thread and place, and at
one of them a fault strikes: a signal to itself, a disk that is full, values that are no numbers.
"""

import _pyio
import builtins
import errno
import functools
import io
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "reduce_scatter",
    "reduce_scatter_tensor", "barrier",
)  # fmt: skip
ON_FILES = (
    (os, ("open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink")),  # pathlib calls these
    (shutil, ("rmtree",)),
    (safetensors.torch, ("save_file",)),
)
WRITES = ("open", "write", "fsync", "mkdir", "rename", "replace", "save_file")  # that a full disk may refuse
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}


@dataclass(frozen=True, order=True)
class Place:
    """Calls that are alike: of one rank, in one of its threads. ``path`` is in the run folder, digits left out."""

    rank: int
    thread: str
    call: str
    path: str = ""


@dataclass(frozen=True)
class Fault:
    """What happens at the ``nth`` call at a place, counted from 1."""

    place: Place
    nth: int
    moment: str
    """before or after the call; half: in the midst of a write."""
    kind: str
    """kill, term, usr1, disk or nan."""

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.place.call, self.place.path)))
        return f"{self.kind} {self.moment} {where} #{self.nth} of rank {self.place.rank}, {self.place.thread}"


class Armed:
    """Counts the calls of this process, whose run is in ``folder``, and lets the fault strike.

    Attributes:
        calls: how many at each place.
    """

    def __init__(self, rank: int, folder: Path, fault: Fault | None, struck: Callable[[], object]) -> None:
        self.calls: Counter[Place] = Counter()
        self._rank, self._folder, self._fault, self._struck = rank, os.path.realpath(folder), fault, struck
        self._lock = threading.Lock()

    def path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """What names the file within the run folder, the same for all that are alike; None of one elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        inside = os.path.relpath(os.path.abspath(os.fsdecode(path)), self._folder)
        return None if inside.startswith("..") else re.sub(r"\b[0-9a-f]{8,}\b|\d+", "N", inside)

    def __call__(self, call: str, path: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        thread = re.sub(r"\W*\d.*", "", threading.current_thread().name)
        place = Place(self._rank, thread, call, path)
        with self._lock:
            self.calls[place] += 1
            fault = self._fault
            if fault is None or fault.place != place or fault.nth != self.calls[place]:
                fault = None
        if fault is None or (fault.kind == "disk" and call == "mkdir" and os.path.isdir(args[0])):  # that needs no room
            return real(*args, **kwargs)
        self._struck()
        if fault.moment == "half":
            first = len(args[1]) // 2
            written = real(args[0], args[1][:first])
            _strike(fault.kind)
            return written + real(args[0], args[1][first:])
        if fault.moment != "after":
            _strike(fault.kind)
        try:
            done = real(*args, **kwargs)
        finally:  # also of a call that raises, such as to remove what is not there
            if fault.moment == "after":
                _strike(fault.kind)
        return done * float("nan") if fault.kind == "nan" else done


armed: Armed | None = None  # of this process


def _strike(kind: str) -> None:
    if kind == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])


def wrap() -> None:
    """Around all entry points, once in a process, which is armed later."""
    for name in COLLECTIVES:
        _wrap(dist, name, lambda *args, **kwargs: "")
    for owner, names in ON_FILES:
        for name in names:
            _wrap(owner, name, _path_of.get(name, _first_path))
    real = builtins.open

    @functools.wraps(real)
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Files that are written are Python's own, which write by os.write."""
        own = armed is not None and set(mode) & set("wax+") and armed.path(file)
        return (_pyio.open if own else real)(file, mode, *args, **kwargs)

    builtins.open = io.open = opened  # type: ignore[assignment]


def wrap_images(module: Any) -> None:
    """Around what makes views the input of a network, which may become NaN."""
    _wrap(module, "normalize", lambda *args: "")


def _wrap(owner: Any, name: str, path_of: Callable[..., str | None]) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        path = None if armed is None else path_of(*args, **kwargs)
        if armed is None or path is None:
            return real(*args, **kwargs)
        return armed(name, path, real, args, kwargs)

    setattr(owner, name, wrapped)


def _first_path(path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> str | None:
    assert armed is not None
    return armed.path(path, dir_fd)


def _created(path: Any, flags: int, *_: Any, dir_fd: int | None = None) -> str | None:
    """Of a file that is opened, one that may be made."""
    return _first_path(path, dir_fd=dir_fd) if flags & os.O_CREAT else None


_path_of: dict[str, Callable[..., str | None]] = {
    "open": _created,
    "save_file": lambda tensors, path, *_: _first_path(path),
}

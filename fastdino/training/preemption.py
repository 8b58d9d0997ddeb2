"""Preemption: a scheduler asks the run to stop. It stops after a checkpoint, or at once when it is asked again."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from fastdino.config import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 5.0  # seconds that work may still take after a notice before it is interrupted
REPEAT = 2.0  # seconds within which a second SIGTERM is the first again: launchers pass it on to processes that had it
_LEAVE = 255  # to the listening thread; no signal has that number


class Preempted(UserError, RuntimeError):
    """SIGTERM or SIGUSR1 ended the run after a checkpoint; the same command resumes it."""

    exit_code = 85  # lets a job script tell a notice, after which it requeues, from an error that will come again


class Interrupted(BaseException):
    """Raised by a notice in the midst of :meth:`PreemptionNotice.interruptible`.

    Like KeyboardInterrupt no Exception, because it may rise inside a decoder whose exceptions mean a bad image.
    """


class PreemptionNotice:
    """While entered, SIGTERM and SIGUSR1 set ``given`` instead of ending the process; a later SIGTERM ends it at once.

    The second SIGTERM is read by a thread, so it counts also while the main thread waits in a collective, where no
    signal handler runs. Outside the main thread (a notebook's executor, a sweep's thread) signals stay the program's:
    ``given`` stays False. Handlers are put back on leaving.
    """

    def __init__(self) -> None:
        self.given = False
        self._deadline: float | None = None  # of the work at hand, once there was a notice
        self._grace: float | None = None  # of the work at hand; None: it is not to be interrupted
        self._main = threading.main_thread()

    def __enter__(self) -> "PreemptionNotice":
        self._active = threading.current_thread() is self._main
        if self._active:
            self._ear, self._mouth = socket.socketpair()
            self._mouth.setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            self._listener = threading.Thread(target=self._listen, name="preemption", daemon=True)
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            for number, handler in self._handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(self._fd_before)
            self._mouth.send(bytes([_LEAVE]))  # closing would not do: forked workers hold a copy
            self._listener.join()
            self._mouth.close()
            self._ear.close()

    @contextmanager
    def interruptible(self, grace: float = GRACE) -> Iterator[None]:
        """Work that a notice may interrupt: Interrupted is raised in it ``grace`` seconds after the notice."""
        self._grace = grace
        try:
            if self.given:
                self._set_deadline(grace)
            yield
        finally:
            self._grace = self._deadline = None

    def _on_signal(self, number: int, frame: object) -> None:
        self.given = True
        if self._grace is None:
            return
        if self._deadline is None:
            self._set_deadline(self._grace)
        elif time.monotonic() >= self._deadline:
            self._grace = None  # once
            raise Interrupted

    def _set_deadline(self, grace: float) -> None:
        self._deadline = time.monotonic() + grace

    def _listen(self) -> None:
        """Runs in a thread of its own: counts SIGTERMs, and wakes the main thread when its time is up."""
        first: float | None = None
        while True:
            try:
                received = self._ear.recv(1)[0]
            except TimeoutError:
                received = 0
            now = time.monotonic()
            if received == _LEAVE:
                return
            if received == signal.SIGTERM:
                if first is not None and now - first > REPEAT:
                    end_now(128 + signal.SIGTERM)
                first = first or now
            if received in SIGNALS:
                self._ear.settimeout(0.2)  # from now on the time is watched
            if self._grace is not None and self._deadline is not None and now >= self._deadline:
                signal.pthread_kill(self._main.ident or 0, signal.SIGUSR1)  # ends its system call; _on_signal follows


def end_now(code: int) -> None:
    """Ends the process with no regard to what it does. Says nothing: the main thread may hold the log's lock."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)

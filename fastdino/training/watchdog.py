"""A watchdog: a run that makes no progress writes the stacks of all ranks and ends, with exit code 86."""

import contextlib
import faulthandler
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from fastdino.config import RunConfig
from fastdino.distributed import Ranks
from fastdino.training.preemption import end_now

EXIT_CODE = 86  # lets a job script tell a hang, after which it starts the run again, from an error of settings
SLOW = 900.0  # seconds that the start, the first steps, a checkpoint and a batch of an evaluation may take
FOREVER = float("inf")  # of a rank that waits for one that is watched itself
TIMES = 20  # the median step
PERIOD = 1.0  # seconds between two looks
PATIENCE = 20.0  # seconds for the stacks to be written, and for the other ranks to have written theirs


class Pulse:
    """What a rank does and since when: the trainer says it, the watchdog judges it.

    Args:
        least: seconds that every step may take; one may take 20 times the median of those before, too.
        clock: seconds, from any start.
    """

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.where = "the start"
        self._least, self._clock = least, clock
        self._times: deque[float] = deque(maxlen=64)
        self._section: float | None = SLOW  # what the section at hand may take; None in a step
        self._last = clock()

    def step(self, step: int) -> None:
        """Number ``step`` is done."""
        now = self._clock()
        if self._section is None:
            self._times.append(now - self._last)
        self._last, self._section, self.where = now, None, f"step {step + 1}"

    def beat(self) -> None:
        """What takes long goes on."""
        self._last = self._clock()

    def forgive(self, seconds: float) -> None:
        """The process was not running for so long."""
        self._last += seconds

    @contextlib.contextmanager
    def section(self, where: str, limit: float = SLOW) -> Iterator[None]:
        """Work between two steps that may be silent for ``limit`` seconds; on leaving it a new step begins."""
        before = self.where, self._section
        self._last, self._section, self.where = self._clock(), limit, where
        try:
            yield
        finally:
            self._last, (self.where, self._section) = self._clock(), before

    @property
    def limit(self) -> float:
        """Seconds of silence that are no hang."""
        times = tuple(self._times)
        known = TIMES * statistics.median(times) if len(times) > 2 else SLOW  # kernels are compiled in the first steps
        return max(self._section or 0.0, known, self._least)

    def overdue(self) -> str | None:
        """What has taken too long, if anything has."""
        silent, limit = self._clock() - self._last, self.limit
        return f"no progress for {silent:.0f} s in {self.where} (limit {limit:.0f} s)" if silent > limit else None


class Watchdog:
    """While entered, ends a process that hangs, and with it all ranks of its run. A context manager of every rank.

    One thread looks at this rank's pulse, one asks a store whether another rank hangs; neither takes part in a
    collective. Of a hang on one rank every rank writes its stacks to ``stacks/`` in the run folder, so that what the
    others wait for can be read, and exits with 86. SIGUSR2 writes a process's stacks to stderr at any time.

    Args:
        run: settings; the watchdog is off where hang_after is 0.
        ranks: of the run.

    Attributes:
        pulse: what this rank says of itself.
        last_words: called with exit code and reason before the process ends.
    """

    def __init__(self, run: RunConfig, ranks: Ranks) -> None:
        self.pulse = Pulse(run.hang_after)
        self.last_words: Callable[[int, str], None] = lambda code, reason: None
        self._folder, self._active, self._ranks = run.dir, run.hang_after > 0, ranks
        self._board = ranks.board() if self._active else None
        self._told = ""  # by another rank
        self._left = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work, needed in (("watchdog", self._watch, self._active), ("hangs", self._listen, self._board))
            if needed
        ]

    def __enter__(self) -> Self:
        if self._active:
            faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self.pulse.section("the end"):
                self._ranks.barrier()  # a rank that is done goes on listening until all are
        self._left.set()
        for thread, limit in zip(self._threads, (4 * PATIENCE, PATIENCE / 4), strict=False):
            thread.join(limit)  # an end that has begun takes less, and its exit code counts; a store may be gone
        if self._active:
            faulthandler.unregister(signal.SIGUSR2)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._left.wait(PERIOD):
            now = time.monotonic()
            if now - before > 2 * PERIOD:  # the process was stopped, or got no processor
                self.pulse.forgive(now - before - PERIOD)
            before = now
            if overdue := self.pulse.overdue():
                self._end(f"rank {self._ranks.rank} made {overdue}")
            elif self._told:
                self._end(self._told)

    def _listen(self) -> None:
        """Asks for hangs of other ranks. A store that is gone tells of none: this rank will then hang itself."""
        assert self._board is not None
        with contextlib.suppress(RuntimeError):
            while not self._left.wait(PERIOD):
                if self._board.check(["hang"]):
                    self._told = self._board.get("hang").decode()
                    return

    def _end(self, reason: str) -> None:
        """Nothing here waits for long: a disk, a terminal, a store may be what hangs."""
        board, rank = self._board, self._ranks.rank
        if board:
            _within(PATIENCE / 4, lambda: board.compare_set("hang", "", reason))
        _within(PATIENCE, lambda: self._write_stacks(reason))
        _within(PATIENCE / 4, lambda: self.last_words(EXIT_CODE, reason))
        if board:
            _within(PATIENCE / 4, lambda: board.set(f"written {rank}", ""))
            _within(PATIENCE, self._wait_for_others)  # whose connections break when this process is gone
        end_now(EXIT_CODE)

    def _write_stacks(self, reason: str) -> None:
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.uname().nodename} pid {os.getpid()}: {reason}"
        rank, there = self._ranks.rank, (self._folder / "config.json").exists()
        if self._ranks.is_main or reason.startswith(f"rank {rank} "):
            where = f"{self._folder / 'stacks'} has" if there else "below are"
            say = f"fastdino: {reason}. {where} the stacks of all ranks; the run ends with exit code {EXIT_CODE}, and "
            os.write(2, f"{say}the same command resumes it\n".encode())
        if not there:
            faulthandler.dump_traceback(2, all_threads=True)
            return
        (self._folder / "stacks").mkdir(exist_ok=True)
        with (self._folder / "stacks" / f"rank-{rank:05d}.txt").open("w") as file:
            file.write(f"{head}\nrank {rank} was in {self.pulse.where}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _wait_for_others(self) -> None:
        assert self._board is not None
        everyone = [f"written {rank}" for rank in range(self._ranks.world_size)]
        while not self._board.check(everyone):
            time.sleep(0.1)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Does ``work``, or leaves it to itself when it takes longer or fails."""

    def attempt() -> None:
        with contextlib.suppress(OSError, RuntimeError):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)

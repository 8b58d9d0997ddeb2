"""Workers end with the trainer, leave its signals alone, and their death is told."""

import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fastdino.data import ShapesSource, WorkerDied, labelled_batches, workers
from fastdino.data.workers import MadeAhead, affordable
from tests.children import environment
from tests.data.batches import children, make_config, start, wait_for


def test_a_killed_worker_is_told_by_the_next_batch_and_nowhere_else(shapes):
    before, heard = children(), signal.getsignal(signal.SIGCHLD)
    batches = start(make_config(num_workers=1), shapes)
    assert signal.getsignal(signal.SIGCHLD) == heard
    next(batches)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # nothing raises here
    with pytest.raises(WorkerDied, match=r"memory.*--shm-size.*data\.num_workers"):
        list(islice(batches, 100))


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """A limit of this process, and for good of those that it starts meanwhile."""
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


def fails_within(seconds: float, batches: Iterator[object]) -> str:
    """Message of the WorkerDied that comes of taking batches."""
    started = time.monotonic()
    with pytest.raises(WorkerDied) as caught:
        list(islice(batches, 1000))
    assert time.monotonic() - started < seconds
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["train", "labelled"])
def test_shared_memory_that_runs_out_is_told(shapes, kind):
    """The thread that hands a batch over fails, not the code that made it."""
    before = children()
    with limited(resource.RLIMIT_FSIZE, 1000):  # of a file in /dev/shm too
        batches = start(make_config(1), shapes) if kind == "train" else labelled_batches(shapes, 32, 4, 1)
        message = fails_within(20, batches)
    assert "RuntimeError: unable to resize file </torch_" in message
    assert "--shm-size" in message
    wait_for(lambda: not children() - before, 10)


class Odd(Dataset):
    """Makes what cannot be sent, or a mistake."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __len__(self) -> int:
        return 100

    def __getitems__(self, keys: list[int]) -> object:
        if self.what == "mistake":
            raise KeyError("a mistake of the dataset")
        return (lambda: None) if self.what == "unpicklable" else torch.zeros(1)


def test_what_cannot_be_sent_is_told():
    assert "lambda" in fails_within(20, MadeAhead(Odd("unpicklable"), 1, batch_size=1))


def test_too_few_open_files_in_the_trainer_are_told():
    batches = MadeAhead(Odd("tensor"), 2, batch_size=1)
    next(batches)
    with limited(resource.RLIMIT_NOFILE, 3):
        message = fails_within(20, batches)
    assert "ulimit -n" in message


def test_a_mistake_in_a_worker_keeps_its_traceback():
    with pytest.raises(KeyError, match="__getitems__"):
        next(MadeAhead(Odd("mistake"), 1, batch_size=1))


def test_workers_that_cannot_be_started_are_told(shapes, monkeypatch):
    before, forks, fork = children(), [], os.fork

    def second_fails() -> int:
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    with pytest.raises(WorkerDied, match=r"could not be started.*Resource temporarily unavailable"):
        start(make_config(num_workers=2), shapes)
    wait_for(lambda: not children() - before, 10)


class Hanging(ShapesSource):
    """Image 5 lies where reads do not come back: a pipe that nobody writes to, for a network disk."""

    def __init__(self, pipe: Path) -> None:
        super().__init__(22, 40)
        self.pipe = pipe

    def read(self, index: int):
        return super().read(index) if index != 5 else self.pipe.read_bytes()


class Notice(BaseException):
    """What the handler of a signal raises."""


def test_a_signal_ends_a_wait_that_hangs_and_closing_does_not_wait_for_it(tmp_path, monkeypatch, caplog):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(workers, "_LONG", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))

    def handle(*_: object) -> None:
        raise Notice

    before = children()
    batches = start(make_config(num_workers=3), Hanging(tmp_path / "pipe"))
    heard = signal.signal(signal.SIGUSR1, handle)
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    started = time.monotonic()
    try:
        with pytest.raises(Notice):
            list(islice(batches, 30))
    finally:
        signal.signal(signal.SIGUSR1, heard)
    batches.close()
    assert time.monotonic() - started < 8
    assert "no batch for 2 seconds" in caplog.text
    wait_for(lambda: not children() - before, 10)


def test_a_process_of_a_pool_does_the_work_itself(shapes):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(affordable, (4,)) == 0


def test_closing_ends_the_workers(shapes):
    before = children()
    batches = start(make_config(num_workers=2), shapes)
    next(batches)
    assert children() - before
    batches.close()
    wait_for(lambda: not children() - before)


def test_dropping_the_iterator_ends_the_workers(shapes):
    before = children()
    batches = start(make_config(num_workers=1), shapes)
    next(batches)
    del batches
    wait_for(lambda: not children() - before)


def test_workers_leave_signals_to_the_trainer(shapes):
    before = children()
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, in a shell's background job
    batches = start(make_config(num_workers=1), shapes)
    signal.signal(signal.SIGINT, heard)
    next(batches)
    (worker,) = children() - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    for _ in range(20):
        next(batches)
    assert children() - before == {worker}
    batches.close()


SCRIPT = """
    import signal, sys, time, torch
    from fastdino.config import Config, DataConfig, RunConfig, ViewsConfig
    from fastdino.data import ShapesSource, labelled_batches, train_batches
    config = Config(data=DataConfig(num_workers=1), run=RunConfig(local_batch=4))
    class Source(ShapesSource):
        def read(self, index):
            if sys.argv[1] == "hanging" and index % 8 == 0:
                time.sleep(1000)
            return super().read(index)
    source = Source(100000, 40)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    if sys.argv[1] != "labelled":
        batches = train_batches(config, source, rank=0, world_size=1, start_step=0, device=torch.device("cpu"))
    else:
        batches = labelled_batches(source, 32, 4, num_workers=1)
    if sys.argv[1] != "hanging":
        next(batches)
    print(open(f"/proc/self/task/{__import__('os').getpid()}/children").read(), flush=True)
    while True:
        next(batches)
"""


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "train"),
        (signal.SIGINT, "labelled"),
        (signal.SIGINT, "hanging"),
        (signal.SIGKILL, "train"),
        (signal.SIGKILL, "hanging"),
    ],
)
def test_workers_end_with_the_trainer(number, kind):
    """Ctrl-C reaches the whole group; a kill only the trainer. Neither leaves a worker or a second traceback."""
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    workers = [int(pid) for pid in script.stdout.readline().split()]
    assert workers
    os.killpg(script.pid, number) if number == signal.SIGINT else os.kill(script.pid, number)
    _, errors = script.communicate(timeout=120)
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
        assert "KeyboardInterrupt" in errors
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_workers_are_no_more_than_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert affordable(10) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert affordable(10) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert affordable(10) == 1
    assert affordable(0) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "8")  # the deepspeed launcher's
    assert affordable(10) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_workers_are_noted_once_over_all_ranks(shapes, monkeypatch, caplog, rank):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    before = children()
    with caplog.at_level(logging.INFO):
        batches = start(make_config(num_workers=3), shapes, rank=rank, world_size=2)
    assert len(children() - before) == 1
    assert ("data.num_workers=3 lowered to 1" in caplog.text) == (rank == 0)
    batches.close()

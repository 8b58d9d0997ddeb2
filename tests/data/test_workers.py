"""Workers end with the trainer, leave its signals alone, and their death is told."""

import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data import ShapesSource, WorkerDied, workers
from fastdino.data.workers import MadeAhead, affordable
from tests.children import environment, wait_for
from tests.data.batches import children, make_config, start


def test_a_killed_worker_is_told_by_the_next_batch_and_nowhere_else(shapes):
    before, heard = children(), signal.getsignal(signal.SIGCHLD)
    batches = start(make_config(num_workers=1), shapes)
    assert signal.getsignal(signal.SIGCHLD) == heard
    next(batches)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # nothing raises here
    with pytest.raises(WorkerDied, match=r"SIGKILL.*memory.*data\.num_workers"):
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


class Numbers:
    """A batch holds its keys. What is odd happens at key 7."""

    def __init__(self, size: int = 9, odd: Callable[[], None] = lambda: None) -> None:
        self.fields, self.odd = {"keys": ((size,), torch.int64), "first": ((1,), torch.int64)}, odd

    def prepare(self, out: dict[str, Tensor], keys: list[int]) -> None:
        out["first"][0] = keys[0]

    def make(self, out: dict[str, Tensor], first: int, keys: list[int], hold: Callable[[int], None]) -> list[list[str]]:
        for place, key in enumerate(keys, first):
            hold(key)
            if key == 7:
                self.odd()
            out["keys"][place] = key
        return [[f"note of {key}"] if key % 3 == 0 else [] for key in keys]

    def name(self, index: int) -> str:
        return f"file {index}"


def batches_of(count: int, size: int = 9) -> Iterator[list[int]]:
    """The last one is not full."""
    return (list(range(start, min(start + size, count))) for start in range(0, count, size))


@pytest.mark.parametrize(("processes", "threads"), [(0, 1), (1, 1), (1, 3), (2, 1), (3, 2)])
def test_the_order_is_that_of_the_keys(processes, threads):
    """Whichever place is done first: here the eighth is the last of all."""
    made = MadeAhead(Numbers(odd=lambda: time.sleep(1)), batches_of(30), processes, threads)
    found = []
    for batch in made:
        found += list(zip(batch.tensors["keys"].tolist(), batch.notes, strict=False))
        assert batch.tensors["first"] == batch.tensors["keys"][0]
        batch.free()
    assert found == [(key, [f"note of {key}"] if key % 3 == 0 else []) for key in range(30)]
    for _ in range(5):
        assert next(made, None) is None
    made.close()


def test_a_batch_stands_until_it_is_given_back():
    made = MadeAhead(Numbers(), batches_of(90), 1)
    first = next(made)
    for _ in range(5):
        batch = next(made)
        batch.free()
    time.sleep(0.2)
    assert first.tensors["keys"].tolist() == list(range(9))
    first.free()
    made.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_process_that_dies_names_what_it_read(threads):
    made = MadeAhead(Numbers(odd=lambda: os.kill(os.getpid(), signal.SIGKILL)), batches_of(20), 1, threads)
    with pytest.raises(WorkerDied, match=r"ended by SIGKILL while it read .*file 7\b") as caught:
        list(islice(made, 10))
    assert "\n" not in str(caught.value)


def test_a_mistake_keeps_its_trace_and_what_the_user_did_its_message():
    def mistake() -> None:
        raise KeyError("a mistake of the source")

    def refused() -> None:
        raise ConfigError("this is how to mend it")

    with pytest.raises(RuntimeError, match=r"(?s)in make.*in mistake.*KeyError: 'a mistake of the source'"):
        list(MadeAhead(Numbers(odd=mistake), batches_of(20), 1))
    made = MadeAhead(Numbers(odd=refused), batches_of(20), 1)
    for _ in range(5):
        with pytest.raises(ConfigError, match=r"^this is how to mend it$"):
            list(made)


def test_memory_that_is_not_there_is_told():
    with pytest.raises(WorkerDied, match=r"could not be started.*Cannot allocate memory.*run\.local_batch"):
        MadeAhead(Numbers(size=2**43), batches_of(20), 1)


def test_too_few_open_files_are_told():
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(WorkerDied, match=r"could not be started.*Too many open"):
        MadeAhead(Numbers(), batches_of(20), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_from_the_memory_that_is_shared():
    made = MadeAhead(Numbers(), batches_of(20), 2, pinned=True)
    for batch in made:
        assert all(x.is_pinned() for x in batch.tensors.values())
        batch.free()
    made.close()


def test_memory_does_not_grow():
    """Of neither process, over ten thousand batches."""

    def resident(process: int | str) -> int:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()

    before = children()
    made = MadeAhead(Numbers(), batches_of(180_000), 1, threads=2)
    (child,) = children() - before
    at = []
    for number, batch in enumerate(made):
        batch.free()
        if number % 5000 == 4999:
            at.append((resident("self"), resident(child)))
    made.close()
    first, *_, last = at
    assert len(at) == 4
    assert all(late - early < 2e6 for early, late in zip(first, last, strict=True)), at


def test_workers_that_cannot_be_started_are_told(monkeypatch):
    before, forks, fork = children(), [], os.fork

    def second_fails() -> int:
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(WorkerDied, match=r"could not be started.*Resource temporarily unavailable"):
        MadeAhead(Numbers(), batches_of(20), 2)
    wait_for(lambda: not children() - before)


class Hanging(ShapesSource):
    """Every fourth image lies where reads do not come back: a pipe that nobody writes to, for a network disk."""

    def __init__(self, pipe: Path) -> None:
        super().__init__(22, 40)
        self.pipe = pipe

    def read(self, index: int):
        return super().read(index) if index % 4 else self.pipe.read_bytes()


class Notice(BaseException):
    """What the handler of a signal raises."""


def test_a_signal_ends_a_wait_that_hangs_and_closing_does_not_wait_for_it(tmp_path, monkeypatch, caplog):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(workers, "_LONG", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))

    def handle(*_: object) -> None:
        raise Notice

    def signal_when_told() -> None:
        wait_for(lambda: "no batch for" in caplog.text)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = children()
    batches = start(make_config(num_workers=3), Hanging(tmp_path / "pipe"))
    heard = signal.signal(signal.SIGUSR1, handle)
    threading.Thread(target=signal_when_told).start()
    try:
        with pytest.raises(Notice):
            list(islice(batches, 30))
    finally:
        signal.signal(signal.SIGUSR1, heard)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 20
    assert re.search(r"no batch for 2 seconds while it read .*: reading hangs", caplog.text)
    wait_for(lambda: not children() - before)


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

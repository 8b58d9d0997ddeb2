"""Workers end with the trainer, leave its signals alone, and their death is told."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import pytest

from fastdino.data import WorkerDied
from fastdino.data.workers import affordable
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
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    for _ in range(20):
        next(batches)
    assert children() - before == {worker}
    batches.close()


SCRIPT = """
    import signal, sys, torch
    from fastdino.config import Config, DataConfig, RunConfig, ViewsConfig
    from fastdino.data import ShapesSource, labelled_batches, train_batches
    config = Config(data=DataConfig(num_workers=1), run=RunConfig(local_batch=4))
    source = ShapesSource(100000, 40)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    if sys.argv[1] == "train":
        batches = train_batches(config, source, rank=0, world_size=1, start_step=0, device=torch.device("cpu"))
    else:
        batches = labelled_batches(source, 32, 4, num_workers=1)
    next(batches)
    print(open(f"/proc/self/task/{__import__('os').getpid()}/children").read(), flush=True)
    while True:
        next(batches)
"""


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, "train"), (signal.SIGINT, "labelled"), (signal.SIGKILL, "train")]
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

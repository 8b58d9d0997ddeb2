"""The run folder: one writer, who is named; no leftover and no failed save ends a run."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdino.config import Config, ConfigError, RunConfig
from fastdino.distributed import Ranks
from fastdino.training.run_folder import Lock, RunFolder
from fastdino.training.throughput.ablation import SWITCHES
from tests.children import environment

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
HOLDER = """
import os, sys, time
from pathlib import Path
from fastdino.training.run_folder import Lock
lock = Lock(Path(sys.argv[1]))
print(lock.acquire(), flush=True)
if len(sys.argv) > 2 and os.fork() == 0:  # a worker, which outlives its parent
    time.sleep(60)
print("forked", flush=True)
time.sleep(60)
"""


def folder(path: Path, **settings: Any) -> RunFolder:
    return RunFolder(Config(run=RunConfig(dir=path, **settings)), ALONE)


def hold(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that holds the lock ``path``."""
    command = [sys.executable, "-c", HOLDER, str(path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    assert process.stdout.readline() == "forked\n"
    return process


def test_a_second_writer_is_refused_and_told_who_is_there(tmp_path):
    with folder(tmp_path / "run") as first:
        first.write_config()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host {socket.gethostname()}.*--run.dir"):
            folder(tmp_path / "run").__enter__()
        assert (tmp_path / "run/.lock").exists(), "the one refused leaves the lock alone"
    with folder(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("flock", [True, False])
def test_the_lock_of_a_killed_process_does_not_hold(tmp_path, monkeypatch, flock):
    """kill -9 of the trainer alone: a worker that it forked goes on living."""
    process = hold(tmp_path / ".lock", "fork")
    if not flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    try:
        assert f"process {process.pid}" in (Lock(tmp_path / ".lock").acquire() or "")
        process.kill()
        process.wait()
        lock = Lock(tmp_path / ".lock")
        assert lock.acquire() is None
        lock.release()
        assert not (tmp_path / ".lock").exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_without_flock_a_process_of_another_host_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "gpu003", "pid": 7, "since": "yesterday", "started": "1"}))
    assert Lock(path).acquire() == f"process 7 on host gpu003, since yesterday, (if it is gone, remove {path})"
    path.write_text("")
    assert Lock(path).acquire() is None, "nobody ever wrote a name into it"


def test_a_holder_that_has_just_come_is_named_too(tmp_path):
    """Two processes started at once: the second may look before the first has written its name."""
    path = tmp_path / ".lock"
    with path.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = threading.Timer(0.3, file.write, [b'{"pid": 7, "host": "gpu003", "since": "now"}'])
        writer.start()
        assert Lock(path).acquire() == "process 7 on host gpu003, since now,"
        writer.join()


def test_a_lock_that_was_removed_while_waiting_is_taken_anew(tmp_path, monkeypatch):
    """Its holder left between our opening the file and locking it: what we locked is no longer there."""
    path, original, calls = tmp_path / ".lock", fcntl.flock, []

    def flock(*arguments: Any) -> None:
        if not calls:
            path.unlink()
        calls.append(1)
        original(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(path)
    assert lock.acquire() is None
    assert len(calls) == 2
    assert Lock(path).acquire() is not None


def test_nothing_stays_of_a_run_that_could_not_start(tmp_path):
    with pytest.raises(KeyError), folder(tmp_path / "a/b/run"):
        raise KeyError
    assert not any(tmp_path.iterdir())


def test_hidden_leftovers_are_no_strangers(tmp_path):
    for name in (".DS_Store", ".config.json", ".lock"):
        (tmp_path / name).write_text("x")
    with folder(tmp_path) as run:
        run.write_config()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", "config.json"]


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    with folder(tmp_path / "run") as run:
        run.write_config()
        (run.store.path / ".writing-00000001-abc").mkdir(parents=True)
    with folder(tmp_path / "run"):
        assert not any(run.store.path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_folder_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, number, call):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    run = folder(tmp_path / "run")
    monkeypatch.setattr(Path if call == "mkdir" else os, call, refuse)
    with pytest.raises(ConfigError, match=f"cannot be written: {os.strerror(number)}"):  # noqa: SIM117
        with run:
            run.write_config()
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_steps_that_are_computed_another_way(tmp_path):
    """A compiler that fails, a GPU with less memory, another user's home are no other run."""
    config = Config(run=RunConfig(dir=tmp_path / "run"))
    with RunFolder(config, ALONE) as run:
        run.write_config()
    changed = dataclasses.replace(config, run=dataclasses.replace(config.run, cache=tmp_path / "cache"))
    for switch in SWITCHES:
        if switch.setting != "engine.fp8":  # as engine.precision
            changed = switch.set(changed, on=switch.value(changed) == switch.off)
            assert switch.value(changed) != switch.value(config)
    with RunFolder(changed, ALONE) as run:
        assert run.config_before == config


def test_a_run_in_use_by_another_process(tmp_path, monkeypatch):
    config = Config(run=RunConfig(dir=tmp_path / "run"))
    with RunFolder(config, ALONE) as run:
        run.write_config()
    process = hold(tmp_path / "run/.lock")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
            with pytest.raises(ConfigError, match=f"in use: process {process.pid} on host"):
                RunFolder(config, ALONE).__enter__()
        other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
        with pytest.raises(ConfigError, match="holds another run"):
            RunFolder(other, ALONE).__enter__()
    finally:
        process.kill()
        process.wait()

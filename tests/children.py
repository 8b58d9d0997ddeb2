"""Processes that a test starts: their environment, that of a user who types the command, and what is waited for."""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from bench.record import ROOT, python_path

DROPPED = (
    "TRITON_INTERPRET",
    "PYTEST_",
    "SLURM_",
    "MASTER_",
    "TORCHELASTIC_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "OMPI_",
    "PMI",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imported"])


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without the variables of pytest, of launchers and of Triton's interpreter.

    This tree comes first on PYTHONPATH, and torch computes on one thread.

    Args:
        variables: set in addition.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **variables}


def forked(
    work: Callable[..., object],
    *args: object,
    ranks: int | Sequence[dict[str, str]] = 1,
    timeout: float = 500,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Calls ``work`` in processes of their own, with :func:`environment`.

    They are forks of one that has imported torch, which would take each of them 4 seconds. It is started once for a
    worker of pytest.

    Args:
        work: a function of a module, which each process imports by name.
        ranks: processes; where there are several, a launcher's variables, or those given, tell each its place.
        timeout: seconds, after which all are killed and the test fails.
        variables: of the environment, set in addition.

    Returns:
        The exit code of the first rank that failed, if any did, those of all as ``args``, and all that was written.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        places = ranks if not isinstance(ranks, int) else launched(ranks) if ranks > 1 else [{}]
        processes = [start(files, place | variables, work, *args) for place in places]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process.kill() for process in processes if process.is_alive()]
        stdout, stderr = (file.read_text() for file in files)
    assert not late, f"{len(late)} of {len(places)} have not ended: {stderr[-6000:]}"
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([process.exitcode for process in processes], code, stdout, stderr)


def start(
    files: list[Path], variables: dict[str, str], work: Callable[..., object], *args: object
) -> ForkServerProcess:
    """Begins what :func:`forked` waits for; stdout and stderr are appended to the two files."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    for file in files:
        file.touch()
    process = FORKS.Process(target=_work, args=(files, environment(**variables), work, args))
    process.start()
    return process


def _work(files: list[Path], variables: dict[str, str], work: Callable[..., object], args: tuple[Any, ...]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(variables)
    try:
        work(*args)
    finally:
        atexit._run_exitfuncs()  # what an interpreter does at its end, and a fork of multiprocessing leaves out


def python(how: str, what: str, *words: str) -> None:
    """``python -m MODULE WORDS`` or ``python -c CODE WORDS``, at the root of this tree; for :func:`forked`."""
    os.chdir(ROOT)
    sys.argv = [what if how == "-m" else how, *words]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def launched(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of its ranks, on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(ranks)]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)

"""Processes that a test starts: their environment, that of a user who types the command, and what is waited for."""

import gc
import os
import socket
import sys
import time
from collections.abc import Callable

from bench.record import python_path

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


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without the variables of pytest, of launchers and of Triton's interpreter.

    This tree comes first on PYTHONPATH, and torch computes on one thread.

    Args:
        variables: set in addition.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **variables}


def collect_less() -> None:
    """For programs that start many engines: DeepSpeed collects garbage at each, which is theirs alone from here on."""
    import torch

    from fastdino.distributed import Ranks
    from fastdino.engine.zero import import_deepspeed

    import_deepspeed(Ranks(0, 1, 0, torch.device("cpu")))
    gc.collect()
    gc.freeze()


def two_ranks(work: Callable[[int], None]) -> None:
    """Calls ``work`` with 0 here and with 1 in a fork, both as a launcher would have started them; for programs."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    other = os.fork()
    rank = int(other == 0)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    work(rank)
    if other:
        _, status = os.waitpid(other, 0)
        sys.exit(os.waitstatus_to_exitcode(status))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)

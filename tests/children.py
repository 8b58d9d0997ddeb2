"""The environment of a process that a test starts: that of a user who types the command."""

import os

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

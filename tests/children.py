"""The environment of a process that a test starts: that of a user who types the command."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
DROPPED = ("TRITON_INTERPRET", "PYTEST_", "SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without the variables of pytest, of launchers and of Triton's interpreter; one thread.

    The sources of this tree come first on PYTHONPATH, before what it names already: a machine may keep packages there.

    Args:
        variables: set in addition.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *inherited])
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}

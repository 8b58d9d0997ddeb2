"""Which rank this process is, from what its launcher has put into the environment. Needs no torch."""

import re
from collections.abc import Mapping
from typing import NamedTuple

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun and the deepspeed launcher


class Place(NamedTuple):
    """This process among those of its run."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of its machine."""
    address: str | None
    """Where ranks meet; None for a lone process."""


def place(env: Mapping[str, str]) -> Place:
    """The place that ``env`` describes. Raises RuntimeError for variables that contradict each other."""
    if any(name in env for name in _LAUNCHER[:3]):
        if missing := [name for name in _LAUNCHER if name not in env]:
            raise RuntimeError(
                f"the environment is half set for distributed training: {', '.join(missing)} missing beside "
                f"{', '.join(n for n in _LAUNCHER if n in env)}; start with torchrun, or unset them all for one process"
            )
        address = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        # torchrun's agent already listens on MASTER_PORT, so its workers must join through env://.
        address = "env://" if "TORCHELASTIC_RUN_ID" in env else address
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), address)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if "SLURM_STEP_ID" not in env or "SLURM_JOB_NODELIST" not in env:
            raise RuntimeError(
                f"SLURM gave this job {env['SLURM_NTASKS']} tasks but this process is not one of them: start it with "
                "srun, or unset SLURM_PROCID for one process"
            )
        host = env.get("MASTER_ADDR", first_host(env["SLURM_JOB_NODELIST"]))
        port = env.get("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))  # equal on every rank of the job
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        return Place(int(env["SLURM_PROCID"]), world_size, int(env["SLURM_LOCALID"]), f"tcp://{host}:{port}")
    return Place(0, 1, 0, None)


def launched_rank(env: Mapping[str, str]) -> int:
    """The rank that the launcher gave, before it is known whether its variables fit together."""
    return int(env.get("RANK", env.get("SLURM_PROCID", "0")))


def first_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: ``gpu[003-010,020],login`` gives ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodelist!r} names no host")
    return "".join(part or "" for part in match.groups())

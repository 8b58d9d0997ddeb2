"""Which rank this process is, from what its launcher has put into the environment. Needs no torch."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from fastdino.config import UserError

# What mpirun tells each process: rank, number of ranks, and the same two among the processes of its machine.
_MPI = (
    *(tuple(f"{name}_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
      for name in ("OMPI", "MV2")),  # Open MPI, MVAPICH
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
)  # fmt: skip


class LaunchError(UserError, RuntimeError):
    """The processes of a run cannot come together as they were started; the message says what to change."""


class Place(NamedTuple):
    """This process among those of its run."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of its machine."""
    address: tuple[str, int] | None
    """Host and port where ranks meet; None for a lone process."""
    launched_by: str = ""
    """The variable that named the rank."""
    served: bool = False
    """The launcher listens at ``address``; else rank 0 has to."""


def place(env: Mapping[str, str]) -> Place:
    """The place that ``env`` describes.

    Understands torchrun and whoever sets its variables (the deepspeed launcher, accelerate, Kubeflow), mpirun, and
    SLURM's srun. With none of them the process is alone. Raises LaunchError for variables that cannot work.
    """
    if "RANK" in env:
        found = _torchrun(env)
    elif names := next((names for names in _MPI if all(name in env for name in names[:3])), None):
        found = _mpi(env, *names)  # before SLURM, whose variables within mpirun are those of its daemons
    elif "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        found = _slurm(env)
    elif "LOCAL_RANK" in env or _number(env, "WORLD_SIZE", 1) > 1:
        raise _half_set(env, "RANK")
    else:
        return Place(0, 1, 0, None)
    if found.rank >= found.world_size:
        raise LaunchError(
            f"{found.launched_by}={found.rank}, but there are {found.world_size} ranks, counted from 0: correct the "
            "variables of the launcher"
        )
    return found


def ranks_here(env: Mapping[str, str]) -> int:
    """Ranks on this machine, as far as the launcher says. SLURM's are not counted: it gives each task its cores."""
    names = (
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        *(names[3] for names in _MPI),
    )  # torchrun, the deepspeed launcher, mpirun
    return next((int(env[name]) for name in names if env.get(name, "").isdigit() and int(env[name])), 1)


def launched_rank(env: Mapping[str, str]) -> int:
    """The rank that says what all would say; 0 where :func:`place` will raise."""
    try:
        return place(env).rank
    except LaunchError:
        return 0


def without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without the ``--local_rank N`` that launchers add to every command; LOCAL_RANK says the same."""
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] in ("--local_rank", "--local-rank") and argument.isdigit():
            kept.pop()
        elif not re.fullmatch(r"--local[-_]rank=\d+", argument):
            kept.append(argument)
    return kept


def first_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: ``gpu[003-010,020],login`` gives ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise LaunchError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: set MASTER_ADDR to that of rank 0")
    return "".join(part or "" for part in match.groups())


def _torchrun(env: Mapping[str, str]) -> Place:
    """Kubeflow sets no LOCAL_RANK, since it starts one process per machine."""
    world_size = _number(env, "WORLD_SIZE")
    local_rank = _number(env, "LOCAL_RANK", 0)
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise _half_set(env, name)
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(_number(env, "RANK"), world_size, local_rank, _address(env, world_size, ""), "RANK", served)


def _mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Place:
    world_size = _number(env, size)
    host = "localhost" if _number(env, local_size, 0) == world_size else ""
    if not host and "SLURM_JOB_NODELIST" in env:
        host = first_host(env["SLURM_JOB_NODELIST"])
    address = _address(env, world_size, host)
    return Place(_number(env, rank), world_size, _number(env, local_rank), address, rank)


def _slurm(env: Mapping[str, str]) -> Place:
    if "SLURM_STEP_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        raise LaunchError(
            f"SLURM gave this job {env['SLURM_NTASKS']} tasks but this process is not one of them: start it with "
            "srun, or unset SLURM_PROCID for one process"
        )
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS"))
    address = _address(env, world_size, first_host(env["SLURM_JOB_NODELIST"]))
    return Place(_number(env, "SLURM_PROCID"), world_size, _number(env, "SLURM_LOCALID", 0), address, "SLURM_PROCID")


def _address(env: Mapping[str, str], world_size: int, host: str) -> tuple[str, int] | None:
    """MASTER_ADDR and MASTER_PORT come first. Else ``host``, and a port that each step of each SLURM job has to itself,
    below those that the system gives to outgoing connections."""
    if world_size == 1:
        return None
    host = env.get("MASTER_ADDR") or host
    if not host:
        raise LaunchError(
            "mpirun does not say where ranks meet: pass MASTER_ADDR, the host of rank 0, to all of them "
            "(Open MPI: mpirun -x MASTER_ADDR=host; MPICH and Intel MPI: mpirun -genv MASTER_ADDR host)"
        )
    job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
    port = _number(env, "MASTER_PORT", 20000 + (job + 2503 * step) % 10000 if job else 29500)
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535, the same on every rank")
    return host, port


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        raise _half_set(env, name)
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(f"{name}={text!r} is not a number: the launcher sets it, or unset it for one process")
    return int(text)


def _half_set(env: Mapping[str, str], missing: str) -> LaunchError:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    there = ", ".join(name for name in names if env.get(name))
    return LaunchError(
        f"the environment is half set for distributed training: {missing} is missing beside {there}; start with "
        "torchrun, or unset them all for one process"
    )

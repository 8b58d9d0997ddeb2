"""Which rank this process is, and the few collectives that a trainer needs."""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun and the deepspeed launcher
# Hosts wait as long as one of them works: rank 0 evaluates and writes. One that died shows by its closed connection.
_HOST_TIMEOUT = timedelta(days=1)
_stores: dict[str, tuple[dist.Store, Iterator[int]]] = {}
_destroy: Callable[[], None] = dist.destroy_process_group
_host_group: dist.ProcessGroup | None = None  # gloo beside nccl: decisions on the host that never wait for the GPU


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: rank of world_size, local_rank on its machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes what is written once."""
        return self.rank == 0


def init(device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Joins the process group that the environment describes; with no launcher at all, a group of one.

    Reads torchrun's or the deepspeed launcher's variables, else SLURM's (srun). Plain ``python`` needs no variable and
    takes no port. gloo on a CPU, nccl on a GPU. Raises RuntimeError when the environment cannot work.
    """
    global _host_group
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("engine.device=cuda, but torch sees no GPU: check the driver, or use engine.device=cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    rank, world_size, local_rank, init_method = _place(os.environ)
    here = torch.device("cuda", _gpu(local_rank, os.environ)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend, timeout = ("nccl", None) if on_gpu else ("gloo", _HOST_TIMEOUT)
        store = _store(init_method, rank, world_size)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    if on_gpu and world_size > 1 and _host_group is None:
        _host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
    return Ranks(rank, world_size, local_rank, here)


def _gpu(local_rank: int, env: Mapping[str, str]) -> int:
    """The index of this process's GPU among those it sees."""
    seen = torch.cuda.device_count()
    if local_rank < seen:
        return local_rank
    if seen == 1 and "SLURM_GPUS_PER_TASK" in env:  # srun shows each task its own GPU alone
        return 0
    raise RuntimeError(
        f"local rank {local_rank} has no GPU: this machine shows {seen}; start at most one process per GPU, or use "
        "engine.device=cpu"
    )


def _store(address: str | None, rank: int, world_size: int) -> dist.Store:
    """Where ranks meet: the same server for every run within a process, but never the keys of the run before, which
    would lead to connections that are closed."""
    if address is None:
        return dist.HashStore()
    if address not in _stores:
        _stores[address] = (next(dist.rendezvous(address, rank, world_size))[0], itertools.count())
    store, runs = _stores[address]
    return dist.PrefixStore(f"run {next(runs)}", store)


def _place(env: Mapping[str, str]) -> tuple[int, int, int, str | None]:
    """(rank, world_size, local_rank, rendezvous address or None for a lone process) from the environment."""
    if any(name in env for name in _LAUNCHER[:3]):
        if missing := [name for name in _LAUNCHER if name not in env]:
            raise RuntimeError(
                f"the environment is half set for distributed training: {', '.join(missing)} missing beside "
                f"{', '.join(n for n in _LAUNCHER if n in env)}; start with torchrun, or unset them all for one process"
            )
        address = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        # torchrun's agent already listens on MASTER_PORT, so its workers must join through env://.
        address = "env://" if "TORCHELASTIC_RUN_ID" in env else address
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), address
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if "SLURM_STEP_ID" not in env or "SLURM_JOB_NODELIST" not in env:
            raise RuntimeError(
                f"SLURM gave this job {env['SLURM_NTASKS']} tasks but this process is not one of them: start it with "
                "srun, or unset SLURM_PROCID for one process"
            )
        host = env.get("MASTER_ADDR", first_host(env["SLURM_JOB_NODELIST"]))
        port = env.get("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))  # equal on every rank of the job
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        return int(env["SLURM_PROCID"]), world_size, int(env["SLURM_LOCALID"]), f"tcp://{host}:{port}"
    return 0, 1, 0, None


def first_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: ``gpu[003-010,020],login`` gives ``gpu003``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodelist!r} names no host")
    return "".join(part or "" for part in match.groups())


def shutdown() -> None:
    """Leaves the process group, for a ``finally``: without it ranks abort at exit while others still talk to them.

    Waits for the other ranks, unless an exception is on its way out: then they may never come. To leave nccl would wait
    for them as well, and the launcher would never hear of the exception; so there the process just ends.
    """
    global _destroy, _host_group
    if dist.is_initialized():
        failed = sys.exc_info()[0] is not None
        if not failed:
            barrier()
        if not (failed and dist.get_backend() == "nccl" and dist.get_world_size() > 1):
            _destroy()
    _destroy, _host_group = dist.destroy_process_group, None


def leave_with(destroy: Callable[[], None]) -> None:
    """Makes :func:`shutdown` leave the group through ``destroy``, which forgets more than torch's own does."""
    global _destroy
    _destroy = destroy


def all_reduce_mean_(tensor: Tensor, async_op: bool = False) -> dist.Work | None:
    """Mean of ``tensor`` over ranks, in place; with async_op the work to wait for (None in a group of one)."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return None
    tensor.div_(world_size)  # before the sum, so that the async result needs no epilogue (gloo has no average)
    return dist.all_reduce(tensor, async_op=async_op)


def any_rank(flag: bool) -> bool:
    """True on every rank when ``flag`` is true on any. Waits for the other ranks' hosts, never for a GPU."""
    return ask_ranks(flag)()


def ask_ranks(flag: bool) -> Callable[[], bool]:
    """:func:`any_rank` begun: the hosts talk while this one goes on, and what is returned waits for the answer."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: flag
    told = torch.tensor(int(flag))
    work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=_host_group, async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(told)

    return answer


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank. Waits for the other ranks' hosts, never for a GPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def barrier() -> None:
    """Returns when every rank's host has come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=_host_group)

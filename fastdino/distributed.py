"""The ranks of a run: which of them this process is, and the few collectives that a trainer needs."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.config import UserError
from fastdino.launch import place

# Hosts wait as long as one of them works: rank 0 evaluates and writes. One that died shows by its closed connection.
_HOST_TIMEOUT = timedelta(days=1)


class Ranks:
    """The communicator: where this process stands among the ranks of its run, and what they do together.

    A context manager. Leaving it leaves the process group: without that, ranks abort at exit while others still talk to
    them.

    Attributes:
        rank, world_size: this process and how many there are.
        local_rank: this process among those of its machine.
        device: where it computes.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        host_group: dist.ProcessGroup | None = None,
    ) -> None:
        """``host_group`` (gloo) stands beside a group of nccl: decisions on the host never wait for the GPU."""
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self._host_group = host_group
        self._destroy: Callable[[], None] = dist.destroy_process_group

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes what is written once."""
        return self.rank == 0

    def mean_(self, x: Tensor, async_op: bool = False) -> dist.Work | None:
        """Mean of ``x`` over ranks, in place; with async_op the work to wait for (None in a group of one)."""
        if self.world_size == 1:
            return None
        x.div_(self.world_size)  # before the sum, so that the async result needs no epilogue (gloo has no average)
        return dist.all_reduce(x, async_op=async_op)

    def sum_(self, x: Tensor) -> None:
        """Sum of ``x`` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank. Waits for the other ranks' hosts, never for a GPU."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def barrier(self) -> None:
        """Returns when every rank's host has come here."""
        if self.world_size > 1:
            dist.barrier(group=self._host_group)

    def any(self, flag: bool) -> bool:
        """True on every rank when ``flag`` is true on any. Waits for the other ranks' hosts, never for a GPU."""
        return self.ask(flag)()

    def ask(self, flag: bool) -> Callable[[], bool]:
        """:meth:`any` begun: the hosts talk while this one goes on, and what is returned waits for the answer."""
        if self.world_size == 1:
            return lambda: flag
        told = torch.tensor(int(flag))
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(told)

        return answer

    def on_main(self, work: Callable[[], None]) -> None:
        """``work`` on rank 0, while the others wait; a UserError that it raises ends them all."""
        problem: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                problem = error
        if self.any(problem is not None):
            raise problem or UserError("rank 0 refused the run: its message says why")

    def leave_with(self, destroy: Callable[[], None]) -> None:
        """Leaves the group through ``destroy`` in the end, which forgets more than torch's own does."""
        self._destroy = destroy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the other ranks, unless an exception is on its way out: then they may never come. To leave nccl
        would wait for them as well, and the launcher would never hear of the exception; so there the process just ends.
        """
        if kind is None:
            self.barrier()
        if kind is None or self.world_size == 1 or dist.get_backend() != "nccl":
            self._destroy()


def init(device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Joins the process group that the environment describes; with no launcher at all, a group of one.

    Reads torchrun's or the deepspeed launcher's variables, else SLURM's (srun). Plain ``python`` needs no variable and
    takes no port. gloo on a CPU, nccl on a GPU. Raises RuntimeError when the environment cannot work.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("engine.device=cuda, but torch sees no GPU: check the driver, or use engine.device=cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    rank, world_size, local_rank, address = place(os.environ)
    here = torch.device("cuda", _gpu(local_rank, os.environ)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    backend, timeout = ("nccl", None) if on_gpu else ("gloo", _HOST_TIMEOUT)
    store = _store(address, rank, world_size)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT) if on_gpu and world_size > 1 else None
    return Ranks(rank, world_size, local_rank, here, host_group)


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
    """Where ranks meet: never with the keys of a run before in this process, which lead to closed connections."""
    if address is None:
        return dist.HashStore()
    store, runs = _rendezvous(address, rank, world_size)
    return dist.PrefixStore(f"run {next(runs)}", store)


@functools.cache
def _rendezvous(address: str, rank: int, world_size: int) -> tuple[dist.Store, Iterator[int]]:
    """The store at ``address`` and the numbers of the runs in it. It lives as long as the process, because no rank can
    know when the others are done with it."""
    return next(dist.rendezvous(address, rank, world_size))[0], itertools.count()

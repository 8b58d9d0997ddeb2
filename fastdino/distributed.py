"""The ranks of a run: which of them this process is, and the few collectives that a trainer needs."""

import atexit
import functools
import gc
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions keep the one of their import as default argument
from torch import Tensor

from fastdino.config import ConfigError, UserError
from fastdino.launch import LaunchError, Place, place

# Hosts wait as long as one of them works: rank 0 evaluates and writes. One that died shows by its closed connection;
# of one that hangs, its watchdog tells the others.
_HOST_TIMEOUT = timedelta(days=1)
PATIENCE = timedelta(minutes=30)  # for the other ranks of a run to start: images are pulled, libraries read over NFS

log = logging.getLogger(__name__)

# A thread of gloo takes the interpreter's lock to free the tensors of its last collective, and aborts the process once
# the interpreter ends. A group ends its threads when it is freed, and the cycles of an engine and its hooks hold it.
atexit.register(gc.collect)

T = TypeVar("T")


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
        store: dist.Store | None = None,
    ) -> None:
        """``host_group`` (gloo) stands beside a group of nccl: decisions on the host never wait for the GPU. ``store``
        is where the ranks met."""
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self._host_group, self._store = host_group, store
        self._releases: list[Callable[[], None]] = []
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

    def logsumexp(self, lse: Tensor) -> Tensor:
        """Log-sum-exps over the samples of this rank (-inf for none) -> those over the samples of all ranks.

        One reduction and no maximum: the exponentials are summed in fp64, which holds those of up to +-700.
        """
        if self.world_size == 1:
            return lse
        total = lse.double().exp()
        self.sum_(total)
        return total.log().to(lse.dtype)

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
        return self.ask(flag)()[0]

    def ask(self, *flags: bool) -> Callable[[], list[bool]]:
        """:meth:`any` of each flag, begun: the hosts talk while this one goes on; what is returned waits for them."""
        if self.world_size == 1:
            return lambda: [*flags]
        told = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)

        def answer() -> list[bool]:
            work.wait()
            return [bool(flag) for flag in told.tolist()]

        return answer

    def share(self, numbers: list[float]) -> Callable[[], list[list[float]]]:
        """As many ``numbers`` of each rank, begun: hosts talk while this one goes on, and what is returned waits."""
        if self.world_size == 1:
            return lambda: [numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        told = [torch.empty_like(mine) for _ in range(self.world_size)]
        work = dist.all_gather(told, mine, group=self._host_group, async_op=True)

        def answer() -> list[list[float]]:
            work.wait()
            return [of_rank.tolist() for of_rank in told]

        return answer

    def board(self) -> dist.Store | None:
        """Notes that ranks leave for each other, where none waits; None in a group of one.

        It has a connection of its own: the group's is taken by whichever thread waits in it.
        """
        if self._store is None or self.world_size == 1:
            return None
        return dist.PrefixStore("board", self._store.clone())  # type: ignore[attr-defined]

    def rows(self, x: Tensor) -> Tensor:
        """(n, ...) on the CPU, n of each rank its own -> on rank 0 the rows of all ranks in their order, else none.

        Waits for the other ranks' hosts, never for a GPU.
        """
        if self.world_size == 1:
            return x
        counts = self.gather(len(x))
        padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts] if self.is_main else None
        dist.gather(padded, parts, group=self._host_group)
        return torch.cat([part[:count] for part, count in zip(parts or [], counts, strict=False)] or [x[:0]])

    def everywhere(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on this rank; a UserError that it raises on any of them ends them all."""
        problem: UserError | None = None
        done: T | None = None
        try:
            done = work()
        except UserError as error:
            problem = error
        if self.any(problem is not None):
            refused = self.gather(problem is not None).index(True)
            raise problem or UserError(f"rank {refused} refused the run: its message says why")
        return cast(T, done)

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` on rank 0 returns, on every rank; a UserError that it raises ends them all."""
        return cast(T, self.gather(self.everywhere(lambda: work() if self.is_main else None))[0])

    def leave_with(self, release: Callable[[], None], destroy: Callable[[], None]) -> None:
        """On leaving, ``release`` lets go of the group, then ``destroy`` ends it and forgets more than torch's own."""
        self._releases.append(release)
        self._destroy = destroy

    def release(self) -> None:
        """Lets go of what the engines so far hold; none of them is used any more."""
        while self._releases:
            self._releases.pop()()

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
            self.release()
            self._destroy()


def init(device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Joins the process group that the environment describes; with no launcher at all, a group of one.

    Which launchers it knows says :func:`fastdino.launch.place`. Plain ``python`` needs no variable and takes no port.
    gloo on a CPU, nccl on a GPU. Raises ConfigError when there is no such device, LaunchError when the ranks cannot
    come together.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but torch sees no GPU: check the driver, or use engine.device=cpu")
    if dist.is_initialized():
        raise LaunchError(
            "this process is in a torch.distributed group already: leave it with "
            "torch.distributed.destroy_process_group() before training"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    here = place(os.environ)
    where = torch.device("cuda", _gpu(here.local_rank, os.environ)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    store = _store(here)
    try:
        backend, timeout = ("nccl", None) if on_gpu else ("gloo", _HOST_TIMEOUT)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=here.rank, world_size=here.world_size)
        host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT) if on_gpu and here.world_size > 1 else None
    except RuntimeError as error:
        raise LaunchError(
            f"the ranks found each other but cannot connect ({str(error).splitlines()[0]}): let GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name a network interface that leads to all of their machines"
        ) from error
    return Ranks(here.rank, here.world_size, here.local_rank, where, host_group, store)


def _gpu(local_rank: int, env: Mapping[str, str]) -> int:
    """The index of this process's GPU among those it sees."""
    seen = torch.cuda.device_count()
    if local_rank < seen:
        return local_rank
    if seen == 1 and "SLURM_GPUS_PER_TASK" in env:  # srun shows each task its own GPU alone
        return 0
    raise LaunchError(
        f"local rank {local_rank} has no GPU: this machine shows {seen}; start at most one process per GPU, or use "
        "engine.device=cpu"
    )


def _store(here: Place) -> dist.Store:
    """Where ranks meet: never with the keys of a run before in this process, which lead to closed connections."""
    if here.address is None:
        return dist.HashStore()
    store, runs = _rendezvous(here)
    return dist.PrefixStore(f"run {next(runs)}", store)


@functools.cache
def _rendezvous(here: Place) -> tuple[dist.Store, Iterator[int]]:
    """The store at ``here.address``, once all ranks have come to it, and the numbers of the runs in it. It lives as
    long as the process, because no rank can know when the others are done with it.

    torch's own would wait in one call, where Ctrl-C does not reach it.
    """
    assert here.address is not None
    host, port = here.address
    log.info(
        "waiting for %d ranks at %s:%d; to train with this process alone, unset %s",
        here.world_size, host, port, here.launched_by,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE.total_seconds()
    store: dist.Store = _connect(here, host, port, deadline)
    # An agent of torchrun keeps its store when it starts its processes again.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(f"rank {here.rank}", "")
    everyone = [f"rank {rank}" for rank in range(here.world_size)]
    while not store.check(everyone):
        if time.monotonic() > deadline:
            missing = [name for name in everyone if not store.check([name])]
            raise LaunchError(
                f"{len(missing)} of {here.world_size} ranks have not come to {host}:{port} in {PATIENCE} h, the first "
                f"of them {missing[0]}: see what it says, or start as many processes as {here.launched_by} was told of"
            )
        time.sleep(0.1)
    store.set_timeout(_HOST_TIMEOUT)
    return store, itertools.count()


def _connect(here: Place, host: str, port: int, deadline: float) -> dist.TCPStore:
    serves = here.rank == 0 and not here.served
    while True:
        try:
            return dist.TCPStore(host, port, is_master=serves, timeout=timedelta(seconds=5), wait_for_workers=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if "EADDRINUSE" in reason:
                raise LaunchError(
                    f"port {port}, where the ranks of this run would meet, is in use on this machine: set MASTER_PORT "
                    "to a free one, the same for every rank"
                ) from error
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"no rank 0 at {host}:{port} in {PATIENCE} h ({reason}): see what it says, and whether MASTER_ADDR "
                    "and MASTER_PORT are its machine's"
                ) from error
            time.sleep(0.5)

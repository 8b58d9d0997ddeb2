"""Exact counts of what a piece of work asks of the device: the same on every machine, with or without a GPU."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from fastdino_kernels import _backend

# Their result is a number, or a tensor whose size depends on values: on a GPU the host waits for it.
SYNCS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "is_pinned",
}  # fmt: skip
READS = {"tolist", "numpy", "__array__", "cpu"}  # methods that on a CPU call no operation, and on a GPU wait for it
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class OpCounts(TorchDispatchMode):
    """Host syncs, collectives, aten calls and the bytes that they move, while active.

    Views and bare allocations are no calls, and of our own operators the calls inside count. Bytes: every distinct
    tensor that a call reads, once, and every one that it writes, once; broadcast dimensions count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdino":
            return _inside(self, name, args, kwargs)
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in SYNCS or (name in ("index", "index_put", "index_put_") and _has_mask(args)):
            self.syncs[name] += 1
        if namespace == "c10d":
            self.collectives[name] += 1
        elif not func.is_view and name not in ALLOCATIONS:
            self.calls[f"{namespace}::{name}"] += 1
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            written = made or _mutated(func, args, kwargs or {})
            self.bytes += _distinct_bytes(tensors) + _distinct_bytes(written)
        return result


class HostReads(TorchFunctionMode):
    """Adds to ``syncs`` what an OpCounts cannot see on a CPU; ``.to("cpu")`` is not told from a move to the device."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in READS:
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))


def _inside(mode: TorchDispatchMode, operator: str, args: Any, kwargs: Any) -> Any:
    """Calls what is behind one of our operators under ``mode`` again, so that it sees the calls that it makes."""
    with mode:
        return _backend.LAUNCHERS[operator](*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation that returns nothing, such as torch._foreach_lerp_, writes."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in tree_leaves(given.get(name)) if isinstance(x, Tensor)]


def _distinct_bytes(tensors: list[Tensor]) -> int:
    return sum({(x.data_ptr(), x.shape, x.stride()): _dense_bytes(x) for x in tensors}.values())


def _dense_bytes(x: Tensor) -> int:
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made while active and that are still alive, and their peak.

    On a CPU it stands for torch.cuda.max_memory_allocated: both miss what an operation allocates and frees inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdino":
            return _inside(self, name, args, kwargs)
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in before | self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


class KeptBytes:
    """A context for work that may leave tensors behind: ``bytes`` are those still there, of all times it was entered.

    ``watch=False`` counts nothing: on a CPU the counters are modes, under which torch.compile does not work.
    """

    def __init__(self, device: torch.device, watch: bool = True) -> None:
        self.device, self.watch, self.bytes = device, watch, 0
        self._live, self._before = LiveBytes(), 0

    def __enter__(self) -> None:
        if self.watch and self.device.type != "cuda":
            self._live.__enter__()
        self._before = self._allocated()

    def __exit__(self, *error: Any) -> None:
        if self.watch and self.device.type != "cuda":
            self._live.__exit__(*error)
        self.bytes += self._allocated() - self._before

    def _allocated(self) -> int:
        gc.collect()
        if self.device.type != "cuda":
            return self._live.live
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``work`` has allocated at a time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.peak


def launches(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that ``work`` launches on a GPU; on a CPU the aten calls, which stand for them."""
    if device.type != "cuda":
        with OpCounts() as counts:
            work()
        return counts.calls.total()
    torch.cuda.synchronize()  # what is queued already, such as the making of inputs, is not work's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        work()
        torch.cuda.synchronize()
    skip = ("Memcpy", "Memset")
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(skip) for e in on_device)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Within it, the call that it gives returns the bytes of distinct storages saved for backward so far.

    Parameters and their views do not count: they are there anyway.
    """
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        base = x._base if x._is_view() and x._base is not None else x
        if not isinstance(base, torch.nn.Parameter):
            kept.append(x.detach())
            found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(found.values())


@contextmanager
def kernels_counted() -> Iterator[Counter[str]]:
    """CPU tensors take the path of a GPU: a Triton launch is counted by the kernel's name, and nothing runs.

    The outputs of kernels are then arbitrary, which changes no count as long as nothing on the host depends on them.
    """
    counted: Counter[str] = Counter()

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: counted.update([self.fn.__name__])

    with mock.patch.object(KernelInterface, "__getitem__", launcher), mock.patch.object(_backend, "INTERPRETED", True):
        yield counted

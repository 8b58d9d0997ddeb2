"""What compute-sanitizer would say of a kernel, on a CPU: every access of Triton's interpreter, checked.

The interpreter runs one program after the other and reads whatever address it is given: a race gives the right result
there, and so do most accesses out of bounds.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64), 0, 0)  # an access of no element
BY_TABLE = ("_ema_list_kernel",)  # given addresses in memory, whose bounds are not known here


class MemoryFault(AssertionError):
    """A kernel touches memory that is not its own, or that something else of the launch touches at the same time."""


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Raises MemoryFault for a launch whose result may differ on a GPU, where no order of programs is promised:

    - a program loads or stores what is no element of the tensors that the kernel was given;
    - a program loads what another stores, or two store the same element;
    - a program loads what it has stored itself, or stores it again: its threads do not wait for each other's stores;
    - a program stores what it has loaded in another lane of a block: another thread may not have loaded it yet.

    Knows no atomic operations; the kernels have none.
    """
    launch = _Launch()
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        launch.begin(executor.fn.__name__, [*args, *kwargs.values()])
        run(executor, *args, **kwargs)
        launch.end()

    def load(pointers: Any, mask: Any, *args: Any) -> Any:
        launch.record("loads", pointers, mask)
        return masked_load(pointers, mask, *args)

    def store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        launch.record("stores", pointers, mask)
        return masked_store(pointers, value, mask, *args)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield


class _Launch:
    """The accesses of one launch: for each load and store of a program the addresses, lanes, program and time."""

    def begin(self, kernel: str, args: list[Any]) -> None:
        self.kernel = kernel
        self.tensors = [x for arg in args for x in (arg if isinstance(arg, tuple) else [arg]) if torch.is_tensor(x)]
        self.accesses: dict[str, list[tuple[np.ndarray, np.ndarray, int, int]]] = {"loads": [], "stores": []}

    def record(self, verb: str, pointers: Any, mask: Any) -> None:
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        program, time = (x * ny + y) * nz + z, sum(map(len, self.accesses.values()))
        lanes = np.flatnonzero(mask.data)
        addresses = pointers.data.ravel()[lanes].astype(np.int64)
        inside = np.full(addresses.shape, self.kernel in BY_TABLE)
        for tensor in self.tensors:
            inside |= _elements_of(tensor, addresses)
        if not inside.all():
            self.fail(f"program {program} {verb} outside of its tensors", addresses[~inside][0])
        self.accesses[verb].append((addresses, lanes, program, time))

    def end(self) -> None:
        stored, lane, writer, stored_at = self.flat("stores")
        for i in np.flatnonzero(stored[1:] == stored[:-1])[:1]:
            self.fail(f"programs {writer[i]} and {writer[i + 1]} store the same element", stored[i])
        loaded, *load = self.flat("loads")
        at = np.searchsorted(stored, loaded)
        found = np.flatnonzero(np.append(stored, -1)[at] == loaded)
        loaded, at, (load_lane, reader, loaded_at) = loaded[found], at[found], (column[found] for column in load)
        for i in np.flatnonzero((reader != writer[at]) | (loaded_at > stored_at[at]) | (load_lane != lane[at]))[:1]:
            self.fail(f"program {reader[i]} loads what program {writer[at[i]]} stores", loaded[i])

    def flat(self, verb: str) -> tuple[np.ndarray, ...]:
        """All addresses in order, and for each its lane, program and time."""
        addresses, lanes, program, time = zip(_NOTHING, *self.accesses[verb], strict=True)
        sizes = list(map(len, addresses))
        flat = np.concatenate(addresses)
        order = np.argsort(flat, kind="stable")
        columns = flat, np.concatenate(lanes), np.repeat(program, sizes), np.repeat(time, sizes)
        return tuple(column[order] for column in columns)

    def fail(self, what: str, address: int) -> None:
        near = [f"{(address - x.data_ptr()) // x.itemsize} of {tuple(x.shape)} {x.dtype}" for x in self.tensors]
        raise MemoryFault(f"{self.kernel}: {what}; element {', or '.join(near)}")


def _elements_of(tensor: torch.Tensor, addresses: np.ndarray) -> np.ndarray:
    """Which of the addresses are elements of the tensor; what lies between its rows is not."""
    if not tensor.numel():
        return np.zeros(addresses.shape, bool)
    offset, rest = np.divmod(addresses - tensor.data_ptr(), tensor.itemsize)
    dimensions = list(zip(tensor.shape, tensor.stride(), strict=True))
    last = sum((n - 1) * stride for n, stride in dimensions)
    inside = (offset >= 0) & (offset <= last) & (rest == 0)
    if tensor.numel() <= last:
        elements = np.zeros(1, np.int64)
        for n, stride in dimensions:
            elements = np.add.outer(elements, stride * np.arange(n)).ravel()
        inside &= np.isin(offset, elements)
    return inside

"""What a checkpoint holds, copied to host memory, so that training goes on while it is written."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from fastdino.engine.shards import Fragment

Copy = Callable[[Tensor], Tensor]
Source = Callable[[Copy], Iterable[Fragment]]
"""Gives the fragments that a rank has to write, as views of what it is given for each flat tensor."""


class Snapshot:
    """Copies in host memory, pinned where a GPU copies into it. The buffers are made once.

    On a GPU the copies are made beside the next step. Its update has to wait for them, see :meth:`hold`; the host does
    not. The tensors that all ranks share change in forward passes too: they are copied on the device first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._buffers = device, list[Tensor]()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = self._held = None if self._stream is None else torch.cuda.Event(blocking=True)
        self._fixed: dict[str, Tensor] = {}  # until the next snapshot, when the side stream is done with them

    @torch.no_grad()
    def take(self, fragments: Source, shared: Mapping[str, Tensor]) -> tuple[list[Fragment], dict[str, Tensor]]:
        """Begins the copies: (fragments, shared tensors) in host memory, whose values are there after :meth:`wait`.

        They are those of the next call too, so that what a call gave is used before.
        """
        made = iter([*self._buffers])

        def copy(tensor: Tensor) -> Tensor:
            buffer = next(made, None)
            if buffer is None:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
                self._buffers.append(buffer)
            return buffer.copy_(tensor, non_blocking=True)

        if self._stream is not None:
            shared = self._fixed = {name: tensor.clone() for name, tensor in shared.items()}
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            taken = [*fragments(copy)], {name: copy(tensor) for name, tensor in shared.items()}
        if self._stream is not None:
            assert self._copied is not None
            self._copied.record(self._stream)
            self._held = self._copied
        return taken

    def hold(self) -> None:
        """What the device does next on the current stream comes after the copies; called before shards are written."""
        if self._held is not None:
            torch.cuda.current_stream(self._device).wait_event(self._held)
            self._held = None

    def wait(self) -> None:
        """Returns when the values are there; for a thread that reads them."""
        if self._copied is not None:
            torch.cuda.set_device(self._device)
            self._copied.synchronize()

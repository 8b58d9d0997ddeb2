"""What a step of training gets from the data: the views of its images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Patches of the global views that are hidden from the student, whose guesses the loss compares with the teacher's.

    The teacher's input is ``masks._replace(hidden=None)``: it sees every patch and is read at the same ones.
    """

    hidden: Tensor | None
    """bool (2B, N): True where a patch is hidden, view 0 of all images first; None: nothing is hidden."""
    rows: Tensor
    """int64 (M,): the hidden patches, ascending, as indices into the 2B * N patches. M is the same at every step."""
    weight: Tensor
    """fp32 (M,): weight of each row in the loss, 1 / (2B * hidden patches of the row's view)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Masks":
        """The same with every tensor changed."""
        hidden = None if self.hidden is None else change(self.hidden)
        return Masks(hidden, change(self.rows), change(self.weight))


@dataclass
class Batch:
    """The views of ``local_batch`` images."""

    views: dict[str, Tensor]
    """uint8, by size: "global" (2, B, C, G, G) and, unless views.num_local is 0, "local" (L, B, C, l, l). Or, as the
    device makes them for a step in bf16, network input in patches: (2, B, N, C p^2), (L, B, N', C p^2)."""
    masks: Masks | None = None
    """None: every patch is seen."""
    bad: list[str] = field(default_factory=list)
    """Name and reason of each image that could not be read; others stand in for them."""

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``; from page-locked memory the copy does not wait."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from being used again before ``stream`` is through with it; see Tensor.record_stream."""
        for tensor in self.tensors():
            tensor.record_stream(stream)

    def tensors(self) -> list[Tensor]:
        """Views and masks, in one order."""
        return [x for x in (*self.views.values(), *(self.masks or ())) if x is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor changed."""
        views = {name: change(group) for name, group in self.views.items()}
        return Batch(views, self.masks and self.masks.each(change), self.bad)

"""What a step of training gets from the data: the views of its images."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Masks(NamedTuple):
    """Patches of the global views that are hidden from the student."""

    hidden: Tensor
    """bool (2B, N): True where a patch is hidden."""
    rows: Tensor
    """int64 (M,): the hidden patches, as indices into the 2B * N of ``hidden``. M is the same at every step."""
    weight: Tensor
    """fp32 (M,): weight of each row in the loss."""


@dataclass
class Batch:
    """The views of ``local_batch`` images, as bytes."""

    views: dict[str, Tensor]
    """uint8, by size: "global" (2, B, 3, G, G) and, unless views.num_local is 0, "local" (L, B, 3, l, l)."""
    masks: Masks | None = None
    """None: every patch is seen."""
    bad: list[str] = field(default_factory=list)
    """Name and reason of each image that could not be read; others stand in for them."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes. DataLoader calls this."""
        views = {name: group.pin_memory() for name, group in self.views.items()}
        return Batch(views, self.masks and Masks(*(x.pin_memory() for x in self.masks)), self.bad)

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``; from page-locked memory the copy does not wait."""
        views = {name: group.to(device, non_blocking=True) for name, group in self.views.items()}
        masks = self.masks and Masks(*(x.to(device, non_blocking=True) for x in self.masks))
        return Batch(views, masks, self.bad)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory from being used again before ``stream`` is through with it; see Tensor.record_stream."""
        for tensor in (*self.views.values(), *(self.masks or ())):
            tensor.record_stream(stream)

"""What a step of training gets from the data: the views of its images."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """The views of ``local_batch`` images, as bytes."""

    global_views: Tensor
    """uint8 (2, B, 3, G, G)"""
    local_views: Tensor
    """uint8 (L, B, 3, l, l); L may be 0"""
    bad: list[str] = field(default_factory=list)
    """Names of images that could not be read; others stand in for them."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes. DataLoader calls this."""
        return Batch(self.global_views.pin_memory(), self.local_views.pin_memory(), self.bad)

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``; from page-locked memory the copy does not wait."""
        global_views, local_views = (x.to(device, non_blocking=True) for x in (self.global_views, self.local_views))
        return Batch(global_views, local_views, self.bad)

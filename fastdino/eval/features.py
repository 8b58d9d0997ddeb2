"""Images become features: one pass of a backbone over a labelled source."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdino.config import UserError
from fastdino.data.loader import labelled_batches
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize


class EvaluationError(UserError, ValueError):
    """Images, labels or a backbone that an evaluation cannot work with."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images are read for an evaluation."""

    size: int = 224
    """Side in pixels that the backbone sees."""
    batch_size: int = 256
    num_workers: int = 10
    normalize: Literal["imagenet", "image"] = "imagenet"
    """As in training: data.normalize."""
    bf16: bool = False
    """Compute in bf16 under autocast."""


def extract(backbone: nn.Module, source: Source, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Features and labels of every image of ``source``, in order.

    Args:
        backbone: maps (B, 3, s, s) normalised images to (B, D). It runs where its parameters are, in evaluation mode
            (restored afterwards), without gradients.
        source: labelled images; each is resized and cropped to protocol.size.

    Returns (n, D) fp32 features, not normalised, and (n,) int64 labels, both on the backbone's device. Raises
    EvaluationError when no image can be read; single unreadable ones are left out.
    """
    device, dtype = home(backbone)
    batches = labelled_batches(source, protocol.size, protocol.batch_size, protocol.num_workers)
    features, labels = [], []
    with evaluating(backbone), torch.autocast(device.type, torch.bfloat16, enabled=protocol.bf16):
        for images, batch_labels in tqdm(batches, desc="features", unit="batch", leave=False, disable=None):
            x = normalize(images.to(device, non_blocking=True), protocol.normalize)
            features.append(backbone(x.to(dtype)).float())
            labels.append(batch_labels.to(device))
    if not features:
        raise EvaluationError("none of the images could be read: there is nothing to evaluate")
    return torch.cat(features), torch.cat(labels)


def home(backbone: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a backbone runs and in what; the CPU in fp32 for one without parameters, such as raw pixels."""
    parameter = next(backbone.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module is put back into the mode it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

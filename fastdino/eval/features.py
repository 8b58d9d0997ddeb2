"""Images become features: one pass of a backbone over a labelled source."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdino.config import UserError
from fastdino.data.loader import labelled_batches
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.model.vit import ViT

Images = tuple[Tensor, Tensor]
"""Of a batch: uint8 (B, C, s, s) and labels, int64 (B,)."""


class EvaluationError(UserError, ValueError):
    """Images, labels or a backbone that an evaluation cannot work with."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a backbone reads images. Its features depend on this, on its weights and on the images alone."""

    size: int = 224
    """Side in pixels that the backbone sees."""
    crop: float = 0.875
    """Share of the shorter side that it sees, in the middle."""
    normalize: Literal["imagenet", "image"] = "imagenet"
    """As in training: data.normalize."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: under autocast."""
    channels: int = 3
    """C, as in training: data.channels."""


class Features(NamedTuple):
    """What an evaluation reads: one row per image, in the order of the source."""

    vectors: Tensor  # (n, D) fp32, not normalised
    labels: Tensor  # (n,) int64


def extract(
    backbone: nn.Module, source: Source, reading: Reading, *, batch: int = 64, num_workers: int = 8
) -> Features:
    """Features and labels of every image of ``source``, on the backbone's device.

    Args:
        backbone: maps (B, C, s, s) normalised images to (B, D). It runs where its parameters are, in evaluation mode
            (restored afterwards), without gradients.
        source: labelled images; each is resized and cropped to reading.size.
        batch: images per forward pass.
        num_workers: processes that decode, at most as many as there are cores.

    Raises EvaluationError when the backbone cannot take that size or no image can be read; single unreadable images
    are left out.
    """
    check_size(backbone, reading.size, reading.channels)
    features = extract_part(backbone, source, reading, batch, num_workers)
    check_any(features)
    return features


def extract_part(
    backbone: nn.Module,
    source: Source,
    reading: Reading,
    batch: int,
    num_workers: int,
    *,
    part: tuple[int, int] = (0, 1),
    take: Callable[[Callable[[], Images]], Images] = lambda read: read(),
) -> Features:
    """:func:`extract` for one of several equal parts of the source, which may be of no image.

    The backbone is called as often for each part, whatever can be read of it, because ranks that hold parts of the
    backbone's weights have to call it together. Where there are no images left, it sees a black one.

    Args:
        part: r of n; the parts one after the other are the source.
        take: calls what it is given, which reads a batch, and returns that.
    """
    device, dtype = device_and_dtype(backbone)
    rank, num_parts = part
    mine = range(len(source) * rank // num_parts, len(source) * (rank + 1) // num_parts)
    num_calls = max(1, math.ceil(math.ceil(len(source) / num_parts) / batch))
    batches = labelled_batches(source, reading.size, batch, num_workers, reading.crop, reading.channels, mine)
    black = torch.zeros(1, reading.channels, reading.size, reading.size, dtype=torch.uint8)
    nothing = black[:0], torch.zeros(0, dtype=torch.int64)
    vectors, labels = [], []
    calls = tqdm(range(num_calls), desc="features", unit="batch", leave=False, disable=rank > 0 or None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16")
    with closing(batches), evaluating(backbone), autocast:
        for _ in calls:
            images, batch_labels = take(lambda: next(batches, nothing))
            x = normalize((images if len(images) else black).to(device, non_blocking=True), reading.normalize)
            vectors.append(backbone(x.to(dtype))[: len(images)].float())
            labels.append(batch_labels.to(device))
    return Features(torch.cat(vectors), torch.cat(labels))


def check_any(features: Features) -> None:
    """Raises EvaluationError where there are none."""
    if not len(features.labels):
        raise EvaluationError("none of the images could be read: there is nothing to evaluate")


def check_size(backbone: nn.Module, size: int, channels: int = 3) -> None:
    """Raises EvaluationError for a size that the backbone cannot take: a forward pass of one black image tells."""
    device, dtype = device_and_dtype(backbone)
    try:
        with evaluating(backbone):
            backbone(torch.zeros(1, channels, size, size, device=device, dtype=dtype))
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise EvaluationError(f"the backbone cannot take images of {size} px: {error}") from error


def our_vit(backbone: nn.Module, what: str) -> ViT:
    """The backbone, where it is one of our ViTs. Raises EvaluationError for another, which has no ``what``."""
    if not isinstance(backbone, ViT):
        kind = getattr(backbone, "arch", type(backbone).__name__)
        raise EvaluationError(f"{what} need one of our ViTs (model.arch=vit_...), not {kind}")
    return backbone


def device_and_dtype(backbone: nn.Module) -> tuple[torch.device, torch.dtype]:
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

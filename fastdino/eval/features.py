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

Images = tuple[Tensor, Tensor, Tensor]
"""Of a batch: uint8 (B, C, s, s), labels int64 (B,), and their places in the source, int64 (B,)."""
Tokens = Literal["cls", "mean", "cls+mean", "last4", "last4+mean", "gem", "cls+gem"]
GEM_POWER = 3.0  # of the generalised mean of patches, as it is in retrieval


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
    tokens: Tokens = "cls"
    """What is a feature, after the final norm: what the backbone gives, its CLS token; the mean of the patches; both;
    CLS tokens of the last four blocks, the last one last; these and the mean; the generalised mean of the patches; the
    CLS token and that."""


class Features(NamedTuple):
    """What an evaluation reads: one row per image that can be read, in the order of the source."""

    vectors: Tensor  # (n, D) fp32, not normalised
    labels: Tensor  # (n,) int64
    places: Tensor  # (n,) int64, where in the source


class Part(NamedTuple):
    """One of several equal parts of a source, which one after the other are the source."""

    rank: int = 0
    of: int = 1
    done: int = 0
    """Images at its beginning that are left out."""

    def images(self, total: int) -> range:
        """Which of ``total`` images it holds; there may be none."""
        return range(total * self.rank // self.of + self.done, total * (self.rank + 1) // self.of)


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
    check_size(backbone, reading)
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
    part: Part = Part(),  # noqa: B008
    take: Callable[[Callable[[], Images]], Images] = lambda read: read(),
) -> Features:
    """:func:`extract` for one of several equal parts of the source, which may be of no image.

    The backbone is called as often for each part, whatever can be read of it, because ranks that hold parts of the
    backbone's weights have to call it together. Where there are no images left, it sees a black one.

    Args:
        take: calls what it is given, which reads a batch, and returns that.
    """
    batches = feature_batches(backbone, source, reading, batch, num_workers, part=part, take=take)
    return Features(*map(torch.cat, zip(*batches, strict=True)))


def feature_batches(
    backbone: nn.Module,
    source: Source,
    reading: Reading,
    batch: int,
    num_workers: int,
    *,
    part: Part,
    take: Callable[[Callable[[], Images]], Images] = lambda read: read(),
) -> Iterator[Features]:
    """:func:`extract_part` as it goes, on the backbone's device."""
    device, dtype = device_and_dtype(backbone)
    mine, see = part.images(len(source)), reader(backbone, reading.tokens)
    num_calls = max(1, math.ceil((math.ceil(len(source) / part.of) - part.done) / batch))
    batches = labelled_batches(source, reading.size, batch, num_workers, reading.crop, reading.channels, mine)
    black = torch.zeros(1, reading.channels, reading.size, reading.size, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    calls = tqdm(range(num_calls), desc="features", unit="batch", leave=False, disable=part.rank > 0 or None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16")
    with closing(batches):
        for _ in calls:
            images, labels, places = take(lambda: next(batches, (black[:0], none, none)))
            with evaluating(backbone), autocast:
                x = normalize((images if len(images) else black).to(device, non_blocking=True), reading.normalize)
                vectors = see(x.to(dtype))[: len(images)].float()
            yield Features(vectors, labels.to(device), places.to(device))


def reader(backbone: nn.Module, tokens: Tokens) -> Callable[[Tensor], Tensor]:
    """(B, C, s, s) normalised images -> (B, D'), the ``tokens`` of Reading one beside the other.

    Raises EvaluationError where a backbone of another kind is asked for more than it gives.
    """
    if tokens == "cls" or not has_weights(backbone):
        return backbone
    vit, first = our_vit(backbone, f"tokens {tokens!r}"), tokens.split("+")[0]

    def see(images: Tensor) -> Tensor:
        layers = vit.intermediate_layers(images, 4 if first == "last4" else 1)
        parts, patches = [] if first in ("mean", "gem") else [cls for cls, _ in layers], layers[-1][1]
        if "mean" in tokens:
            parts.append(patches.mean(1))
        if "gem" in tokens:
            parts.append(gem(patches.float(), GEM_POWER).to(patches.dtype))
        return torch.cat(parts, dim=1)

    return see


def gem(tokens: Tensor, power: float) -> Tensor:
    """(B, N, D) -> (B, D), the generalised mean (mean of x^p)^(1/p) of tokens x that are clamped at 1e-6.

    Source: Radenovic et al. 2018, where p is 3; DINO's copy detection has 4.
    """
    return tokens.clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)


def check_any(features: Features) -> None:
    """Raises EvaluationError where there are none."""
    if not len(features.labels):
        raise EvaluationError("none of the images could be read: there is nothing to evaluate")


def check_size(backbone: nn.Module, reading: Reading) -> int:
    """D', the width of the features, by a forward pass of one black image.

    Raises EvaluationError for a size that the backbone cannot take.
    """
    device, dtype = device_and_dtype(backbone)
    try:
        with evaluating(backbone):
            black = torch.zeros(1, reading.channels, reading.size, reading.size, device=device, dtype=dtype)
            return reader(backbone, reading.tokens)(black).shape[1]
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise EvaluationError(f"the backbone cannot take images of {reading.size} px: {error}") from error


def our_vit(backbone: nn.Module, what: str) -> ViT:
    """The backbone, where it is one of our ViTs. Raises EvaluationError for another, which has no ``what``."""
    if not isinstance(backbone, ViT):
        kind = getattr(backbone, "arch", type(backbone).__name__)
        raise EvaluationError(f"{what}: this needs one of our ViTs (model.arch=vit_...), not {kind}")
    return backbone


def device_and_dtype(backbone: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a backbone runs and in what; the CPU in fp32 for one without parameters, such as raw pixels."""
    parameter = next(backbone.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


def has_weights(backbone: nn.Module) -> bool:
    """False for pixels, which are what they are."""
    return any(True for _ in backbone.parameters())


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

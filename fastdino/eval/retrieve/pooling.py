"""Whole images, of any shape, become descriptors: a vector each."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdino.config import UserError
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.data.views.evaluation import squeezed_view, thumbnail_view
from fastdino.data.workers import affordable
from fastdino.eval.features import EvaluationError, Part, device_and_dtype, evaluating, gem, has_weights, our_vit

log = logging.getLogger(__name__)

Tokens = Literal["cls", "gem", "cls+gem"]
MULTI_SCALE = (1.0, 2**-0.5, 0.5)  # of DINO v1's utils.multi_scale
WHOLE = Part()
WINDOW = 4  # batches that are read at once, and grouped by shape


@dataclass(frozen=True, kw_only=True)
class Look:
    """How an image is shown to a backbone, and what becomes its descriptor."""

    side: int
    """Pixels of the longer side at most, the other in proportion."""
    squeezed: bool = False
    """Both sides are that, whatever the image's proportions."""
    scales: Sequence[float] = (1.0,)
    """The image at each of these sizes; the descriptors are averaged."""
    tokens: Tokens = "cls"
    """After the final norm: the CLS token, the generalised mean of the patches, or both one after the other."""
    power: float = 3.0
    """Of the generalised mean."""
    normalize: Literal["imagenet", "image"] = "imagenet"
    precision: Literal["fp32", "bf16"] = "fp32"


class Described(NamedTuple):
    """Descriptors of the images that could be read, in their order."""

    vectors: Tensor  # (n, D) fp32, not normalised
    places: Tensor  # (n,) int64, where in the source


def describe(
    backbone: nn.Module, source: Source, look: Look, batch: int = 64, num_workers: int = 8, part: Part = WHOLE
) -> Described:
    """Descriptors of all images of ``source``, or of a part of it, on the backbone's device.

    Images of one shape are seen together. What fills no patch at the right and at the bottom is cropped away, as the
    convolution of DINO v1's ViT does. Pixels alone, which have no parameters, are those of squeezed images.

    Args:
        backbone: maps (B, C, h, w) normalised images to (B, D).
        source: the images.
        look: how they are shown, and what is kept.
        batch: images per forward pass.
        num_workers: threads that decode.
        part: which images.

    Raises EvaluationError for a backbone that cannot take images of such a shape, or has no patches to pool. Images
    that cannot be read, or are narrower than a patch, are left out with a warning.
    """
    device, dtype = device_and_dtype(backbone)
    see, patch = _pooled(backbone, look), getattr(backbone, "patch_size", 1)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=look.precision == "bf16")
    places, vectors = list[int](), list[Tensor]()
    for group, pixels in _groups(source, _shown(backbone, look), part, batch, num_workers):
        height, width = pixels.shape[-2:]
        if min(height, width) * min(look.scales) < patch:
            for place in group:
                log.warning("left out: %s, %d x %d pixels, is narrower than a patch", source.name(place), width, height)
            continue
        x = normalize(pixels.to(device, non_blocking=True), look.normalize)
        with evaluating(backbone), autocast:
            vectors.append(_at_scales(see, x.to(dtype), look.scales, patch).float())
        places += group
    if not places:
        return Described(torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device))
    order = torch.tensor(places, device=device).argsort()
    return Described(torch.cat(vectors)[order], torch.tensor(places, device=device)[order])


def _shown(backbone: nn.Module, look: Look) -> Callable[[np.ndarray], np.ndarray]:
    squeezed = look.squeezed or not has_weights(backbone)
    return lambda image: (squeezed_view if squeezed else thumbnail_view)(image, look.side)


def _pooled(backbone: nn.Module, look: Look) -> Callable[[Tensor], Tensor]:
    """(B, C, h, w) -> (B, D)."""
    if look.tokens == "cls" or not has_weights(backbone):
        return backbone
    vit = our_vit(backbone, f"tokens {look.tokens!r}")

    def see(images: Tensor) -> Tensor:
        ((cls, patches),) = vit.intermediate_layers(images, 1)
        pooled = gem(patches.float(), look.power)
        return pooled if look.tokens == "gem" else torch.cat([cls.float(), pooled], dim=1)

    return see


def _at_scales(see: Callable[[Tensor], Tensor], x: Tensor, scales: Sequence[float], patch: int) -> Tensor:
    total: Tensor | None = None
    for scale in scales:
        scaled = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")
        height, width = (side // patch * patch for side in scaled.shape[-2:])
        try:
            seen = see(scaled[..., :height, :width])
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            raise EvaluationError(f"the backbone cannot take images of {width} x {height} pixels: {error}") from error
        total = seen if total is None else total + seen
    assert total is not None
    return total / len(scales)


def _groups(
    source: Source, show: Callable[[np.ndarray], np.ndarray], part: Part, batch: int, num_workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Places of images of one shape, up to ``batch``, and their uint8 (B, C, h, w). The next are read meanwhile."""

    def read(place: int) -> np.ndarray | None:
        try:
            return show(source.read(place)[0])
        except BadImage as error:
            log.warning("left out: %s", error)
            return None

    images = part.images(len(source))
    windows = [images[start : start + WINDOW * batch] for start in range(0, len(images), WINDOW * batch)]
    with (
        ThreadPoolExecutor(max(1, affordable(num_workers))) as threads,
        tqdm(total=len(images), desc="descriptors", unit="image", leave=False, disable=part.rank > 0 or None) as bar,
    ):
        ahead = [threads.submit(read, place) for place in windows[0]] if windows else []
        for window, following in zip(windows, [*windows[1:], range(0)], strict=True):
            now, ahead = ahead, [threads.submit(read, place) for place in following]
            shapes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
            for place, future in zip(window, now, strict=True):
                if (image := future.result()) is not None:
                    shapes.setdefault(image.shape, []).append((place, image))
                bar.update()
            for group in shapes.values():
                for start in range(0, len(group), batch):
                    places, shown = zip(*group[start : start + batch], strict=True)
                    yield [*places], torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)

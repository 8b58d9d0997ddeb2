"""One random view of a labelled image, as classifiers are fine-tuned on them."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.draws import Purpose, random_bits

Augmentation = Literal["strong", "gentle", "none"]
"""strong: a crop of 35 % to 100 % of the area, a flip, RandAugment(2, 9) (Cubuk et al. 2020), as iBOT fine-tunes.
gentle: a crop of 60 % to 100 %, a flip. none: the view that is evaluated."""
STRONG_SIZE = 96  # pixels from which a view bears the strong one: of a smaller picture it leaves too little


def augmentation_for(size: int, channels: int = 3) -> Augmentation:
    """What suits views of ``size`` pixels: the gentle one below STRONG_SIZE, and where there is no colour to change."""
    return "strong" if size >= STRONG_SIZE and channels in (1, 3) else "gentle"


class RandomView:
    """A random view of an image, a pure function of (seed, epoch, index).

    Args:
        size: side in pixels.
        kind: strong or gentle.
        seed: of all draws.

    Raises ConfigError where torchvision is not installed.
    """

    def __init__(self, size: int, kind: Literal["strong", "gentle"], seed: int) -> None:
        self.seed, self._transform = seed, _transform(size, kind)

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> Tensor:
        """uint8 (h, w, C) -> uint8 (C, size, size); strong takes C = 1 or 3."""
        bits = int(random_bits(Purpose.SUPERVISED, self.seed, epoch, index, 1)[0]) >> 1
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator, which is the caller's
            torch.default_generator.manual_seed(bits)
            return self._transform(torch.from_numpy(image.transpose(2, 0, 1).copy()))


def _transform(size: int, kind: Literal["strong", "gentle"]) -> Callable[[Tensor], Tensor]:
    try:
        from torchvision.transforms import InterpolationMode, v2
    except ImportError as error:
        raise ConfigError(f"random views need torchvision ({error}): pip install torchvision") from error

    area = (0.35, 1.0) if kind == "strong" else (0.6, 1.0)
    steps = [v2.RandomResizedCrop(size, area, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    if kind == "strong":
        steps.append(v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR))
    return v2.Compose(steps)

"""The views of an image that evaluations take, and pixels as network input."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.data.views.reference import joined, pictures, resize

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of red, green and blue in [0, 1]
STD = (0.229, 0.224, 0.225)


def center_view(image: np.ndarray, size: int, crop: float = 0.875) -> Tensor:
    """DINO v1's evaluation transform of an image, uint8 (h, w, C): its center, uint8 (C, size, size), bicubic.

    Its shorter side becomes ``size`` / ``crop``. Of an image that is longer than 8 times its width only the middle is
    resized: all of it could fill the memory.
    """
    height, width = image.shape[:2]
    longest = 8 * min(height, width)
    top, left = (max(0, side - longest) // 2 for side in (height, width))
    bands = pictures(image[top : height - top, left : width - left])
    short = round(size / crop)
    width, height = (int(short * side / min(bands[0].size)) for side in bands[0].size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    view = joined([resize(band, width, height).crop((left, top, left + size, top + size)) for band in bands])
    return torch.from_numpy(view.transpose(2, 0, 1).copy())


def squeezed_view(image: np.ndarray, side: int) -> np.ndarray:
    """All of an image, uint8 (h, w, C), as (side, side, C), bicubic, whatever its proportions."""
    return joined([resize(band, side, side) for band in pictures(image)])


def whole_view(image: np.ndarray, size: int) -> Tensor:
    """The same as uint8 (C, size, size): its mask still fits."""
    return torch.from_numpy(squeezed_view(image, size).transpose(2, 0, 1).copy())


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) of any type at another size: at each pixel's center, what lies there."""
    rows, columns = (
        ((2 * np.arange(n) + 1) * old) // (2 * n) for n, old in zip((height, width), values.shape, strict=True)
    )
    return values[rows[:, None], columns]


def thumbnail_view(image: np.ndarray, side: int) -> np.ndarray:
    """All of an image, uint8 (h, w, C), its longer side at most ``side``: Pillow's thumbnail by Lanczos, as DINO v1's
    eval_image_retrieval.py has it. A smaller image stays as it is."""
    bands = pictures(image)
    for band in bands:
        band.thumbnail((side, side), Image.Resampling.LANCZOS)
    return joined(bands)


def normalize(views: Tensor, kind: Literal["imagenet", "image"]) -> Tensor:
    """uint8 views (..., C, h, w) as network input, fp32 of the same shape on the same device.

    ``imagenet``: ImageNet's mean subtracted, divided by its deviation, of red, green and blue alone. ``image``: each
    channel of each view by its own mean and deviation (plus one gray level, so that a flat channel becomes 0).
    """
    if kind == "imagenet":
        scale, shift = imagenet(views.device).view(2, 3, 1, 1)
        return (views * scale).add_(shift)
    pixels = views.float()
    variance, mean = torch.var_mean(pixels, dim=(-2, -1), correction=0, keepdim=True)
    return pixels.sub_(mean).div_(variance.sqrt_().add_(1.0))


@lru_cache
def imagenet(device: torch.device) -> Tensor:
    """Scale and shift, (2, 3) fp32, from byte to (byte / 255 - mean) / std. Cached: the copy to a GPU waits."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return torch.stack([1 / (255 * std), -mean / std]).float().to(device)

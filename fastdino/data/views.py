"""An image becomes 2 global and L local views, in two halves: drawing the random numbers, and applying them.

:func:`sample_params` draws everything that is random about an image's views, a pure function of (seed, epoch, index,
image size). :func:`apply` draws nothing. So every way of making the views, here or on a GPU, can take the same numbers.
"""

import math
from enum import IntEnum
from functools import lru_cache
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data.draws import Purpose, uniform


class Column(IntEnum):
    """Columns of the parameters, in the order in which they act on a view."""

    LEFT = 0
    """Crop box, as shares of the image's width and height. Times the image's size and rounded it is the very box of
    whole pixels that was drawn. The box is cut out (nothing outside it is seen) and resized to the view's size,
    bicubic and antialiased."""
    TOP = 1
    WIDTH = 2
    HEIGHT = 3
    FLIP = 4
    """1: mirror left and right."""
    ROTATE = 5
    """Degrees counter-clockwise about the view's center, bilinear; from beyond its edge comes its mirror image."""
    ORDER = 6
    """Index into JITTER_ORDERS: in which order the next four columns act."""
    BRIGHTNESS = 7
    """Factor; 1 (for the hue: 0) leaves out the step."""
    CONTRAST = 8
    SATURATION = 9
    HUE = 10
    """Share of the colour circle, in [-0.5, 0.5]."""
    GRAYSCALE = 11
    """1: replace the colours by their luma (ITU-R 601)."""
    BLUR = 12
    """Radius of Pillow's Gaussian blur, its standard deviation in pixels of the view; 0 leaves it out."""
    SOLARIZE = 13
    """1: invert what is 128 or brighter."""


JITTER = (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE)
JITTER_ORDERS = tuple(permutations(JITTER))
SOLARIZE_THRESHOLD = 128
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of red, green and blue in [0, 1]
STD = (0.229, 0.224, 0.225)

_RATIO = (3 / 4, 4 / 3)  # width / height of a crop
_TRIES = 10  # to find a crop that fits into the image
_BLUR_RADIUS = (0.1, 2.0)
_NUM_DRAWS = 4 * _TRIES + 12


def sample_params(seed: int, epoch: int, index: int, config: ViewsConfig, image_size: tuple[int, int]) -> Tensor:
    """Draws the views of image ``index`` in ``epoch``: (config.num_views, len(Column)) fp32, global views first.

    ``image_size`` is (width, height) in pixels. The distributions are those of DINO v1's torchvision pipeline
    (Caron et al. 2021, appendix A; random resized crops with a ratio in [3/4, 4/3]).
    """
    num_views = config.num_views
    u = uniform(Purpose.VIEWS, seed, epoch, index, num_views * _NUM_DRAWS).reshape(num_views, _NUM_DRAWS)
    crop, u = u[:, : 4 * _TRIES].reshape(num_views, 4, _TRIES), u[:, 4 * _TRIES :].T
    scale = np.array([config.global_scale] * 2 + [config.local_scale] * config.num_local)
    blur = np.array([config.blur[0], config.blur[1]] + [config.blur[2]] * config.num_local)
    solarize = np.array([0.0, config.solarize] + [0.0] * config.num_local)

    params = np.empty((num_views, len(Column)))
    params[:, : Column.HEIGHT + 1] = _crop_boxes(crop, scale, image_size)
    params[:, Column.FLIP] = u[0] < config.flip
    params[:, Column.ROTATE] = config.rotate * (2 * u[1] - 1)
    params[:, Column.ORDER] = np.floor(u[2] * len(JITTER_ORDERS))
    jittered = u[3] < config.jitter
    for column, strength, draw in zip(JITTER, config.jitter_strength, u[4:8], strict=True):
        neutral = 0.0 if column is Column.HUE else 1.0
        low, high = (-strength, strength) if column is Column.HUE else (max(0.0, 1 - strength), 1 + strength)
        params[:, column] = np.where(jittered, low + (high - low) * draw, neutral)
    params[:, Column.GRAYSCALE] = u[8] < config.grayscale
    params[:, Column.BLUR] = (u[9] < blur) * (_BLUR_RADIUS[0] + (_BLUR_RADIUS[1] - _BLUR_RADIUS[0]) * u[10])
    params[:, Column.SOLARIZE] = u[11] < solarize
    return torch.from_numpy(params.astype(np.float32))


def _crop_boxes(u: np.ndarray, scale: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(V, 4) left, top, width, height as shares of the image, from draws (V, 4, tries) and area ranges (V, 2).

    The first try that fits is taken. If none does, the largest centered box of a permitted ratio, as in torchvision.
    """
    image_width, image_height = image_size
    area = image_width * image_height * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * u[:, 0])  # (V, tries)
    ratio = np.exp(np.log(_RATIO[0]) + (np.log(_RATIO[1]) - np.log(_RATIO[0])) * u[:, 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    left = np.floor(u[:, 2] * (image_width - width + 1))
    top = np.floor(u[:, 3] * (image_height - height + 1))
    first = fits.argmax(axis=1)[:, None]
    boxes = np.stack([np.take_along_axis(x, first, axis=1)[:, 0] for x in (left, top, width, height)], axis=1)

    full_width = min(image_width, round(image_height * _RATIO[1]))
    full_height = min(image_height, round(image_width / _RATIO[0]))
    boxes[~fits.any(axis=1)] = (
        (image_width - full_width) // 2, (image_height - full_height) // 2, full_width, full_height,
    )  # fmt: skip
    return boxes / (image_width, image_height, image_width, image_height)


def apply(image: Image.Image, params: Tensor, config: ViewsConfig) -> tuple[Tensor, Tensor]:
    """The views that ``params`` (num_views, len(Column)) describe: uint8 (2, 3, G, G) and (L, 3, l, l).

    Same library calls, and so the same pixels, as DINO v1's torchvision pipeline on Pillow images.
    """
    rows = params.tolist()
    sizes = (config.global_size, config.local_size)
    groups = []
    for group, size in zip((rows[:2], rows[2:]), sizes, strict=True):
        views = np.empty((len(group), 3, size, size), dtype=np.uint8)
        for out, row in zip(views, group, strict=True):
            pixels = np.asarray(_view(image, row, size))
            out[:] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        groups.append(torch.from_numpy(views))
    return groups[0], groups[1]


def _view(image: Image.Image, row: list[float], size: int) -> Image.Image:
    """One view, (size, size); of mode L when it is gray, whose three channels are equal."""
    left, top = round(row[Column.LEFT] * image.width), round(row[Column.TOP] * image.height)
    right = left + round(row[Column.WIDTH] * image.width)
    bottom = top + round(row[Column.HEIGHT] * image.height)
    # Not resize(box=...), which would let the pixels around the box bleed into the view's edge.
    view = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC)
    if row[Column.FLIP]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if row[Column.ROTATE]:
        view = _rotate(view, row[Column.ROTATE])
    for column in JITTER_ORDERS[int(row[Column.ORDER])]:
        if row[column] != (0 if column is Column.HUE else 1):
            view = _JITTER_STEP[column](view, row[column])
    if row[Column.GRAYSCALE]:
        view = view.convert("L")
    if row[Column.BLUR]:
        view = view.filter(ImageFilter.GaussianBlur(row[Column.BLUR]))
    if row[Column.SOLARIZE]:
        view = ImageOps.solarize(view, SOLARIZE_THRESHOLD)
    return view


def _rotate(view: Image.Image, degrees: float) -> Image.Image:
    size = view.width
    mirror = _mirror(size)
    padded = Image.fromarray(np.asarray(view).take(mirror, axis=0).take(mirror, axis=1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    center, middle = len(mirror) / 2, size / 2
    matrix = (cos, -sin, center - (cos - sin) * middle, sin, cos, center - (sin + cos) * middle)
    return padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@lru_cache(maxsize=4)
def _mirror(size: int) -> np.ndarray:
    """Positions along a side, continued by their mirror image far enough for any rotation (0.21 sides)."""
    margin = min(size // 4 + 2, size - 1)
    return np.pad(np.arange(size), margin, mode="reflect")


# ImageEnhance and torchvision compute the same; written out, their conversions that change nothing are saved.


def _brightness(view: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new("RGB", view.size), view, factor)


def _contrast(view: Image.Image, factor: float) -> Image.Image:
    mean = int(np.asarray(view.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", view.size, (mean, mean, mean)), view, factor)


def _saturation(view: Image.Image, factor: float) -> Image.Image:
    return Image.blend(view.convert("L").convert("RGB"), view, factor)


def _hue(view: Image.Image, shift: float) -> Image.Image:
    hsv = np.array(view.convert("HSV"))
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # hue is a byte and wraps around
    return Image.frombytes("HSV", view.size, hsv.tobytes()).convert("RGB")


_JITTER_STEP = {
    Column.BRIGHTNESS: _brightness,
    Column.CONTRAST: _contrast,
    Column.SATURATION: _saturation,
    Column.HUE: _hue,
}


def center_view(image: Image.Image, size: int) -> Tensor:
    """DINO v1's evaluation transform: uint8 (3, size, size), the center of the image, whose shorter side becomes
    256 / 224 of ``size``, bicubic."""
    short = round(size * 256 / 224)
    width, height = (int(short * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    view = np.asarray(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(view.transpose(2, 0, 1).copy())


def normalize(views: Tensor, kind: Literal["imagenet", "image"]) -> Tensor:
    """uint8 views (..., 3, h, w) as network input, fp32 of the same shape on the same device.

    ``imagenet``: ImageNet's mean subtracted, divided by its deviation, channel by channel. ``image``: each channel of
    each view by its own mean and deviation (plus one gray level, so that a flat channel becomes 0).
    """
    if kind == "imagenet":
        scale, shift = _imagenet(views.device)
        return (views * scale).add_(shift)
    pixels = views.float()
    variance, mean = torch.var_mean(pixels, dim=(-2, -1), correction=0, keepdim=True)
    return pixels.sub_(mean).div_(variance.sqrt_().add_(1.0))


@lru_cache
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1) fp32, from byte to (byte / 255 - mean) / std. Cached: the copy to a GPU waits."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return tuple(x.float().view(3, 1, 1).to(device) for x in (1 / (255 * std), -mean / std))  # type: ignore[return-value]

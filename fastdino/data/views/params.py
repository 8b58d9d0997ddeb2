"""What is random about the views of an image, drawn as a tensor: a pure function of (seed, epoch, index, image size).

Applying the parameters draws nothing. So every way of making the views, here or on a GPU, can take the same numbers.
"""

from enum import IntEnum
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data.draws import Purpose, uniform


class Column(IntEnum):
    """Columns of the parameters, in the order in which they act on a view."""

    LEFT = 0
    """Crop box, as shares of the image's width and height, see :func:`crop_boxes`. The box is cut out (nothing outside
    it is seen) and resized to the view's size, bicubic and antialiased."""
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

_RATIO = (3 / 4, 4 / 3)  # width / height of a crop
_TRIES = 10  # to find a crop that fits into the image
_BLUR_RADIUS = (0.1, 2.0)
_NUM_DRAWS = 4 * _TRIES + 12


def groups(config: ViewsConfig) -> dict[str, tuple[int, int]]:
    """Views of one size together: (how many, side in pixels) of the global ones and, if there are any, the local."""
    found = {"global": (2, config.global_size), "local": (config.num_local, config.local_size)}
    return {name: (count, size) for name, (count, size) in found.items() if count}


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
    params[:, : Column.HEIGHT + 1] = _drawn_boxes(crop, scale, image_size)
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


def crop_boxes(params: Tensor, image_size: tuple[int, int]) -> np.ndarray:
    """(V, 4) int32 left, top, width, height in pixels: the very boxes that were drawn for an image of this size.

    Of a side of more than 2**23 pixels, which fp32 cannot tell apart, a box nearby that is within the image.
    """
    sides = np.array(image_size)
    boxes = np.rint(params[:, : Column.HEIGHT + 1].numpy().astype(np.float64) * np.tile(sides, 2)).astype(np.int32)
    boxes[:, :2] = np.clip(boxes[:, :2], 0, sides - 1)
    boxes[:, 2:] = np.clip(boxes[:, 2:], 1, sides - boxes[:, :2])
    return boxes


def _drawn_boxes(u: np.ndarray, scale: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
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

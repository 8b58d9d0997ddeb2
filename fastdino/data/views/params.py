"""What is random about the views of an image, drawn as a tensor: a pure function of (seed, epoch, index, image size).

Applying the parameters draws nothing. So every way of making the views, here or on a GPU, can take the same numbers.
"""

from collections.abc import Sequence
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


def new_views(config: ViewsConfig, channels: int = 3) -> dict[str, Tensor]:
    """Room for the views of one image: uint8 (count, channels, size, size) of each group."""
    sizes = groups(config).items()
    return {name: torch.empty((count, channels, size, size), dtype=torch.uint8) for name, (count, size) in sizes}


def sample_params(seed: int, epoch: int, index: int, config: ViewsConfig, image_size: tuple[int, int]) -> Tensor:
    """Draws the views of image ``index`` in ``epoch``: (config.num_views, len(Column)) fp32, global views first.

    ``image_size`` is (width, height) in pixels. The distributions are those of DINO v1's torchvision pipeline
    (Caron et al. 2021, appendix A; random resized crops with a ratio in [3/4, 4/3]).
    """
    return sample_params_of_many(seed, epoch, [index], config, [image_size])[0]


def sample_params_of_many(
    seed: int, epoch: int, indices: Sequence[int], config: ViewsConfig, image_sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """:func:`sample_params` of each of B images, (B, num_views, len(Column)): the same numbers, several times as fast.

    Drawing for one image, numpy spends its time between small arrays, and keeps the interpreter from other threads.
    """
    num_views = config.num_views
    drawn = [uniform(Purpose.VIEWS, seed, epoch, index, num_views * _NUM_DRAWS) for index in indices]
    u = np.array(drawn).reshape(len(indices), num_views, _NUM_DRAWS)
    crop, u = u[..., : 4 * _TRIES].reshape(*u.shape[:2], 4, _TRIES), u[..., 4 * _TRIES :].transpose(2, 0, 1)
    scale = np.array([config.global_scale] * 2 + [config.local_scale] * config.num_local)
    blur = np.array([config.blur[0], config.blur[1]] + [config.blur[2]] * config.num_local)
    solarize = np.array([0.0, config.solarize] + [0.0] * config.num_local)

    params = np.empty((len(indices), num_views, len(Column)))
    params[..., : Column.HEIGHT + 1] = _drawn_boxes(crop, scale, np.array(image_sizes))
    params[..., Column.FLIP] = u[0] < config.flip
    params[..., Column.ROTATE] = config.rotate * (2 * u[1] - 1)
    params[..., Column.ORDER] = np.floor(u[2] * len(JITTER_ORDERS))
    jittered = u[3] < config.jitter
    for column, strength, draw in zip(JITTER, config.jitter_strength, u[4:8], strict=True):
        neutral = 0.0 if column is Column.HUE else 1.0
        low, high = (-strength, strength) if column is Column.HUE else (max(0.0, 1 - strength), 1 + strength)
        params[..., column] = np.where(jittered, low + (high - low) * draw, neutral)
    params[..., Column.GRAYSCALE] = u[8] < config.grayscale
    params[..., Column.BLUR] = (u[9] < blur) * (_BLUR_RADIUS[0] + (_BLUR_RADIUS[1] - _BLUR_RADIUS[0]) * u[10])
    params[..., Column.SOLARIZE] = u[11] < solarize
    return torch.from_numpy(params.astype(np.float32))


def crop_boxes(params: Tensor, image_size: tuple[int, int]) -> np.ndarray:
    """(V, 4) int32 left, top, width, height in pixels: the very boxes that were drawn for an image of this size.

    Of a side of more than 2**23 pixels, which fp32 cannot tell apart, a box nearby that is within the image.
    """
    sides = np.array(image_size + image_size)
    boxes = np.rint(params[:, : Column.HEIGHT + 1].numpy() * sides.astype(np.float64)).astype(np.int32)
    boxes[:, :2] = np.minimum(boxes[:, :2], sides[:2] - 1)
    boxes[:, 2:] = np.minimum(np.maximum(boxes[:, 2:], 1), sides[2:] - boxes[:, :2])
    return boxes


def _drawn_boxes(u: np.ndarray, scale: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
    """(B, V, 4) left, top, width, height as shares of the image, from draws (B, V, 4, tries), area ranges (V, 2) and
    widths and heights (B, 2).

    The first try that fits is taken. If none does, the largest centered box of a permitted ratio, as in torchvision.
    """
    image_width, image_height = image_sizes.T[:, :, None]  # (B, 1)
    share = scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * u[:, :, 0]  # (B, V, tries)
    area = (image_width * image_height)[..., None] * share
    ratio = np.exp(np.log(_RATIO[0]) + (np.log(_RATIO[1]) - np.log(_RATIO[0])) * u[:, :, 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= image_width[..., None]) & (height > 0) & (height <= image_height[..., None])
    image, view = np.indices(fits.shape[:2], sparse=True)
    chosen = image, view, fits.argmax(axis=-1)
    width, height = width[chosen], height[chosen]  # (B, V)
    left = np.floor(u[:, :, 2][chosen] * (image_width - width + 1))
    top = np.floor(u[:, :, 3][chosen] * (image_height - height + 1))
    boxes = np.stack([left, top, width, height], axis=-1)
    if not fits[chosen].all():
        widest, highest = image_sizes[:, 1] * _RATIO[1], image_sizes[:, 0] / _RATIO[0]
        full = np.minimum(image_sizes, np.rint(np.stack([widest, highest], axis=1)))  # (B, 2)
        centered = np.concatenate([(image_sizes - full) // 2, full], axis=1)
        boxes = np.where(fits[chosen][..., None], boxes, centered[:, None])
    return boxes / image_sizes[:, None, [0, 1, 0, 1]]

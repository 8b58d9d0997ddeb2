"""Parameters and an image become views, by Pillow: the definition of every view's pixels."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data.views.params import JITTER_ORDERS, SOLARIZE_THRESHOLD, Column, crop_boxes, new_views


def apply(image: np.ndarray, params: Tensor, config: ViewsConfig) -> dict[str, Tensor]:
    """The views of ``image``, uint8 (h, w, C), that ``params`` (num_views, len(Column)) describe: uint8 global
    (2, C, G, G) and local (L, C, l, l).

    Same library calls, and so the same pixels, as DINO v1's torchvision pipeline on Pillow images; see :func:`resize`.
    Three channels are red, green and blue. Any others are taken apart: what crops, flips, rotates, blurs and solarizes
    is the same for each, and jitter and grayscale are not defined (fastdino.config.Config refuses them).
    """
    out = new_views(config, image.shape[2])
    write(image, params, out)
    return out


def write(image: np.ndarray, params: Tensor, out: dict[str, Tensor]) -> None:
    """As :func:`apply`, into ``out``: views of one size together, whose order is that of the rows of ``params``.

    A view has to be contiguous, but its neighbours may be anywhere: those of one image lie apart in a batch.
    """
    views, bands = [view for group in out.values() for view in group.numpy()], pictures(image)
    for view, box, row in zip(views, crop_boxes(params, bands[0].size).tolist(), params.tolist(), strict=True):
        for part, band in zip(np.split(view, len(bands)), bands, strict=True):
            pixels = np.asarray(_view(band, box, row, view.shape[-1]))
            part[:] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def pictures(image: np.ndarray) -> list[Image.Image]:
    """What Pillow takes of an image, uint8 (h, w, C): the whole of RGB, any other channels one by one."""
    bands = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    return [Image.fromarray(band) for band in bands]


def joined(bands: list[Image.Image]) -> np.ndarray:
    """uint8 (h, w, C): the other way round."""
    return np.dstack([np.asarray(band) for band in bands])


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` at another size, bicubic and antialiased, the horizontal pass first: the same pixels by every Pillow.

    The byte between the passes is rounded, so their order shows. Pillow 13 takes the vertical pass first where it
    removes more than twice as many rows as columns; there, each pass is a call of its own.
    """
    removed_rows, removed_columns = image.height - height, image.width - width
    if removed_rows > max(0, 2 * removed_columns):
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _view(image: Image.Image, box: list[int], row: list[float], size: int) -> Image.Image:
    """One view, (size, size); of mode L when it is gray, whose three channels are equal."""
    left, top, width, height = box
    # Not resize(box=...), which would let the pixels around the box bleed into the view's edge.
    view = resize(image.crop((left, top, left + width, top + height)), size, size)
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
    cos, sin = turn(degrees)
    center, middle = len(mirror) / 2, size / 2
    matrix = (cos, -sin, center - (cos - sin) * middle, sin, cos, center - (sin + cos) * middle)
    return padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def turn(degrees: float) -> tuple[float, float]:
    """Cosine and sine."""
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


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

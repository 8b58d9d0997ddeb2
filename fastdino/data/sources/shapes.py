"""Rendered objects, without end and without a download: what the demo and the tests train on.

Twelve classes, each one silhouette with one texture, on a cluttered background. Colour says nothing about the class:
each channel of each image gets a mean and a deviation drawn at random. An object is lighter than what is behind it.
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

from fastdino.config import DataConfig
from fastdino.config.errors import require
from fastdino.data.draws import Purpose, uniform
from fastdino.data.sources.source import Room

Field = np.ndarray  # (size, size) fp32: a value at each pixel
# Texture and silhouette of each class, in the order of the labels; alike silhouettes have different textures.
CLASSES = (
    ("striped", "disc"),
    ("plain", "ring"),
    ("dotted", "square"),
    ("checked", "triangle"),
    ("striped", "star"),
    ("plain", "cross"),
    ("dotted", "heart"),
    ("checked", "moon"),
    ("striped", "hourglass"),
    ("plain", "arrow"),
    ("dotted", "flower"),
    ("checked", "drop"),
)
_RADIUS = (0.55, 0.9)  # of an object, in halves of the image's side
_OVERHANG = 0.2  # how far an object may reach over the image's edge, in halves of the side
_TILT = math.radians(30)  # largest rotation either way
_MAX_CLUTTER = 4  # items behind the object, at least 1
_WAVES = 2.0  # texture periods per radius
_CELLS = (5, 11)  # cells of the background's coarse and fine noise along a side
_MEAN, _DEVIATION = (0.30, 0.65), (0.04, 0.20)  # of a channel of an image, in [0, 1]
_NUM_DRAWS = 300  # per image, more than are used


def check_shows_shapes(config: DataConfig) -> None:
    """Raises ConfigError where images have other channels than red, green and blue."""
    reason = "they are rendered in colour. Give images of your own (data.root, run.knn_root, --data of an evaluation)"
    require(config.channels == 3, "data.channels", config.channels, "3 for shapes", reason)


class ShapesSource:
    """``num_images`` rendered objects; image ``index`` is a pure function of (seed, index, image_size).

    Labels go round: index modulo 12. Other seeds give other images of the same classes, for a k-NN's bank and test.
    """

    def __init__(self, num_images: int, image_size: int, seed: int = 0) -> None:
        self.num_images, self.image_size, self.seed = num_images, image_size, seed
        self.labels = [" ".join(names) for names in CLASSES]

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """RGB bytes (image_size, image_size, 3) and its label."""
        pixels, _ = self._render(index)
        return pixels, self.label(index)

    def encoded(self, index: int) -> bytes:
        """The image as a PNG."""
        buffer = io.BytesIO()
        Image.fromarray(self.read(index)[0]).save(buffer, "PNG")
        return buffer.getvalue()

    def label(self, index: int) -> int:
        """The label alone, without rendering the image."""
        return index % len(CLASSES)

    def mask(self, index: int) -> np.ndarray:
        """(image_size, image_size) bool: where the object is."""
        return self._render(index)[1] > 0.5

    def name(self, index: int) -> str:
        """What to call the image in a message."""
        return f"shapes {self.seed}/{index}"

    def fingerprint(self) -> str:
        """Its parameters."""
        return f"shapes {self.num_images} {self.image_size} {self.seed}"

    def stamp(self) -> str:
        """The same: another way to render them raises cache.VERSION."""
        return self.fingerprint()

    def _render(self, index: int) -> tuple[np.ndarray, Field]:
        """uint8 (size, size, 3), and the object's coverage of each pixel in [0, 1]."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"image {index} of {self.num_images}")
        draws = _Draws(self.seed, index)
        x, y = _grid(self.image_size)
        texture, silhouette = CLASSES[index % len(CLASSES)]

        radius = draws.between(*_RADIUS)
        shift_x, shift_y = (1 + _OVERHANG - radius) * draws.between(-1, 1, 2)
        px, py = _turn((x - shift_x) / radius, (y - shift_y) / radius, draws.between(-_TILT, _TILT))
        pixel = 2 / (self.image_size * float(radius))  # a pixel's side in radii
        cover = np.clip(0.5 - SILHOUETTES[silhouette](px, py) / pixel, 0, 1)
        phase_x, phase_y = draws.between(0, 1, 2)
        sun = draws.between(0, 2 * math.pi)
        light = 1 - 0.08 * (px * np.cos(sun) + py * np.sin(sun))
        light -= 0.42 * TEXTURES[texture](px + phase_x, py + phase_y, pixel)

        canvas = _background(x, y, draws)  # (size, size, 3), at most 0.5, and the object at least 0.42
        canvas += cover[..., None] * (light[..., None] * draws.between(0.85, 1, 3) - canvas)
        canvas -= canvas.mean(axis=(0, 1))
        canvas *= draws.between(*_DEVIATION, 3) / np.sqrt(np.square(canvas).mean(axis=(0, 1)))
        canvas += draws.between(*_MEAN, 3)
        return (np.clip(canvas, 0, 1) * 255).astype(np.uint8), cover


class _Draws:
    """The random numbers of one image, handed out in order."""

    def __init__(self, seed: int, index: int) -> None:
        self.values = uniform(Purpose.SHAPES, seed, index, 0, _NUM_DRAWS).astype(np.float32)
        self.used = 0

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        """The next numbers, uniform in [low, high), in this shape; a 0-d array without one."""
        start, self.used = self.used, self.used + math.prod(shape)
        return low + (high - low) * self.values[start : self.used].reshape(shape)


def _background(x: Field, y: Field, draws: _Draws) -> np.ndarray:
    """(size, size, 3) fp32 in [0, 0.5]: a grating, 1 to 4 items and noise of two scales, each of its own colour."""
    angle, frequency, phase = draws.between(0, 2 * math.pi), draws.between(4, 16), draws.between(0, 2 * math.pi)
    layers = [0.5 + 0.5 * np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)]
    layers += list(_clutter(x, y, draws))
    for cells in _CELLS:
        spread = _spread(x.shape[0], cells)
        layers.append(spread @ draws.between(0, 1, cells, cells) @ spread.T)
    strength = np.array([0.25] + [0.45] * _MAX_CLUTTER + [0.25] * len(_CELLS), np.float32)[:, None]
    return np.minimum(np.stack(layers, axis=-1) @ (strength * draws.between(0, 1, len(layers), 3)), 0.5)


def _clutter(x: Field, y: Field, draws: _Draws) -> np.ndarray:
    """(4, size, size) coverage of small bars and ellipses; all but the first 1 to 4 are empty."""
    count = int(draws.between(1, _MAX_CLUTTER + 1))
    cx, cy = draws.between(-1, 1, 2, _MAX_CLUTTER, 1, 1)
    long, thin = draws.between(0.15, 0.4, count, 1, 1), draws.between(0.06, 0.16, count, 1, 1)
    dx, dy = _turn(x - cx[:count], y - cy[:count], draws.between(0, math.pi, count, 1, 1))
    bar = np.maximum(np.abs(dx) - long, np.abs(dy) - thin)
    ellipse = (np.hypot(dx / long, dy / thin) - 1) * thin
    distance = np.where(draws.between(0, 1, count, 1, 1) < 0.5, bar, ellipse)
    cover = np.zeros((_MAX_CLUTTER, *x.shape), np.float32)
    cover[:count] = np.clip(0.5 - distance * (x.shape[0] / 2), 0, 1)
    return cover


def _turn(x: Field, y: Field, angle: np.ndarray) -> tuple[Field, Field]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Field, Field]:
    """x to the right and y down at the pixels' centers, the image being [-1, 1] x [-1, 1]."""
    line = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    return np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))


@lru_cache(maxsize=8)
def _spread(size: int, cells: int) -> np.ndarray:
    """(size, cells): linear interpolation from ``cells`` values along a side to its pixels."""
    place = np.linspace(0, cells - 1, size)[:, None]
    return np.clip(1 - np.abs(place - np.arange(cells)), 0, 1).astype(np.float32)


# Silhouettes: signed distance to the outline in radii, below 0 inside. Each lies within the unit disc.


def _disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.95


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.7) - 0.25


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(y - 0.55, 0.867 * np.abs(x) - 0.498 * (y + 0.98))


def _star(x: Field, y: Field) -> Field:
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.rint(angle / sector))  # from the nearest tip: one edge is left
    r = np.hypot(x, y)
    return 0.62 * (r * np.cos(angle) - 1) + 0.785 * r * np.sin(angle)


def _cross(x: Field, y: Field) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.92, y - 0.3), np.maximum(x - 0.3, y - 0.92))


def _heart(x: Field, y: Field) -> Field:
    x = np.abs(x)
    lobe = np.hypot(x - 0.42, y + 0.28) - 0.47
    side = 0.72 * x + 0.694 * y - 0.578  # touches the lobe
    tip = np.maximum(np.maximum(side, 0.694 * (x - 0.42) - 0.72 * (y + 0.28)), -y - 0.28)
    return np.minimum(lobe, tip)


def _moon(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - 0.95, 0.72 - np.hypot(x - 0.5, y))


def _hourglass(x: Field, y: Field) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - 0.78, 0.84 * (x - 0.06) - 0.54 * y)


def _arrow(x: Field, y: Field) -> Field:
    x = np.abs(x)
    head = np.maximum(y - 0.05, 0.77 * x - 0.64 * (y + 0.95))
    return np.minimum(head, np.maximum(x - 0.26, np.abs(y - 0.4) - 0.52))


def _flower(x: Field, y: Field) -> Field:
    return 0.75 * (np.hypot(x, y) - 0.7 - 0.24 * np.cos(5 * np.arctan2(x, -y)))


def _drop(x: Field, y: Field) -> Field:
    side = np.maximum(0.877 * np.abs(x) - 0.48 * (y + 0.95), y - 0.012)
    return np.minimum(np.hypot(x, y - 0.3) - 0.6, side)


SILHOUETTES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
    "hourglass": _hourglass,
    "arrow": _arrow,
    "flower": _flower,
    "drop": _drop,
}

# Textures: share of dark at a place, in radii, for pixels of a given side; edges are one pixel soft.


def _plain(x: Field, y: Field, pixel: float) -> Field:
    return np.zeros_like(x)


def _striped(x: Field, y: Field, pixel: float) -> Field:
    return _edge(np.sin(2 * np.pi * _WAVES * y), pixel)


def _checked(x: Field, y: Field, pixel: float) -> Field:
    return _edge(np.sin(np.pi * _WAVES * x) * np.sin(np.pi * _WAVES * y), pixel)


def _dotted(x: Field, y: Field, pixel: float) -> Field:
    return _edge(np.cos(2 * np.pi * _WAVES * x) + np.cos(2 * np.pi * _WAVES * y) - 0.6, pixel)


def _edge(wave: Field, pixel: float) -> Field:
    return np.clip(0.5 + wave / (2 * np.pi * _WAVES * pixel), 0, 1)


TEXTURES: dict[str, Callable[[Field, Field, float], Field]] = {
    "plain": _plain,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
}

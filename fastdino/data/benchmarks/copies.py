"""Altered copies of any images, to find their originals by: what Copydays has, of images that one has oneself."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fastdino.config import ConfigError
from fastdino.data.benchmarks.copydays import CopySets
from fastdino.data.draws import Purpose, random_bits, uniform
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.source import Room, Source
from fastdino.data.views.reference import joined, pictures

NAME = "synthetic copies"
MAX_ORIGINALS = 157  # as many as Copydays has; the other images are distractors

Alter = Callable[[Image.Image, np.ndarray], Image.Image]
"""An image and 4 random numbers in [0, 1) become its copy; bands that are taken apart get equal numbers."""


def _jpeg(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """JPEG of quality 10."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    return Image.open(buffer)


def _crop(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """Half of the area, anywhere."""
    width, height = (max(1, round(side * 0.5**0.5)) for side in image.size)
    left, top = int(draws[0] * (image.width - width + 1)), int(draws[1] * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _rotate(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """By 10 to 45 degrees to either side, with black corners."""
    degrees = (10 + 35 * draws[0]) * (1 if draws[1] < 0.5 else -1)
    return image.rotate(float(degrees), Image.Resampling.BICUBIC, expand=True)


def _text(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """Two lines of white text on black bars, a fifth of the height each."""
    copy = image.copy()
    pen, bar = ImageDraw.Draw(copy), max(1, image.height // 5)
    for line, draw in enumerate(draws[:2]):
        top = int((line + draw) * (image.height / 2 - bar))
        pen.rectangle((0, top, image.width, top + bar), fill="black")
        pen.text((bar // 4, top), "copied from elsewhere", fill="white", font=ImageFont.load_default(max(4, 0.8 * bar)))
    return copy


def _blur(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """Gaussian, its deviation 2 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(0.02 * min(image.size)))


def _resize(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """To a quarter of each side."""
    return image.resize((max(1, image.width // 4), max(1, image.height // 4)), Image.Resampling.BICUBIC)


def _mirror(image: Image.Image, draws: np.ndarray) -> Image.Image:
    """Left becomes right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


ALTERED: dict[str, Alter] = {
    "rotate": _rotate,
    "crop 50": _crop,
    "text": _text,
    "mirror": _mirror,
    "jpeg 10": _jpeg,
    "resize": _resize,
    "blur": _blur,
}


class AlteredSource:
    """The images of a source after one of ALTERED, a pure function of (seed, index)."""

    def __init__(self, source: Source, alteration: str, seed: int) -> None:
        self.source, self.alteration, self.seed, self.labels = source, alteration, seed, source.labels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """The copy, uint8 (height, width, channels), and the source's label."""
        image, label = self.source.read(index)
        draws = uniform(Purpose.COPIES, self.seed, index, 1 + [*ALTERED].index(self.alteration), 4)
        alter = ALTERED[self.alteration]
        altered = joined([alter(band, draws) for band in pictures(image)])
        return np.ascontiguousarray(altered), label

    def encoded(self, index: int) -> bytes:
        """The copy as a PNG."""
        buffer = io.BytesIO()
        Image.fromarray(self.read(index)[0]).save(buffer, "PNG")
        return buffer.getvalue()

    def label(self, index: int) -> int:
        """As in the source."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """Its original's name, and what was done."""
        return f"{self.source.name(index)} ({self.alteration})"

    def fingerprint(self) -> str:
        """Of the source, and of what was done."""
        return f"{self.source.fingerprint()} {self.alteration} {self.seed}"

    def stamp(self) -> str:
        """Likewise."""
        return f"{self.source.stamp()} {self.alteration} {self.seed}"


def make_copies(source: Source, seed: int = 0) -> CopySets:
    """Copies of up to MAX_ORIGINALS images, drawn by ``seed``; all images of ``source`` are searched, so most may be
    distractors.

    Raises ConfigError for fewer than 2 images.
    """
    if len(source) < 2:
        raise ConfigError(f"--make-copies needs 2 images or more, and there is {len(source)}: name another folder")
    bits = random_bits(Purpose.COPIES, seed, 0, 0, len(source))
    copied = np.sort(np.argsort(bits, kind="stable")[:MAX_ORIGINALS])
    some = Subset(source, copied.tolist())
    blocks: dict[str, Source] = {name: AlteredSource(some, name, seed) for name in ALTERED}
    return CopySets(NAME, source, blocks, dict.fromkeys(blocks, copied.astype(np.int64)))

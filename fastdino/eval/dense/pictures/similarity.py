"""How alike every patch is to the one under a point."""

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.source import Source
from fastdino.eval.dense.pictures.sheets import Cell, draw_pairs, heat, in_colour
from fastdino.eval.dense.tokens import Dense, all_images, shown, tokens_of
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError
from fastdino.eval.pictures import SHEET_ROWS
from fastdino.eval.result import Found, Picture


def cosine_maps(tokens: Tensor, query: Tensor) -> Tensor:
    """(B, rows, columns, D) and (D,) -> (B, rows, columns) fp32 in [-1, 1]: the cosine of each patch with the query."""
    return F.normalize(tokens.float(), dim=-1) @ F.normalize(query.float(), dim=-1)


def patch_under(point: tuple[float, float], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column in a grid of (rows, columns) under (x, y), shares of width and height in [0, 1]."""
    column, row = (min(int(share * count), count - 1) for share, count in zip(point, reversed(grid), strict=True))
    return row, column


class Asked(NamedTuple):
    """Images, and a place in one of them."""

    source: Source
    query: int  # its place in the source
    point: tuple[float, float]  # shares of its width and height
    others: list[int]


class Like(NamedTuple):
    """An image with its map."""

    best: float  # the highest cosine
    place: int  # in the source
    size: tuple[int, int]  # width and height of the image
    pixels: Tensor  # uint8 (C, s, s)
    map: np.ndarray  # (rows, columns)

    def where(self) -> tuple[float, float]:
        """The middle of the patch of the highest cosine, x and y as shares of width and height."""
        rows, columns = self.map.shape
        row, column = divmod(int(self.map.argmax()), columns)
        return (column + 0.5) / columns, (row + 0.5) / rows


@dataclass(frozen=True, kw_only=True)
class Similarity(Dense):
    """A sheet of the cosine of the patch under a point with every patch of its image and of others.

    The image with the point comes first, with a red dot there, then those that hold the patches most like it. --data
    is an image, or images as --data.root of fastdino train takes them but for mixtures; or shapes. They are squeezed to
    --size, by default twice the side of global views.
    """

    kind: ClassVar[str] = "similarity"
    needs: ClassVar[str] = "images"
    controls: ClassVar[tuple[str, ...]] = ()
    zoom: ClassVar[int] = 2

    point: tuple[float, float] = (0.5, 0.5)
    """x and y from the upper left: shares of width and height where neither exceeds 1, else pixels."""
    query: str = ""
    """The image with the point, by its path below --data; default: the first one."""
    num_images: int = 100
    """Images that are looked through, drawn; the sheet shows the seven most alike."""
    smooth: bool = False
    """Enlarge the maps bilinearly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images >= 1, "--num-images", self.num_images, "at least 1", "a count of images")
        require(min(self.point) >= 0, "--point", self.point, "at least 0", "x and y from the upper left")

    def open(self, subject: Subject) -> Asked:
        """The images, and the place that is asked for, which has to lie on its image."""
        self.network(subject)
        source = all_images(self.data, subject.config.data)
        query = self._query(source)
        try:
            height, width = source.read(query)[0].shape[:2]
        except BadImage as error:
            raise EvaluationError(f"{error}: name another one with --query") from error
        x, y = self.point
        if max(x, y) > 1:
            if x >= width or y >= height:
                raise ConfigError(
                    f"--point={x:g} {y:g} lies outside of {source.name(query)}, {width} x {height} pixels"
                )
            x, y = (x + 0.5) / width, (y + 0.5) / height
        others = [place for place in sample(self.seed, self.num_images, len(source)) if place != query]
        return Asked(source, query, (x, y), others)

    def _query(self, source: Source) -> int:
        if not self.query:
            return 0
        found = next((i for i in range(len(source)) if source.name(i) == self.query), None)
        if found is None:
            there = ", ".join(source.name(i) for i in range(min(4, len(source))))
            raise ConfigError(f"--query={self.query!r} is none of the {len(source)} images, such as {there}")
        return found

    def judge(self, subject: Subject, data: Asked) -> Found:
        """Where the patches most alike lie, and the sheet."""
        vit, reading = self.network(subject)
        source, query, point, others = data
        read = tokens_of(vit, reading)
        (asked,) = shown(source, reading.size, 1, [query])
        tokens = read(asked.pixels)
        row, column = patch_under(point, (tokens.shape[1], tokens.shape[2]))
        vector = tokens[0, row, column]
        first = Like(1.0, query, asked.sizes[0], asked.pixels[0], cosine_maps(tokens, vector)[0].cpu().numpy())
        alike: list[tuple[float, int, Like]] = []
        for images in shown(source, reading.size, self.batch, others):
            maps = cosine_maps(read(images.pixels), vector).cpu().numpy()
            for place, size, pixels, cosine in zip(images.indices, images.sizes, images.pixels, maps, strict=True):
                found = Like(float(cosine.max()), place, size, pixels, cosine)
                heapq.heappush(alike, (found.best, -place, found))
                if len(alike) >= SHEET_ROWS:
                    heapq.heappop(alike)
        alike_images = [first, *(found for *_, found in sorted(alike, reverse=True))]
        return Found(
            scores={},
            also={"query": source.name(query), "point": [round(x, 4) for x in point],
                  "alike": [self._told(source, found) for found in alike_images[1:]]},
            protocol=self.read_by(subject),
            data={"images": 1 + len(others), "fingerprint": source.fingerprint()},
            notes=self.remarks(subject),
            pictures=[Picture("", lambda path: draw_alike(path, alike_images, point, self.smooth))],
        )  # fmt: skip

    @staticmethod
    def _told(source: Source, found: Like) -> dict[str, object]:
        x, y = found.where()
        return {"image": source.name(found.place), "cosine": round(found.best, 4), "point": [round(x, 4), round(y, 4)]}


def draw_alike(path: Path, images: list[Like], point: tuple[float, float], smooth: bool = False) -> None:
    """Writes a PNG: of each image above its map; a red dot at ``point``, shares of width and height, of the first.

    All maps have one scale, from the 2nd percentile of the cosines on the sheet to 1.
    """
    low = float(np.quantile(np.concatenate([image.map.ravel() for image in images]), 0.02))
    pairs = []
    for i, image in enumerate(images):
        dot = (point[0] * image.size[0], point[1] * image.size[1]) if i == 0 else None
        title = f"cosine {low:.2f} to 1" if i == 0 else f"up to {image.best:.2f}"
        pixels = in_colour(image.pixels.permute(1, 2, 0).numpy())
        below = Cell(heat(image.map, low, 1), image.size, title, dot, smooth=smooth)
        pairs.append((Cell(pixels, image.size, dot=dot), below))
    draw_pairs(path, pairs)

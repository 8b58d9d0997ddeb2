"""Principal components of the tokens of patches as red, green and blue."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdino.config.errors import require
from fastdino.data.draws import sample
from fastdino.data.sources.source import Source
from fastdino.eval.dense.pictures.sheets import Cell, draw_pairs, in_colour
from fastdino.eval.dense.tokens import Dense, open_images, shown, tokens_of
from fastdino.eval.evaluation import Subject
from fastdino.eval.pictures import SHEET_ROWS
from fastdino.eval.result import Found, Picture

Batches = Callable[[], Iterable[Tensor]]  # (B, rows, columns, D) again at each call
_SAMPLE = 2**20  # patches of which percentiles are taken


class Components(NamedTuple):
    """Three directions."""

    mean: Tensor  # (D,) fp64
    directions: Tensor  # (D, 3) fp64, the one of largest variance first
    explained: float  # share of the variance along them

    def __call__(self, tokens: Tensor) -> Tensor:
        """(.., D) -> (.., 3) fp64."""
        return (tokens.double() - self.mean) @ self.directions


def components(tokens: Iterable[Tensor]) -> Components:
    """Of tokens (n, D), part by part: sums of them are kept, and no token. The largest weight of each is positive.

    Raises ValueError where there is no token.
    """
    count, origin = 0, None
    total = product = torch.zeros((), dtype=torch.float64)
    for part in tokens:
        x = part.double()
        if len(x) and origin is None:
            origin = x[0]  # so that large means cancel nothing
        x = x if origin is None else x - origin
        count, total, product = count + len(x), total + x.sum(0), product + x.T @ x
    if origin is None:
        raise ValueError("no tokens to find components of")
    mean = total / count
    variances, directions = torch.linalg.eigh(product / count - torch.outer(mean, mean))  # the last is the largest
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    explained = variances[-3:].sum() / variances.sum().clamp(min=1e-300)
    return Components(origin + mean, directions * largest.sign(), explained.item())


def foreground(found: Components, batches: Batches) -> Components:
    """The same with its first direction turned so that the patches along the images' borders are below 0 on average."""
    total = 0.0
    for tokens in batches():
        value = found(tokens)[..., 0]
        rim = torch.ones_like(value, dtype=torch.bool)
        rim[:, 1:-1, 1:-1] = False
        total += value[rim].sum().item()
    directions = found.directions.clone()
    directions[:, 0] *= -1 if total > 0 else 1
    return found._replace(directions=directions)


def scale(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(.., 3) -> the same in [0, 1]: from ``low`` (3,) to ``high`` (3,)."""
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def percentiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3) -> the 2nd and 98th percentile of each component, (3,)."""
    return values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)


def colors(tokens: Tensor) -> Tensor:
    """(n, rows, columns, D) -> the same with 3 for D, fp64 in [0, 1]: red, green and blue by principal components.

    Each component from its 2nd to its 98th percentile, the sign of its largest weight positive.
    """
    found = components([tokens.flatten(0, 2)])
    values = found(tokens)
    return scale(values, *percentiles(values.flatten(0, 2)))


class Palette(NamedTuple):
    """How the tokens of a set of images become colours."""

    first: Components | None  # below 0 along whose first direction the background lies
    components: Components
    low: Tensor  # (3,)
    high: Tensor  # (3,)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(.., D) -> (.., 3) fp64 in [0, 1]; a background is black."""
        found = scale(self.components(tokens), self.low, self.high)
        return found if self.first is None else found * self.inside(tokens).unsqueeze(-1)

    def inside(self, tokens: Tensor) -> Tensor:
        """(.., D) -> (..,) bool: what is no background."""
        every = torch.ones(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
        return every if self.first is None else self.first(tokens)[..., 0] > 0


def fit_palette(batches: Batches, num_patches: int, only_foreground: bool) -> Palette:
    """Colours of all images: their components, those of the foreground alone if that is asked for, and their range.

    The images are read twice, for a foreground four times; of more than _SAMPLE patches some tell the range.
    """
    found, none = components(x.flatten(0, 2) for x in batches()), torch.zeros(3)
    palette = Palette(None, found, none, none)
    if only_foreground:
        palette = palette._replace(first=foreground(found, batches))
        palette = palette._replace(components=components(x[palette.inside(x)] for x in batches()))
    step = max(1, num_patches // _SAMPLE)
    values = torch.cat([palette.components(x[palette.inside(x)][::step]) for x in batches()])
    low, high = percentiles(values)
    return palette._replace(low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Pca(Dense):
    """A sheet of images beside the three principal components of their patches, as red, green and blue.

    What is alike has one colour in all images, because the components are those of all. --data is an image, or images
    as --data.root of fastdino train takes them but for mixtures; or shapes. They are squeezed to --size, by default
    twice the side of global views.
    """

    kind: ClassVar[str] = "pca"
    needs: ClassVar[str] = "images"
    controls: ClassVar[tuple[str, ...]] = ()
    zoom: ClassVar[int] = 2

    num_images: int = 100
    """Images whose components are found, drawn; the sheet shows eight of them."""
    foreground: bool = False
    """Components of the foreground alone: the side of the first component of all on which the borders do not lie."""
    smooth: bool = False
    """Enlarge the colours bilinearly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images >= 1, "--num-images", self.num_images, "at least 1", "a count of images")

    def open(self, subject: Subject) -> Source:
        """The images."""
        self.network(subject)
        return open_images(self.data, subject.config.data, self.num_images, self.seed)

    def judge(self, subject: Subject, data: Source) -> Found:
        """The share of the variance that the components explain, and the sheet."""
        vit, reading = self.network(subject)
        read = tokens_of(vit, reading)
        num_patches = len(data) * (reading.size // vit.patch_size) ** 2

        def batches() -> Iterator[Tensor]:
            return (read(images.pixels) for images in shown(data, reading.size, self.batch))

        palette = fit_palette(batches, num_patches, self.foreground)

        def sheet(path: Path) -> None:
            some = sample(self.seed, SHEET_ROWS, len(data))
            (images,) = shown(data, reading.size, SHEET_ROWS, some)
            drawn = palette(read(images.pixels)).cpu().numpy()
            pairs = []
            for pixels, colour, size in zip(images.pixels, drawn, images.sizes, strict=True):
                image = in_colour(pixels.permute(1, 2, 0).numpy())
                pairs.append((Cell(image, size), Cell(colour, size, smooth=self.smooth)))
            draw_pairs(path, pairs)

        return Found(
            scores={},
            also={"explained": round(palette.components.explained, 4)},
            protocol={**self.read_by(subject), "foreground": self.foreground},
            data={"images": len(data), "fingerprint": data.fingerprint()},
            notes=self.remarks(subject),
            pictures=[Picture("", sheet)],
        )

"""How many directions the features use: RankMe, LiDAR and alpha-ReQ, which need no label."""

import functools
import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.folder import split_folders
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.source import Room, Source
from fastdino.data.views import Write, implementation, new_views, sample_params
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features
from fastdino.eval.pictures import new_figure
from fastdino.eval.result import Found, Picture
from fastdino.eval.unlabelled.jackknife import jackknife

FIRST = 3  # place in the spectrum, from 1, where alpha-ReQ's fit begins
LAST = 0.6  # and the share of D where it ends
RIDGE = 1e-4  # added to LiDAR's scatter within images
NOISE = 1e-12  # of the largest eigenvalue; what is below it is the rounding of a zero


def rankme(features: Tensor) -> float:
    """exp of the entropy of the singular values, divided by their sum, of (n, D) features: from 1 to min(n, D).

    It is n for n orthonormal rows and 1 for rows that are all alike. The features are not centered. Figures of one n
    alone compare: the paper takes 25,600 images, and below 10 D the count of images bounds the answer.

    Source: Garrido et al. 2023, RankMe, equation 1, whose 1e-7 beside each share only keeps the logarithm finite.
    """
    return _perplexity(torch.linalg.svdvals(features.double()))


def lidar(views: Tensor, ridge: float = RIDGE) -> float:
    """RankMe of what tells images apart and their views do not: from 1 to min(n - 1, D), of (n, q, D) features.

    q views of each of n images are a class. The eigenvalues of Sw^-1/2 Sb Sw^-1/2 stand in the place of the singular
    values, with Sb the covariance of the images' means, divided by n - 1, and Sw the scatter of the views about them,
    divided by n (q - 1), plus ``ridge`` times the identity.

    Source: Thilak et al. 2023, LiDAR, whose 1e-8 beside each share only keeps the logarithm finite. It takes 1,000
    images, 50 views of each and this ridge.
    """
    n, q, width = views.shape
    means = views.double().mean(dim=1)
    apart, within = means - means.mean(dim=0), (views - means[:, None]).flatten(0, 1)
    scatter = within.T @ within / (n * (q - 1)) + ridge * torch.eye(width, dtype=torch.float64, device=views.device)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), apart.T / (n - 1) ** 0.5, upper=False)
    return _perplexity(torch.linalg.svdvals(white).square())


def spectrum(features: Tensor) -> Tensor:
    """(D,) fp64 eigenvalues of the covariance of (n, D) features, the largest first; rounding errors are zeros."""
    centered = features.double() - features.double().mean(dim=0)
    values = torch.linalg.eigvalsh(centered.T @ centered / len(features)).flip(0)
    return values.where(values > NOISE * features.double().square().sum() / len(features), 0.0)


def alpha_req(values: Tensor) -> float:
    """By which power a :func:`spectrum` falls: alpha of eigenvalues that go as i ** -alpha; NaN without two of them.

    A line through (ln i, ln value) by least squares, i from 3 to 0.6 D, zeros left out. The paper finds features good
    with an alpha near 1. Above it few directions hold all of the variance, below it there is noise in all.

    Source: Agrawal et al. 2022, alpha-ReQ.
    """
    x, y = _line(values)
    if len(x) < 2:
        return float("nan")
    x = x - x.mean()
    return float(-(x @ y) / (x @ x))


class Views(Subset):
    """``count`` global views of each of some images, as training makes them, one image after the other.

    Which views an image has is a pure function of the seed and its place in the source.
    """

    def __init__(self, source: Source, places: list[int], count: int, config: ViewsConfig, seed: int) -> None:
        super().__init__(source, [place for place in places for _ in range(count)])
        self.count, self.config, self.seed = count, replace(config, num_local=0), seed

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """uint8 (size, size, C), and the image's class."""
        image, label = super().read(index, room)
        draw, which = divmod(index % self.count, 2)  # the two global views differ in blur and solarization
        height, width, channels = image.shape
        params = sample_params(self.seed, draw, self.indices[index], self.config, (width, height))
        view = new_views(self.config, channels)["global"][:1]
        _write(channels)(image, params[which : which + 1], {"global": view})
        return view[0].permute(1, 2, 0).numpy(), label

    def _of(self, source: str) -> str:
        drawn = f"{super()._of(source)} {self.count} {self.config} {self.seed}"
        return hashlib.sha256(drawn.encode()).hexdigest()[:16]


@functools.cache
def _write(channels: int) -> Write:
    return implementation("auto", channels)[0]


class Sample(NamedTuple):
    """Images of a data set that are looked at, as they are and in several views."""

    whole: Source
    views: Views | None
    total: int
    """Images of the data set."""


@dataclass(frozen=True, kw_only=True)
class Rank(Evaluation):
    """How many directions the features use, without labels: RankMe, LiDAR and alpha-ReQ.

    RankMe is the exponential of the entropy of the features' singular values: 1 where all features are alike, D where
    all D directions are used alike. LiDAR counts those directions in which images differ and views of one image do not:
    views are made as in training. alpha-ReQ is how fast the spectrum falls. --data takes any images; labels are not
    needed, and of train/ and its like the images of train/ are taken. Figures compare between backbones of one width,
    on as many images.
    """

    kind: ClassVar[str] = "rank"
    needs: ClassVar[str] = "any images"
    controls: ClassVar[tuple[str, ...]] = ("random_init",)

    images: int = 25_600
    """Images that are drawn for RankMe and alpha-ReQ, RankMe's paper's count; of fewer all are taken."""
    view_images: int = 500
    """Images among them that LiDAR sees views of; 1,000 in its paper."""
    views: int = 10
    """Views of each; 0 leaves LiDAR out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.images >= 2, "--images", self.images, "at least 2", "one image has one direction")
        require(self.view_images >= 2, "--view-images", self.view_images, "at least 2", "they are told apart")
        possible = self.views == 0 or self.views >= 2
        require(possible, "--views", self.views, "2 or more, or 0", "LiDAR asks how views of an image differ")

    def open(self, subject: Subject) -> Sample:
        """The images that are looked at."""
        config = subject.config
        if self.data == "shapes":
            whole = bank_and_test("shapes", config.data).bank
        else:
            whole = open_part(split_folders(self.data).get("train", self.data), config.data)
        if len(whole) < 2:
            raise EvaluationError(f"{self.data} holds one image, and one image has one direction: take more")
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.seed))
        places = order[: self.images].sort().values.tolist()
        seen = order[: self.view_images].sort().values.tolist()
        how = replace(config.views, global_size=self.reading(config).size)
        shown = Views(whole, seen, self.views, how, self.seed) if self.views else None
        return Sample(whole if len(places) == len(whole) else Subset(whole, places), shown, len(whole))

    def judge(self, subject: Subject, data: Sample) -> Found:
        """rankme, lidar and alpha_req."""
        x = self.features(subject, data.whole).vectors.double()
        if len(x) < 2:
            raise EvaluationError(f"one image of {self.data} can be read, and one image has one direction")
        if not x.isfinite().all():
            raise EvaluationError("the features are not finite: the weights hold infinities or what is not a number")
        values = spectrum(x)
        scores = {"rankme": jackknife(lambda some: _perplexity(_singular(x[some])), len(x), rankme(x))}
        notes = []
        if len(x) < 10 * x.shape[1]:
            notes.append(
                f"RankMe of {len(x)} images, fewer than 10 * {x.shape[1]} directions, is bounded by their number: "
                "compare it with figures of as many images alone"
            )
        if not values.any():
            notes.append("all images have the same features: they are alike, or the backbone has collapsed")
        shown: dict[str, Any] = {"views": self.views}
        counts = {"images": len(data.whole), "of": data.total, "unreadable": len(data.whole) - len(x)}
        if data.views is not None:
            seen = _grouped(replace(self, crop_ratio=1.0).features(subject, data.views), self.views)
            scores["lidar"] = jackknife(lambda some: lidar(seen[some]), len(seen))
            counts["view_images"] = len(seen)
            shown |= {"ridge": RIDGE, "view": asdict(data.views.config)}
            if len(seen) <= x.shape[1]:
                notes.append(f"LiDAR of {len(seen)} images is {len(seen) - 1} at most: take more than {x.shape[1]}")
        scores["alpha_req"] = jackknife(lambda some: alpha_req(spectrum(x[some])), len(x), alpha_req(values))
        return Found(
            scores=scores,
            protocol=self.protocol(subject) | {"fitted": [FIRST, LAST], "seed": self.seed} | shown,
            data=counts,
            also={"directions": x.shape[1]},
            notes=notes,
            arrays={"spectrum": values.cpu().numpy()},
            pictures=[Picture("", functools.partial(draw_spectrum, values=values.cpu()))],
        )


def draw_spectrum(path: Path, values: Tensor) -> None:
    """Writes a PNG with a :func:`spectrum` on logarithmic axes and the line whose slope is alpha-ReQ's."""
    figure = new_figure(6, 4)
    ax = figure.subplots()
    there = values > 0
    ax.plot(torch.arange(1, len(values) + 1)[there], values[there], ".-", label="covariance of the features")
    x, y = _line(values)
    if len(x) > 1:
        alpha = alpha_req(values)
        fitted = (y.mean() - alpha * (x - x.mean())).exp()
        ax.plot(x.exp(), fitted, "--", label=f"alpha {alpha:.2f}")
    if there.any():
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_xlabel("direction")
    ax.set_ylabel("eigenvalue")
    ax.grid(visible=True, which="both", alpha=0.3)
    ax.legend()
    figure.canvas.print_png(path)


def _grouped(features: Features, count: int) -> Tensor:
    """(n, count, D): the views of each image of which all could be read. Raises EvaluationError for fewer than two."""
    image = features.places // count
    whole = image.bincount() == count
    if whole.sum() < 2:
        raise EvaluationError("LiDAR needs views of two images or more: nearly none can be read")
    return features.vectors[whole[image]].unflatten(0, (-1, count))


def _singular(features: Tensor) -> Tensor:
    """Singular values of (n, D) fp64 features to eight digits, at a fraction of the cost."""
    return torch.linalg.eigvalsh(features.T @ features).clamp_min(0).sqrt()


def _line(values: Tensor) -> tuple[Tensor, Tensor]:
    """(ln i, ln value) of the places that alpha-ReQ fits."""
    places = torch.arange(FIRST, int(LAST * len(values)) + 1, device=values.device)
    fitted = values[places - 1]
    return places[fitted > 0].double().log(), fitted[fitted > 0].log()


def _perplexity(values: Tensor) -> float:
    """exp of the entropy of values >= 0 divided by their sum; 1 where all are zero."""
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())

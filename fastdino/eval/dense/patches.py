"""What the tokens of patches know: a linear probe tells what each patch shows, and a picture gives them colours.

To find where an object is shows little: random features do it, and raw pixels nearly. To find of which class it is
needs what training teaches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastdino.config import Config
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import BANK_SEED, TEST_SEED
from fastdino.data.sources.shapes import CLASSES, ShapesSource, check_shows_shapes
from fastdino.data.views import normalize
from fastdino.eval.controls import fresh
from fastdino.eval.dense.pictures.pca import colors
from fastdino.eval.dense.pictures.sheets import Cell, class_colours, draw_cells
from fastdino.eval.dense.segment.miou import add_up, confusion
from fastdino.eval.dense.tokens import Dense, Read, tokens_of
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import Reading, our_vit
from fastdino.eval.intervals import Shares, normal
from fastdino.eval.pictures import SHEET_ROWS
from fastdino.eval.result import Found, Picture

NUM_CLASSES = 1 + len(CLASSES)  # 0 is the background, an object's class its label + 1
RIDGE = 1e-3  # penalty of a weight, in variances of its feature


class Patches(NamedTuple):
    """Images whose patches are labelled."""

    images: Tensor  # uint8 (n, 3, s, s)
    classes: Tensor  # int64 (n, rows, columns)


class Probe(NamedTuple):
    """Linear scores of the classes."""

    weight: Tensor  # (D, C) fp64
    bias: Tensor  # (C,) fp64

    def __call__(self, tokens: Tensor) -> Tensor:
        """(.., D) -> (..,), the class with the highest score."""
        return (tokens.double() @ self.weight + self.bias).argmax(dim=-1)


def render(num_images: int, size: int, patch: int, seed: int) -> Patches:
    """Shapes of ``size`` pixels. A patch is of the object's class where that covers more than half of its pixels."""
    source = ShapesSource(num_images, size, seed)
    images, masks = [], []
    for index in tqdm(range(num_images), desc="rendering", unit="image", leave=False, disable=None):
        images.append(source.read(index)[0])
        masks.append(source.mask(index))
    covered = F.avg_pool2d(torch.from_numpy(np.stack(masks)).double().unsqueeze(1), patch).squeeze(1) > 0.5
    labels = torch.tensor([source.label(index) for index in range(num_images)]).view(-1, 1, 1)
    return Patches(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.where(covered, 1 + labels, 0))


def fit_probe(batches: Iterator[tuple[Tensor, Tensor]], counts: Tensor) -> Probe:
    """Ridge regression of one-hot classes in closed form, every class with the same weight; in fp64.

    Args:
        batches: (n, D) tokens with their int64 (n,) classes. Sums of them are kept, and no token.
        counts: (C,) how many patches of each class there are in all.

    The background would else be answered nearly everywhere: it fills most of the patches.
    """
    share = 1 / (counts.clamp(min=1).double() * (counts > 0).sum())  # of a patch, by its class; all together 1
    origin: Tensor | None = None  # the first token: of a feature that never changes, every sum is exactly 0
    mean = product = by_class = torch.zeros((), dtype=torch.float64)
    for tokens, classes in batches:
        x, share = tokens.double(), share.to(tokens.device)
        origin = x[0] if origin is None else origin
        x = x - origin
        weighted = x * share[classes].unsqueeze(1)
        mean = mean + weighted.sum(0)  # (D,)
        product = product + weighted.T @ x  # (D, D)
        by_class = by_class + weighted.T @ F.one_hot(classes, len(counts)).double()  # (D, C)
    assert origin is not None, "no patches to learn from"
    prior = share * counts.to(share)  # (C,)
    covariance = product - torch.outer(mean, mean)
    penalty = RIDGE * covariance.diagonal().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + penalty.diag(), by_class - torch.outer(mean, prior))
    return Probe(weight, prior - (origin + mean) @ weight)


def raw_pixels(patch: int, reading: Reading) -> Read:
    """Every pixel of a patch as the network is shown it."""
    return lambda images: F.pixel_unshuffle(normalize(images, reading.normalize), patch).movedim(1, -1)


def draw_patches(path: Path, shown: Patches, tokens: Tensor, told: Tensor) -> None:
    """Writes a PNG with a row per image: the image, its tokens as :func:`colors`, what the probe tells, what is true.

    Args:
        path: where to.
        shown: n images.
        tokens: (n, rows, columns, D).
        told: (n, rows, columns) classes by the probe.
    """
    of_class = class_colours(NUM_CLASSES, first_is_nothing=True)
    columns = shown.images.permute(0, 2, 3, 1), colors(tokens).cpu(), of_class[told], of_class[shown.classes]
    size = shown.images.shape[3], shown.images.shape[2]
    rows: list[list[Cell]] = []
    for pictures in zip(*columns, strict=True):
        titles = ("image", "tokens", "probe", "truth") if not rows else ("",) * 4
        rows.append([Cell(np.asarray(x), size, title) for x, title in zip(pictures, titles, strict=True)])
    draw_cells(path, rows, inches=1.3)


@dataclass(frozen=True, kw_only=True)
class PatchProbe(Dense):
    """Patch mIoU in percent of a linear probe on rendered shapes, as JSON with its baselines; and a picture.

    The probe tells from a patch's token which of 12 classes of object it shows, or that it shows background. The same
    is done with the tokens of random initialisations of the backbone and with raw pixels: what exceeds these was
    learned. The picture shows tokens in colours, by their principal components.
    """

    kind: ClassVar[str] = "patches"
    needs: ClassVar[str] = "nothing: shapes are rendered"
    controls: ClassVar[tuple[str, ...]] = ()

    data: str = "shapes"
    """Only shapes: of a folder of images it is not known what each patch shows."""
    size: int | None = None
    """Side in pixels at which shapes are rendered; default: data.image_size, less what is no whole patch."""
    num_images: int = 1200
    """Images that the probe learns from; half as many are judged."""
    num_random: int = 3
    """Random initialisations that are averaged; 0 leaves them out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        reason = "of a folder of images it is not known what each patch shows"
        require(self.data == "shapes", "--data", self.data, "shapes", reason)
        least = 2 * len(CLASSES)
        require(self.num_images >= least, "--num-images", self.num_images, f"at least {least}", "every class is judged")
        require(self.num_random >= 0, "--num-random", self.num_random, "0 or more", "a count of initialisations")

    def asked(self, config: Config) -> int:
        """The size at which shapes are rendered for training: none is cropped or resized."""
        patch = config.model.patch_size
        return self.size or max(patch, config.data.image_size // patch * patch)

    def open(self, subject: Subject) -> tuple[Patches, Patches]:
        """Images to learn from, and others to judge."""
        check_shows_shapes(subject.config.data)
        vit, reading = self.network(subject)
        train = render(self.num_images, reading.size, vit.patch_size, BANK_SEED)
        return train, render(self.num_images // 2, reading.size, vit.patch_size, TEST_SEED)

    def judge(self, subject: Subject, data: tuple[Patches, Patches]) -> Found:
        """patch_miou, the same of the baselines, and a sheet."""
        train, test = data
        vit, reading = self.network(subject)
        found, told = self.probe(tokens_of(vit, reading), train, test)
        scores = {"patch_miou": found.score()}
        if self.num_random:
            starts = [fresh(vit, subject.config.model, reading.size, seed) for seed in range(self.num_random)]
            each = [self.probe(tokens_of(our_vit(x, "patches"), reading), train, test)[0].value() for x in starts]
            scores["patch_miou_random_init"] = normal(each, "random starts")
        scores["patch_miou_raw_pixels"] = self.probe(raw_pixels(vit.patch_size, reading), train, test)[0].score()

        def draw(path: Path) -> None:
            shown = Patches(*(x[:SHEET_ROWS] for x in test))
            draw_patches(path, shown, tokens_of(vit, reading)(shown.images), told[:SHEET_ROWS])

        return Found(
            scores=scores,
            protocol=self.read_by(subject),
            data={"classes": NUM_CLASSES, "train": len(train.images), "test": len(test.images)},
            notes=self.remarks(subject),
            shares=found,
            pictures=[Picture("", draw)],
        )

    def probe(self, read: Read, train: Patches, test: Patches) -> tuple[Shares, Tensor]:
        """What each image of ``test`` adds to the mean IoU over all patches, of a probe that learned from ``train``;
        and what it tells, (n, rows, columns)."""
        counts = train.classes.flatten().bincount(minlength=NUM_CLASSES)
        probe = fit_probe(self._batches(read, train), counts)
        told = torch.cat([probe(tokens).cpu() for tokens, _ in self._batches(read, test)]).view_as(test.classes)
        every = zip(test.classes, told, strict=True)
        _, shares = add_up((f"shapes {TEST_SEED}/{i}", confusion(*x, NUM_CLASSES)) for i, x in enumerate(every))
        return shares, told

    def _batches(self, read: Read, patches: Patches) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, D) tokens and their (n,) classes, on the tokens' device."""
        starts = range(0, len(patches.images), self.batch)
        for start in tqdm(starts, desc="patches", unit="batch", leave=False, disable=None):
            images, classes = (x[start : start + self.batch] for x in patches)
            tokens = read(images).flatten(0, 2)
            yield tokens, classes.flatten().to(tokens.device)

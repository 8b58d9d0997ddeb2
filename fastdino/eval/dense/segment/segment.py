"""What each pixel shows, told from the tokens of frozen patches, and judged by mean intersection over union."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdino.config.errors import require
from fastdino.data.benchmarks.masks import VOID, Masked, MaskedSets, open_classes
from fastdino.data.draws import sample
from fastdino.data.views.evaluation import nearest
from fastdino.eval.dense.pictures.sheets import Cell, class_colours, draw_cells, in_colour
from fastdino.eval.dense.segment.clusters import fit_clusters, k_means
from fastdino.eval.dense.segment.in_context import collect, in_context
from fastdino.eval.dense.segment.linear import Recipe, enlarged, fit_head
from fastdino.eval.dense.segment.miou import add_up, confusion, overlaps
from fastdino.eval.dense.tokens import Dense, Read, shown, tokens_of
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError
from fastdino.eval.intervals import Shares
from fastdino.eval.pictures import SHEET_ROWS
from fastdino.eval.result import Found, Picture

Tell = Callable[[Tensor], Tensor]  # tokens (B, rows, columns, D) -> scores of the classes (B, rows, columns, C)
_BACKGROUND = ("background", "0")


class Told(NamedTuple):
    """An image, what its pixels are and what they are told to be."""

    place: int
    pixels: Tensor  # uint8 (C, s, s)
    truth: np.ndarray  # uint8 (height, width)
    told: np.ndarray  # uint8 (height, width)


def tell_images(
    read: Read, tell: Tell, source: Masked, size: int, batch: int, indices: list[int] | None = None
) -> Iterator[Told]:
    """Every image of ``source``, or those at ``indices``, with the class of each of its pixels.

    Scores of patches are enlarged bilinearly to the side at which the network sees the image; the class with the
    highest is taken, and goes to the pixels of the image by the nearest.
    """
    for images in shown(source, size, batch, indices, masks=True):
        scores = tell(read(images.pixels))
        for i, mask in enumerate(images.masks):
            classes = enlarged(scores[i : i + 1].float(), size, size)[0].argmax(0).to(torch.uint8).cpu().numpy()
            yield Told(images.indices[i], images.pixels[i], mask, nearest(classes, *mask.shape))


def count(told: Iterable[Told], source: Masked) -> tuple[Tensor, Shares]:
    """The confusion matrix of all pixels, (C, C) int64, and what each image adds to the mIoU: :func:`add_up`."""
    classes = len(source.classes)
    every = ((x.place, confusion(torch.from_numpy(x.truth), torch.from_numpy(x.told), classes)) for x in told)
    return add_up((source.name(place), found) for place, found in every)


@dataclass(frozen=True, kw_only=True)
class Segment(Dense):
    """Mean intersection over union (mIoU) in percent of classes told pixel by pixel, with the backbone frozen.

    --data is a folder of images and masks whose values are classes (images/ and masks/ with equal stems, or masks
    beside their images), PASCAL VOC, ADE20K; or shapes. Images are squeezed to --size, by default twice the side of
    global views; masks are judged as they are.

    in-context: a patch is what the training patches nearest to it are, without any training. linear: batch
    normalisation and one linear layer, trained. cluster: k-means without labels, whose clusters are then named after
    the classes of training pixels.
    """

    kind: ClassVar[str] = "segment"
    needs: ClassVar[str] = "images and masks"
    zoom: ClassVar[int] = 2  # of the side of global views: more patches tell more

    method: Literal["in-context", "linear", "cluster"] = "in-context"
    """How classes are told from patches."""
    num_images: int | None = None
    """At most so many images to learn from and so many to judge, drawn; default: all."""
    neighbours: int = 30
    """in-context: training patches that are asked."""
    temperature: float = 0.02
    """in-context: a neighbour weighs exp(cosine / temperature)."""
    memory: int = 100_000
    """in-context and cluster: training patches that are kept, equally many of each image."""
    steps: int | None = None
    """linear: steps of 16 images; default: 100 epochs, at most 40,000 steps for over 100 classes, else 10,000."""
    lr: float = 1e-3
    """linear: learning rate of AdamW, falling to 0 in a line."""
    clusters: int | None = None
    """cluster: as many as classes by default, each named after one (Hungarian algorithm); of another count each is
    named after the class that most of its pixels have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images is None or self.num_images >= 1, "--num-images", self.num_images, "at least 1")
        require(self.neighbours >= 1, "--neighbours", self.neighbours, "at least 1", "a count of patches")
        require(self.temperature > 0, "--temperature", self.temperature, "positive", "it divides a cosine")
        require(self.memory >= 1, "--memory", self.memory, "at least 1", "a count of patches")
        require(self.steps is None or self.steps >= 1, "--steps", self.steps, "at least 1", "a head has to be trained")
        require(self.lr > 0, "--lr", self.lr, "positive", "a learning rate")
        require(self.clusters is None or self.clusters >= 2, "--clusters", self.clusters, "at least 2")

    def open(self, subject: Subject) -> MaskedSets:
        """Images to learn from and images to judge."""
        self.network(subject)
        sets = open_classes(self.data, subject.config.data, self.num_images, self.seed)
        if self.method == "cluster":
            k_means()
            count, least = self.clusters, len(sets.train.classes)
            require(count is None or count >= least, "--clusters", count, f"at least {least}", "the classes there are")
        return sets

    def judge(self, subject: Subject, data: MaskedSets) -> Found:
        """miou, the IoU of each class, and a sheet."""
        vit, reading = self.network(subject)
        train, test, rule = data
        classes, read = test.classes, tokens_of(vit, reading)
        tell, protocol = self.learn(read, train, reading.size, vit.patch_size)
        matrix, shares = count(tell_images(read, tell, test, reading.size, self.batch), test)
        both, union = overlaps(matrix)
        iou = {name: 100 * b / u for name, b, u in zip(classes, both.tolist(), union.tolist(), strict=True) if u}
        worst = min(iou, key=lambda name: iou[name])

        def sheet(path: Path) -> None:
            some = sample(self.seed, SHEET_ROWS, len(test))
            draw_told(path, test, list(tell_images(read, tell, test, reading.size, SHEET_ROWS, some)))

        return Found(
            scores={"miou": shares.score()},
            also={
                "pixel_accuracy": round(100 * matrix.diagonal().sum().item() / matrix.sum().item(), 4),
                "worst_class": [worst, round(iou[worst], 4)],
                "iou": {name: round(x, 4) for name, x in iou.items()},
            },
            protocol={**self.read_by(subject), "method": self.method, **protocol},
            data={"train": len(train), "test": len(test), "classes": len(classes), "rule": rule,
                  "fingerprint": test.fingerprint()},
            notes=self.remarks(subject),
            shares=shares,
            arrays={"confusion": matrix.numpy()},
            pictures=[Picture("", sheet)],
        )  # fmt: skip

    def learn(self, read: Read, train: Masked, size: int, patch: int) -> tuple[Tell, dict[str, Any]]:
        """What tells classes from tokens, and what it was made by."""
        if self.method == "linear":
            epochs = 100 * max(1, len(train) // 16)
            recipe = Recipe(self.steps or min(epochs, 40_000 if len(train.classes) > 100 else 10_000), self.lr)
            return fit_head(read, train, size, recipe, self.seed), recipe._asdict()
        examples = collect(read, train, size, patch, batch=self.batch, most=self.memory, seed=self.seed)
        if not len(examples.tokens):
            raise EvaluationError("the masks of the images to learn from are of no class at all")
        made_by: dict[str, Any] = {"patches": len(examples.tokens)}
        if self.method == "cluster":
            num_clusters = self.clusters or len(train.classes)
            match = "hungarian" if num_clusters == len(train.classes) else "many to one"
            return fit_clusters(examples, num_clusters, self.seed), made_by | {"clusters": num_clusters, "match": match}
        made_by |= {"neighbours": self.neighbours, "temperature": self.temperature}
        return lambda tokens: in_context(tokens, examples, self.neighbours, self.temperature), made_by


def draw_told(path: Path, source: Masked, images: list[Told]) -> None:
    """Writes a PNG with a row per image: the image, what is told and what is true, in colours of the classes.

    Pixels of no class are white; of a background black.
    """
    classes = source.classes
    colours = class_colours(len(classes), classes[0] in _BACKGROUND)
    rows: list[list[Cell]] = []
    seen: set[int] = set()
    for image in images:
        height, width = image.truth.shape
        titles = ("image", "told", "truth") if not rows else ("", "", "")
        truth = np.minimum(image.truth, len(classes))  # VOID is the last colour
        cells = in_colour(image.pixels.permute(1, 2, 0).numpy()), colours[image.told], colours[truth]
        rows.append([Cell(x, (width, height), title) for x, title in zip(cells, titles, strict=True)])
        seen |= {*np.unique(image.truth).tolist(), *np.unique(image.told).tolist()} - {VOID}
    draw_cells(path, rows, inches=1.9, legend=[(classes[i], colours[i]) for i in sorted(seen)])

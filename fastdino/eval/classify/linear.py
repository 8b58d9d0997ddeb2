"""Linear classification of frozen features: many heads in one pass, one of them chosen on held-out training images."""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.data.loader import augmented_batches
from fastdino.data.makers import Augmented
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.source import Room, Source
from fastdino.data.views import normalize
from fastdino.data.views.supervised import RandomView
from fastdino.eval.classify.calibration import Balance, Remedy, with_calibration
from fastdino.eval.classify.classification import Classification, held_out
from fastdino.eval.classify.heads import RATES, Batch, Picked, Training, best_on_held_out, best_on_test
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError, Features, Tokens, device_and_dtype, evaluating, reader
from fastdino.eval.intervals import wilson
from fastdino.eval.result import Found
from fastdino.model.vit import ViT
from fastdino.model.weights.files import read
from fastdino.model.weights.form import some

BATCH, STEPS, EPOCHS = 1024, 12_500, 100  # of DINOv2 on ImageNet; of fewer images, no more epochs than that
V1_RATE = 1e-3
V1_FOUR_BLOCKS = 384  # the width up to which DINO v1's heads read the CLS tokens of four blocks


@dataclass(frozen=True, kw_only=True)
class Linear(Classification):
    """Linear classifiers on frozen features, trained together; the one that is best on held-out images is judged.

    --data is as for knn. A tenth of the bank is held out to choose among learning rates, blocks and pooling; then the
    chosen classifier, trained on the whole bank, tells the test images. published_style is the best on the test images,
    as papers report it. --published v1 or v2 is the protocol of DINO or DINOv2 in full, with that choice.
    """

    kind: ClassVar[str] = "linear"

    views: Literal["cached", "live"] = "cached"
    """cached: every epoch sees the same features. live: of random crops and flips, a pass of the backbone per epoch."""
    published: Literal["none", "v1", "v2"] = "none"
    """v1: one head, 100 epochs of live views, the best epoch on the test images. v2: 52 heads, 12,500 steps of live
    views, the best head on the test images."""
    head: Path | None = None
    """A released classifier (dino_*_linearweights.pth, dinov2_*_head.pth) to judge, without training one."""
    balance: Balance = "none"
    """weights: every class weighs the same in the loss. logit-adjust: the logarithm of a class's share of the bank is
    taken off its logit. With either, the head is chosen by balanced accuracy."""
    rates: tuple[float, ...] = RATES
    """Learning rates that are tried, for a batch of 256."""
    steps: int | None = None
    """Of training; default: 100 epochs, 12,500 at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.rates) > 0 and min(self.rates) > 0, "--rates", self.rates, "positive", "steps of a descent")
        require(self.steps is None or self.steps >= 1, "--steps", self.steps, "at least 1", "a count of batches")
        usual = {"views": "cached", "rates": RATES, "steps": None, "balance": "none", "published": "none"}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if self.head is not None and changed and (changed, self.balance) != (["balance"], "logit-adjust"):
            raise ConfigError(f"--head names a classifier that is trained already: leave out --{changed[0]}")
        if self.published != "none" and len(changed) > 1:
            raise ConfigError(f"--published {self.published} is a whole protocol: leave out --{changed[0]}")

    def open(self, subject: Subject) -> Sets:
        """Bank and test. Raises ConfigError and WeightsError also for a released head that does not fit."""
        sets = super().open(subject)
        if self.head is not None:
            weight, _, _ = released(self.head, subject.backbone)
            if len(weight) != (classes := len(sets.test.labels)):
                raise ConfigError(
                    f"--head {self.head} tells {len(weight)} classes, and {self.data} has {classes}: it needs images "
                    "of the classes that it was trained on, whose order is that of their folders' names"
                )
        return sets

    def baseline_subjects(self, subject: Subject, found: Found) -> Iterator[tuple[str, Subject]]:
        """None of a head that was trained on one backbone."""
        return iter(()) if self.head is not None else super().baseline_subjects(subject, found)

    @property
    def live(self) -> bool:
        """Whether training images are seen by random views."""
        return self.published != "none" or self.views == "live"

    def judge(self, subject: Subject, data: Sets) -> Found:
        """accuracy is that of the chosen head; published_style that of the best on the test images."""
        tokens = tokens_of(subject.backbone)
        if self.live or self.head is not None:
            bank, test = labels_of(data.bank), self.features(subject, data.test, tokens)
        else:
            bank, test = self.both(subject, data, tokens)
        remedy = Remedy.of(self.balance, bank.labels.cpu(), len(data.bank.labels))
        protocol = self.protocol(subject, tokens) | {"balance": self.balance}
        if self.head is not None:
            logits = told_by(released(self.head, subject.backbone), test.vectors) + remedy.shift.to(test.vectors)
            picked, scores = Picked(logits, {}, 0.0), {}
            protocol["head"] = self.head.name
        else:
            training = self.training(subject.backbone, test.vectors.shape[1], len(bank.labels))
            picked = self._picked(subject, data, (bank, test), training, remedy)
            protocol |= training._asdict() | {"parts": [*training.parts], "views": "live" if self.live else "cached"}
            protocol |= {"published": self.published, "chosen_on": "held-out" if self.published == "none" else "test"}
            scores = {"published_style": wilson(round(picked.best / 100 * len(test.labels)), len(test.labels))}
        predictions = self.predictions(data, bank, test, picked.logits.argmax(1))
        found = self.found(data, predictions, protocol, scores=scores, also=picked.also, notes=picked.notes)
        return with_calibration(found, picked.logits, test.labels, picked.temperature)

    def training(self, backbone: nn.Module, width: int, num_images: int) -> Training:
        """How heads are trained on features of ``width`` of so many images."""
        parts, batch = parts_of(backbone, width), min(BATCH, num_images)
        epoch = math.ceil(num_images / batch)
        if self.published == "v1":
            name = "4 blocks" if getattr(backbone, "num_features", 0) <= V1_FOUR_BLOCKS else "1 block + mean"
            parts = {name: parts[name]} if name in parts else parts
            return Training(parts, (V1_RATE,), batch, EPOCHS * epoch, epoch, self.seed, by_epoch=True)
        steps = STEPS if self.published == "v2" else self.steps or min(STEPS, EPOCHS * epoch)
        return Training(parts, self.rates, batch, steps, epoch, self.seed)

    def _picked(
        self, subject: Subject, data: Sets, sets: tuple[Features, Features], training: Training, remedy: Remedy
    ) -> Picked:
        bank, test = sets
        batches = self._live(subject, data.bank, training) if self.live else cached(bank, training)
        with closing(batches):
            if self.published != "none":
                return best_on_test(batches, training, len(bank.labels), test, remedy)
            learn, choose = held_out(bank.labels, seed=self.seed)
            if self.live:
                held = self.features(subject, Subset(data.bank, choose.tolist()), tokens_of(subject.backbone))
            else:
                held = Features(*(x[choose.to(x.device)] for x in bank))
            learns = torch.zeros(len(bank.labels), dtype=torch.bool).index_fill_(0, learn, True)
            return best_on_held_out(batches, training, learns, held, test, remedy)

    def _live(self, subject: Subject, source: Source, training: Training) -> Generator[Batch, None, None]:
        """Features of random views of each batch. What cannot be read is left out."""
        reading, backbone = self.reading(subject.config, tokens_of(subject.backbone)), subject.backbone
        view = RandomView(reading.size, "wide", self.seed, bilinear=self.published == "v1")
        maker = Augmented(Places(source), reading.size, training.batch, reading.crop, reading.channels, view)
        keys = ([*zip(*(x.tolist() for x in batch), strict=True)] for batch in training.order(len(source)))
        (device, dtype), see = device_and_dtype(backbone), reader(backbone, reading.tokens)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16")
        labels = labels_of(source).labels
        with closing(augmented_batches(maker, keys, self.num_workers)) as batches:
            for pixels, places in batches:
                with evaluating(backbone), autocast:
                    each = (normalize(x.to(device), reading.normalize).to(dtype) for x in pixels.split(self.batch))
                    vectors = [see(x).float() for x in each if len(x)]
                if vectors:
                    yield torch.cat(vectors), labels[places].to(device), places


def cached(bank: Features, training: Training) -> Generator[Batch, None, None]:
    """The same features in every epoch."""
    for _, images in training.order(len(bank.labels)):
        places = torch.from_numpy(images)
        here = places.to(bank.vectors.device)
        yield bank.vectors[here], bank.labels[here], places


def labels_of(source: Source) -> Features:
    """Of all images, features of no width."""
    labels = torch.tensor([source.label(i) for i in range(len(source))], dtype=torch.int64)
    return Features(torch.empty(len(labels), 0), labels, torch.arange(len(labels)))


class Places(Subset):
    """All images of a source, where the label of each is its place."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, range(len(source)))

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Image and place."""
        return self.source.read(index, room)[0], index


def tokens_of(backbone: nn.Module) -> Tokens:
    """The widest features that heads read of it."""
    return "last4+mean" if isinstance(backbone, ViT) else "cls"


def parts_of(backbone: nn.Module, width: int) -> dict[str, slice]:
    """Columns of features of :func:`tokens_of` by what a head reads: CLS tokens of the last block or of four (of all,
    where there are fewer), without the mean of the patches or with it."""
    if not isinstance(backbone, ViT):
        return {"features": slice(0, width)}
    one = backbone.num_features
    blocks = width // one - 1
    starts = {f"{n} block{'s' * (n > 1)}": (blocks - n) * one for n in (1, blocks)}
    ends = {"": blocks * one, " + mean": width}
    return {name + mean: slice(start, end) for name, start in starts.items() for mean, end in ends.items()}


Released = tuple[Tensor, Tensor, slice]
"""Weight (C, d) and bias (C,) of a classifier, and the columns of features of :func:`tokens_of` that it reads."""


def released(path: Path, backbone: nn.Module) -> Released:
    """A classifier that DINO or DINOv2 published; which blocks it reads, and whether the mean, is told from its width.

    Raises WeightsError for a file that cannot be read, EvaluationError for one that holds no classifier of such
    features.
    """
    state = read(path.expanduser())
    found = {name.split(".")[-1]: (name, x.float()) for name, x in state.items()}
    if len(state) != 2 or found.keys() != {"weight", "bias"} or found["weight"][1].ndim != 2:
        raise EvaluationError(
            f"{path} holds no linear classifier: looked for a weight and a bias, found {some([*state]) or 'nothing'}"
        )
    (name, weight), (_, bias) = found["weight"], found["bias"]
    one = getattr(backbone, "num_features", 0)
    parts = parts_of(backbone, 5 * one if isinstance(backbone, ViT) else one)
    fitting = {columns.stop - columns.start: columns for columns in parts.values()}
    if weight.shape[1] not in fitting:
        widths = ", ".join(f"{width} ({part})" for width, part in zip(fitting, parts, strict=True))
        raise EvaluationError(f"{path} reads {weight.shape[1]} numbers of an image; this backbone has {widths}")
    if "linear" in name and isinstance(backbone, ViT) and weight.shape[1] == 2 * one:
        weight = weight.unflatten(1, (one, 2)).mT.flatten(1)  # DINO v1 alternates numbers of CLS and of the mean
    return weight, bias, fitting[weight.shape[1]]


def told_by(classifier: Released, features: Tensor) -> Tensor:
    """(n, D) -> (n, C) logits."""
    weight, bias, columns = classifier
    return torch.addmm(bias.to(features), features[:, columns], weight.to(features).T)

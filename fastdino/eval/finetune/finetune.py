"""Fine-tuning on labelled images, light and full: what a backbone is worth as a start, and a classifier for use."""

import copy
import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.data.loader import augmented_batches
from fastdino.data.makers import Augmented
from fastdino.data.sampler import Key, epoch_order
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.source import Source
from fastdino.data.views.supervised import RandomView, augmentation_for
from fastdino.eval.classify.calibration import Balance
from fastdino.eval.classify.classification import Classification, class_counts, held_out
from fastdino.eval.classify.logreg import solver
from fastdino.eval.evaluation import Subject, results_folder
from fastdino.eval.features import Features, Reading, check_size, device_and_dtype, extract, has_weights
from fastdino.eval.finetune.adapters import Classifier, Mode, groups, let_learn, merge_low_rank
from fastdino.eval.finetune.tuning import BalancedLoss, Course, Learned, solve, tune
from fastdino.eval.pictures import new_figure
from fastdino.eval.result import Found, Picture
from fastdino.files import check_folder
from fastdino.model import ViT, export_backbone

log = logging.getLogger(__name__)

FILE = "finetuned.safetensors"
HELD_OUT = 0.1  # of the training images of each class
LR_BATCH = 256  # images of a batch, for which rates are given
LAYERED: tuple[Mode, ...] = ("full", "lp-ft")  # modes that train everything; rates fall with the distance from the head
LAYER_DECAY = {768: 0.65}  # of a backbone by its width, else 0.75: iBOT's
LORA_ALPHA = 16.0
IMBALANCED = 1.5  # images of the largest class, in those of the smallest, from which accuracy is no headline


@dataclass(frozen=True)
class Recipe:
    """How a mode learns."""

    lr: float
    """At its peak, for LR_BATCH images."""
    weight_decay: float
    epochs: int
    smoothing: float = 0.0
    drop_path: float = 0.0
    """Of our ViTs."""


RECIPES = {
    "bias": Recipe(4e-3, 0.0, 50),
    "lora": Recipe(2e-3, 0.01, 50),
    "full": Recipe(5e-4, 0.05, 100, smoothing=0.1, drop_path=0.1),
    "lp-ft": Recipe(5e-5, 0.05, 50, smoothing=0.1, drop_path=0.1),
}
"""full is iBOT's, shortened; lp-ft that at a tenth of the rate and half the epochs, for its head has learned."""


class Parts(NamedTuple):
    """Training images, told apart."""

    learn: Subset
    held: Subset
    counts: Tensor
    """(C,) images of each class to learn from."""


@dataclass(frozen=True, kw_only=True)
class FineTune(Classification):
    """A classifier learned from your images, with the backbone or on top of it, and its accuracy on test images.

    --data is a folder of class folders: train/ and val/ (or test/) below it, else every fifth image is test. A tenth of
    the training images is held out: their loss decides when to stop and what is kept. The test images are judged once.
    finetuned.safetensors, beside the result, is the classifier for timm, with the names of the classes.
    """

    kind: ClassVar[str] = "finetune"
    in_suite: ClassVar[bool] = False

    mode: Mode = "lp-ft"
    """What learns. head: logistic regression on frozen features. bias: biases and norms too. lora: low-rank changes of
    the attention too. full: everything. lp-ft: first the head, then everything, at a tenth of the rate."""
    balance: Balance = "none"
    """For classes of different sizes. weights: an image counts in inverse proportion to its class. logit-adjust: the
    classifier is that of classes of equal size (Menon et al. 2021)."""
    augment: Literal["auto", "strong", "gentle", "none"] = "auto"
    """Random views. strong: crops of 35 % and more, flips, RandAugment(2, 9); gentle: crops of 60 % and more, flips;
    auto: strong from 96 pixels on."""
    epochs: int | None = None
    """At most; default: 50, for full 100."""
    lr: float | None = None
    """At its peak, for a batch of 256; it grows with --batch. Default: bias 4e-3, lora 2e-3, full 5e-4, lp-ft 5e-5."""
    layer_decay: float | None = None
    """full and lp-ft: a block's rate in that of the next; default: 0.75, of ViT-B 0.65."""
    lora_rank: int = 8
    """Of the low-rank changes, which are scaled by 16 / rank."""
    patience: int = 10
    """Epochs without a better loss on the held-out images after which it ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs is None or self.epochs >= 1, "--epochs", self.epochs, "at least 1")
        require(self.lr is None or 0 < self.lr < math.inf, "--lr", self.lr, "positive")
        decay = self.layer_decay
        require(decay is None or 0 < decay <= 1, "--layer-decay", decay, "in (0, 1]", "no block learns faster")
        require(self.lora_rank >= 1, "--lora-rank", self.lora_rank, "at least 1")
        require(self.patience >= 1, "--patience", self.patience, "at least 1", "a count of epochs")
        absent = f"left out with --mode {self.mode}"
        require(decay is None or self.mode in LAYERED, "--layer-decay", decay, absent, "it is of full and lp-ft")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            require(value is None or self.mode != "head", f"--{name}", value, absent, "the head is solved")

    def open(self, subject: Subject) -> Sets:
        """Bank and test. Raises ConfigError also for what cannot be trained."""
        if subject.ranks.world_size > 1:
            raise ConfigError("eval finetune trains in one process, on one device: start it without a launcher")
        if self.mode in ("head", "lp-ft"):
            solver()  # where it is not installed
        backbone = subject.backbone
        if self.mode != "head" and not has_weights(backbone):
            raise ConfigError(f"--mode {self.mode} trains weights, and pixels have none: use --mode head")
        if self.layer_decay is not None and not _has_blocks(backbone):
            kind = getattr(backbone, "arch", type(backbone).__name__)
            raise ConfigError(f"--layer-decay needs a backbone of numbered blocks, and {kind} is none: leave it out")
        check_folder(results_folder(self, subject, self.kind))
        sets = super().open(subject)
        labels, names = _labels(sets), sets.bank.labels
        counts = class_counts(labels, len(names))
        if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
            raise ConfigError(f"{self.data} has no training image of {', '.join(empty[:4])}: add some, or drop it")
        if counts.max() == 1:
            raise ConfigError(
                f"each class of {self.data} has one training image, so that none can be held out to stop by: add more, "
                "or judge the features as they are by eval knn or fewshot"
            )
        if self.augment == "strong" and subject.config.data.channels not in (1, 3):
            raise ConfigError(f"--augment strong needs 1 or 3 channels, not {subject.config.data.channels}: use gentle")
        return sets

    def baseline_subjects(self, subject: Subject, found: Found) -> Iterator[tuple[str, Subject]]:
        """Logistic regression on pixels, and a random start that learns in the same way."""
        for name, other in super().baseline_subjects(subject, found):
            if name == "pixels" and find_spec("sklearn") is None:
                log.info("left out the baseline of pixels, for want of scikit-learn: pip install 'fastdino[eval]'")
                continue
            yield name, dataclasses.replace(other, told={**other.told, "baseline": name})

    def judge(self, subject: Subject, data: Sets) -> Found:
        """What the classifier is worth that the backbone becomes; the subject's own is written."""
        reading, names = self.reading(subject.config), data.bank.labels
        parts = self._parts(data)
        loss = BalancedLoss(parts.counts, self.balance)
        width = check_size(subject.backbone, reading)
        model = Classifier(copy.deepcopy(subject.backbone), width, len(names), self.seed)
        mode = self.mode if has_weights(model.backbone) else "head"
        protocol = self.protocol(subject) | {"mode": mode, "balance": self.balance, "seed": self.seed}
        protocol |= {"learned_from": len(parts.learn), "held_out": len(parts.held)}
        if mode in ("head", "lp-ft"):
            features = self.features(subject, data.bank)
            solved = solve(_rows(features, parts.learn), _rows(features, parts.held), loss)
            model.set_head(solved.weight, solved.bias)
            protocol["C"] = solved.c
        learned = None
        if mode != "head":
            protocol |= (plan := self._plan(model.backbone, mode, reading, len(parts.learn)))
            learned = self._learn(model, parts, loss, reading, plan)
            merge_low_rank(model.backbone)
        if has_weights(model.backbone) and "baseline" not in subject.told:
            self._write(model, subject, names, mode)
        test = self._judged(model, subject, data.test, frozen=mode == "head")
        return self._found(data, parts, test, protocol, learned)

    def _parts(self, data: Sets) -> Parts:
        labels = _labels(data)
        learn, held = held_out(labels, HELD_OUT, self.seed)
        counts = labels[learn].bincount(minlength=len(data.bank.labels))
        return Parts(Subset(data.bank, learn.tolist()), Subset(data.bank, held.tolist()), counts)

    def _plan(self, backbone: nn.Module, mode: Mode, reading: Reading, count: int) -> dict[str, Any]:
        """What flags and defaults say of ``count`` images to learn from, for the protocol."""
        recipe, decay = RECIPES[mode], 1.0
        steps = math.ceil(count / self.batch)
        batch = math.ceil(count / steps)
        if mode in LAYERED and _has_blocks(backbone):
            decay = self.layer_decay or LAYER_DECAY.get(int(backbone.num_features), 0.75)  # type: ignore[arg-type]
        return {
            "epochs": self.epochs or recipe.epochs,
            "batch": batch,
            "steps": steps,
            "lr": (self.lr or recipe.lr) * batch / LR_BATCH,
            "weight_decay": recipe.weight_decay,
            "layer_decay": decay,
            "smoothing": recipe.smoothing,
            "drop_path": recipe.drop_path if isinstance(backbone, ViT) else 0.0,
            "augment": augmentation_for(reading.size, reading.channels) if self.augment == "auto" else self.augment,
            "patience": self.patience,
        } | ({"lora_rank": self.lora_rank} if mode == "lora" else {})

    def _learn(
        self, model: Classifier, parts: Parts, loss: BalancedLoss, reading: Reading, plan: dict[str, Any]
    ) -> Learned:
        device, _ = device_and_dtype(model)
        if isinstance(model.backbone, ViT):
            model.backbone.set_drop_path(plan["drop_path"])
        course = Course(
            epochs=plan["epochs"],
            steps=plan["steps"],
            patience=self.patience,
            smoothing=plan["smoothing"],
            as_a_whole=self.mode in LAYERED,
        )

        def held_out_loss() -> float:
            logits, labels, _ = extract(model, parts.held, reading, batch=self.batch, num_workers=self.num_workers)
            return float(loss(logits, labels))

        random = None if plan["augment"] == "none" else RandomView(reading.size, plan["augment"], self.seed)
        maker = Augmented(parts.learn, reading.size, plan["batch"], reading.crop, reading.channels, random)
        batches = augmented_batches(maker, self._keys(len(parts.learn), course), self.num_workers)
        # What a step draws, such as branches to drop, is torch's; the caller's generators are left as they are.
        with closing(batches), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            let_learn(model, self.mode, rank=self.lora_rank, alpha=LORA_ALPHA, seed=self.seed)
            learning = groups(model, plan["lr"], plan["weight_decay"], plan["layer_decay"])
            return tune(model, torch.optim.AdamW(learning), batches, loss, course, reading, held_out_loss)

    def _keys(self, count: int, course: Course) -> Iterator[list[Key]]:
        """Of each batch: an epoch's images in its order, in batches whose sizes differ by one at most."""
        for epoch in range(course.epochs):
            for part in np.array_split(epoch_order(self.seed, epoch, count), course.steps):
                yield [(epoch, index) for index in part.tolist()]

    def _judged(self, model: Classifier, subject: Subject, test: Source, frozen: bool) -> Features:
        """Logits of the test images; of a frozen backbone by the features that are kept."""
        if not frozen:
            reading = self.reading(subject.config)
            return extract(model, test, reading, batch=self.batch, num_workers=self.num_workers)
        features = self.features(subject, test)
        with torch.no_grad():
            return features._replace(vectors=model.head(features.vectors))

    def _write(self, model: Classifier, subject: Subject, names: Sequence[str], mode: Mode) -> None:
        texts = {
            "config": subject.config.to_json(),
            "classes": json.dumps([*names]),
            "reading": json.dumps(dataclasses.asdict(self.reading(subject.config))),
            "mode": mode,
        }
        loads = export_backbone(model.backbone, results_folder(self, subject, self.kind) / FILE, texts, head=model.head)  # type: ignore[arg-type]
        log.info("%s loads it", loads)

    def _found(
        self, data: Sets, parts: Parts, test: Features, protocol: dict[str, Any], learned: Learned | None
    ) -> Found:
        labels = _labels(data)
        bank = Features(torch.empty(len(labels), 0), labels, torch.arange(len(labels)))
        predictions = self.predictions(data, bank, test, test.vectors.argmax(1))
        alone = [name for name, count in zip(data.bank.labels, labels.bincount().tolist(), strict=True) if count == 1]
        notes = [f"one training image, and none held out, of {', '.join(alone)}"] if alone else []
        also: dict[str, Any] = {}
        pictures = []
        if learned is not None:
            also = {"best_epoch": learned.best, "held_out_loss": [round(x, 4) for x in learned.losses]}
            notes += _remarks(learned, protocol["mode"])
            pictures = [Picture("-loss", lambda path: _draw(learned, path))]
        found = self.found(data, predictions, protocol, also=also, notes=notes)
        headline = "balanced_accuracy" if found.data["imbalance"] > IMBALANCED else "accuracy"
        scores = {headline: found.scores[headline]} | found.scores
        return dataclasses.replace(
            found, scores=scores, shares=predictions.shares(headline), pictures=[*found.pictures, *pictures]
        )


def _has_blocks(backbone: nn.Module) -> bool:
    """Whether the depth of its parameters is known, as that of our ViTs' and timm's."""
    return any(re.match(r"(model\.)?blocks\.\d+\.", name) for name, _ in backbone.named_parameters())


def _labels(sets: Sets) -> Tensor:
    """(n,) int64 of the bank, readable or not."""
    return torch.tensor([sets.bank.label(index) for index in range(len(sets.bank))])


def _rows(features: Features, part: Subset) -> Features:
    """Those of a part of the source; single images may have been unreadable."""
    chosen = torch.isin(features.places.cpu(), torch.tensor([*part.indices])).to(features.places.device)
    return Features(*(x[chosen] for x in features))


def _remarks(learned: Learned, mode: Mode) -> list[str]:
    """What is unusual."""
    remarks = []
    if learned.diverged:
        remarks.append(f"the loss was no longer finite after epoch {len(learned.losses) - 1}: lower --lr")
    if not learned.best:
        kept = "the head alone is kept" if mode == "lp-ft" else "nothing was learned"
        remarks.append(f"no epoch lowered the held-out loss, and {kept}: try another --lr or more images")
    elif learned.best == len(learned.losses) - 1 and not learned.diverged:
        remarks.append("the last epoch was the best: --epochs may be too few")
    return remarks


def _draw(learned: Learned, path: Path) -> None:
    """The loss on held-out images by epoch, and which is kept."""
    figure = new_figure(5, 3.2)
    axes = figure.subplots()
    axes.plot(range(len(learned.losses)), learned.losses, "o-", markersize=3, color="C0")
    axes.axvline(learned.best, color="0.5", linestyle="--", label=f"kept: epoch {learned.best}")
    axes.set(xlabel="epoch", ylabel="loss on held-out images", title="Fine-tuning")
    axes.legend(fontsize=8)
    figure.canvas.print_png(path)

"""The base of evaluations on class folders: two labelled sets, features of both, and what predictions are worth."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.benchmarks.class_folders import Sets, bank_and_test
from fastdino.eval.classify.metrics import Predictions
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import Features, Tokens
from fastdino.eval.intervals import Score
from fastdino.eval.published import IMAGENET
from fastdino.eval.result import Found


def class_counts(labels: Tensor, num_classes: int) -> np.ndarray:
    """(C,) images of each class."""
    return labels.cpu().bincount(minlength=num_classes).numpy()


def held_out(labels: Tensor, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n,) labels -> places of the images to learn from, and of those to choose by: ``share`` of each class.

    A class of two images or more has one or more on either side; a single image is learned from. Nothing here has seen
    a test image.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    cpu = labels.cpu()
    for label in cpu.unique():
        places = (cpu == label).nonzero().flatten()
        count = min(max(1, round(share * len(places))), len(places) - 1)
        chosen[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class Classification(Evaluation):
    """The base: --data is a folder of class folders, or other images with classes; train/ and val/ (or test/) below it
    are bank and test."""

    test: str = ""
    """Images that are judged, if they do not lie in --data; then all of --data is the bank."""

    def open(self, subject: Subject) -> Sets:
        """Bank and test."""
        return bank_and_test(self.data, subject.config.data, self.test)

    @abstractmethod
    def judge(self, subject: Subject, data: Sets) -> Found:
        """See Evaluation."""

    def both(self, subject: Subject, sets: Sets, tokens: Tokens = "cls") -> tuple[Features, Features]:
        """Features of bank and test. Raises ConfigError where what can be read of the bank lacks a class."""
        bank, test = (self.features(subject, source, tokens) for source in (sets.bank, sets.test))
        lacking = sorted({*test.labels.tolist()} - {*bank.labels.tolist()})
        if lacking:
            names = ", ".join(sets.bank.labels[c] for c in lacking[:4])
            raise ConfigError(f"the bank of {self.data} has no readable image of {names}, and the test images have")
        return bank, test

    def predictions(self, sets: Sets, bank: Features, test: Features, told: Tensor) -> Predictions:
        """``told`` (n,), the class of each test image by its number."""
        classes = list(sets.test.labels)
        counts = class_counts(bank.labels, len(classes))
        images = [sets.test.name(i) for i in test.places.tolist()]
        return Predictions(test.labels.cpu().numpy(), told.cpu().numpy(), classes, counts, images)

    def found(
        self,
        sets: Sets,
        predictions: Predictions,
        protocol: dict[str, Any],
        *,
        scores: dict[str, Score] | None = None,
        also: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Found:
        """What is found of predictions, with what a kind says beside: ``scores`` after the common ones."""
        data = {"bank": len(sets.bank), "test": len(sets.test), "split": sets.rule, **predictions.data()}
        data["unreadable"] = len(sets.bank) + len(sets.test) - int(predictions.counts.sum()) - len(predictions.truth)
        if (len(sets.bank.labels), len(sets.test)) == (1000, 50_000):
            data["name"] = IMAGENET
        return Found(
            scores=predictions.scores() | (scores or {}),
            protocol=protocol,
            data=data,
            also=predictions.also() | (also or {}),
            notes=list(notes),
            shares=predictions.shares(),
            arrays=predictions.arrays(),
            pictures=[predictions.picture()],
        )

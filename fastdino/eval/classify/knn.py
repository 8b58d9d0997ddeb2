"""Weighted k-nearest neighbours, the evaluation of DINO v1 that needs no training (section 4.1 of the paper)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features, extract

DEFAULT_NEIGHBORS = (10, 20, 100, 200)
MAX_ELEMENTS = 2**27  # of one block of similarities or votes: 0.5 GB of fp32


class KNeighbors:
    """Each of the k most similar bank images votes for its class with weight exp(cosine / temperature).

    Args:
        num_neighbors: k.
        temperature: 0.07 in DINO v1.
    """

    def __init__(self, num_neighbors: int = 20, temperature: float = 0.07) -> None:
        self.num_neighbors, self.temperature = num_neighbors, temperature

    def fit(self, features: Tensor, labels: Tensor) -> "KNeighbors":
        """Keeps the bank: (n, D) features, L2-normalised here, and (n,) integer labels of any values.

        Raises EvaluationError for a bank that cannot be voted with.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise EvaluationError(f"a bank is (n, D) and (n,), not {tuple(features.shape)} and {tuple(labels.shape)}")
        self.classes_, self.labels_ = labels.to(features.device).unique(return_inverse=True)
        if len(self.classes_) < 2:
            raise EvaluationError(f"the bank has {len(self.classes_)} classes: k-NN needs labelled images of 2 or more")
        self._check(self.num_neighbors, len(features))
        self.features_ = F.normalize(features.float(), dim=1)
        return self

    def predict(self, features: Tensor) -> Tensor:
        """(m, D) features -> (m,) labels."""
        votes = self._votes(features, [self.num_neighbors])
        return torch.cat([self.classes_[best] for (best,) in votes])

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Share of (m, D) features whose predicted label is theirs."""
        return self.scores(features, labels, [self.num_neighbors])[self.num_neighbors]

    def scores(self, features: Tensor, labels: Tensor, ks: Sequence[int]) -> dict[int, float]:
        """:meth:`score` for several k from one search."""
        if labels.shape != features.shape[:1] or not len(labels):
            raise EvaluationError(f"test images need a label each: {tuple(features.shape)} and {tuple(labels.shape)}")
        predicted = [torch.cat(block) for block in zip(*self._votes(features, ks), strict=True)]
        correct = [(self.classes_[best] == labels.to(best.device)).double().mean() for best in predicted]
        return dict(zip(ks, torch.stack(correct).tolist(), strict=True))

    def _votes(self, features: Tensor, ks: Sequence[int]) -> Iterator[list[Tensor]]:
        """Per block of test images, the winning class index for each k: bounded memory for any m, n and C."""
        self._check(max(ks), len(self.features_))
        num_classes = len(self.classes_)
        rows = max(1, MAX_ELEMENTS // max(len(self.features_), num_classes))
        for block in features.split(rows):
            queries = F.normalize(block.float(), dim=1).to(self.features_.device)
            cosine, index = (queries @ self.features_.T).topk(max(ks), dim=1)  # best first
            weights = ((cosine - cosine[:, :1]) / self.temperature).exp()  # from the best: no overflow, the same winner
            labels = self.labels_[index]
            yield [
                weights.new_zeros(len(block), num_classes).scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(dim=1)
                for k in ks
            ]

    def _check(self, k: int, num_bank: int) -> None:
        if not 1 <= k <= num_bank:
            raise EvaluationError(f"k={k} neighbours of a bank of {num_bank} images: choose 1 <= k <= {num_bank}")


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """Weighted k-NN accuracy on frozen features, in percent, printed as JSON with the protocol.

    --data is a folder of class folders, or other images with classes. train/ and val/ (or test/) below it are bank and
    test; without them every fifth image is test. --data shapes needs no folder.
    """

    neighbors: tuple[int, ...] = DEFAULT_NEIGHBORS
    """Values of k; DINO reports 20. Those of the default that exceed the bank are left out."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature); DINO's value."""
    num_workers: int = 8
    """Processes that decode; at most as many as there are cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ks = self.neighbors
        require(len(ks) > 0, "--neighbors", ks, "one k or more", "there is no accuracy without one")
        require(min(ks) >= 1 and len({*ks}) == len(ks), "--neighbors", ks, "different k >= 1", "counts of images")
        require(self.temperature > 0, "--temperature", self.temperature, "positive", "it divides the cosines")
        require(self.num_workers >= 0, "--num-workers", self.num_workers, "0 or more", "a count of processes")

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """{"knn_K": percent for each k} and the protocol."""
        bank, test, rule = bank_and_test(self.data, subject.config.data)
        reading = self.reading(subject.config)
        self.ks(len(bank))  # what is wrong with it is said before hours of features
        features = (
            extract(subject.backbone, source, reading, batch=self.batch, num_workers=self.num_workers)
            for source in (bank, test)
        )
        found = {name: round(100 * score, 2) for name, score in self.accuracy(*features).items()}
        protocol: dict[str, Any] = {
            "size": reading.size,
            "crop": reading.crop,
            "normalize": reading.normalize,
            "precision": reading.precision,
        }
        protocol |= {"temperature": self.temperature, "split": rule}
        return {**found, "data": self.data, "bank": len(bank), "test": len(test), **protocol}

    def accuracy(self, bank: Features, test: Features) -> dict[str, float]:
        """Top-1 accuracy in [0, 1] as one entry "knn_K" per k."""
        ks = self.ks(len(bank.labels))
        scores = KNeighbors(min(ks), self.temperature).fit(*bank).scores(*test, ks)
        return {f"knn_{k}": score for k, score in scores.items()}

    def ks(self, num_bank: int) -> list[int]:
        """The values of k for a bank of that many images. Raises ConfigError for one asked for that exceeds it."""
        if self.neighbors == DEFAULT_NEIGHBORS:
            return [k for k in self.neighbors if k <= num_bank] or [num_bank]
        if max(self.neighbors) > num_bank:
            raise ConfigError(
                f"--neighbors {max(self.neighbors)} of a bank of {num_bank} images: choose k <= {num_bank}"
            )
        return list(self.neighbors)

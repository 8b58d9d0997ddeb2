"""Weighted k-nearest neighbours, the evaluation of DINO v1 that needs no training (section 4.1 of the paper)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.distributed import Ranks
from fastdino.eval.classify.classification import Classification, class_counts
from fastdino.eval.evaluation import Subject, alone
from fastdino.eval.features import EvaluationError, Features, Tokens
from fastdino.eval.intervals import Score, normal, wilson
from fastdino.eval.result import Found

DEFAULT_NEIGHBORS = (1, 5, 10, 20, 100, 200)
PUBLISHED = 20  # the k that DINO reports
MAX_ELEMENTS = 2**27  # of one block of similarities or votes: 0.5 GB of fp32


class KNeighbors:
    """Each of the k most similar bank images votes for its class with weight exp(cosine / temperature).

    Args:
        num_neighbors: k.
        temperature: 0.07 in DINO v1.
        balanced: divide the votes for a class by its images in the bank.
        ranks: each of which searches its part of the bank; all of them call all methods with the same features.
    """

    def __init__(
        self,
        num_neighbors: int = 20,
        temperature: float = 0.07,
        balanced: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.num_neighbors, self.temperature, self.balanced = num_neighbors, temperature, balanced
        self.ranks = ranks or alone()

    def fit(self, features: Tensor, labels: Tensor) -> "KNeighbors":
        """Keeps the bank: (n, D) features, L2-normalised here, and (n,) integer labels of any values.

        Raises EvaluationError for a bank that cannot be voted with.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise EvaluationError(f"a bank is (n, D) and (n,), not {tuple(features.shape)} and {tuple(labels.shape)}")
        self.classes_, self.labels_ = labels.to(features.device).unique(return_inverse=True)
        if len(self.classes_) < 2:
            raise EvaluationError(f"the bank has {len(self.classes_)} classes: k-NN needs labelled images of 2 or more")
        self._check(self.num_neighbors)
        rank, of, n = self.ranks.rank, self.ranks.world_size, len(features)
        self.start_ = n * rank // of
        self.features_ = F.normalize(features[self.start_ : n * (rank + 1) // of].float(), dim=1)
        self.weights_ = 1 / self.labels_.bincount().float() if self.balanced else None
        return self

    def predict(self, features: Tensor) -> Tensor:
        """(m, D) features -> (m,) labels."""
        return self.predictions(features, [self.num_neighbors])[self.num_neighbors]

    def predictions(self, features: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        """:meth:`predict` for several k from one search."""
        told = [torch.cat(blocks) for blocks in zip(*self._votes(features, ks), strict=True)]
        return {k: self.classes_[best] for k, best in zip(ks, told, strict=True)}

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Share of (m, D) features whose predicted label is theirs."""
        return self.scores(features, labels, [self.num_neighbors])[self.num_neighbors]

    def scores(self, features: Tensor, labels: Tensor, ks: Sequence[int]) -> dict[int, float]:
        """:meth:`score` for several k from one search."""
        if labels.shape != features.shape[:1] or not len(labels):
            raise EvaluationError(f"test images need a label each: {tuple(features.shape)} and {tuple(labels.shape)}")
        told = self.predictions(features, ks)
        correct = torch.stack([(best == labels.to(best.device)).double().mean() for best in told.values()])
        return dict(zip(ks, correct.tolist(), strict=True))

    def _votes(self, features: Tensor, ks: Sequence[int]) -> Iterator[list[Tensor]]:
        """Per block of test images, the winning class index for each k: bounded memory for any m, n and C."""
        self._check(max(ks))
        num_classes = len(self.classes_)
        rows = max(1, MAX_ELEMENTS // max(len(self.features_), num_classes))
        rows = min(self.ranks.gather(rows))  # as many blocks on each rank
        for block in features.split(rows):
            queries = F.normalize(block.float(), dim=1).to(self.features_.device)
            cosine, labels = self._neighbors(queries, max(ks))
            weights = ((cosine - cosine[:, :1]) / self.temperature).exp()  # from the best: no overflow, the same winner
            if self.weights_ is not None:
                weights = weights * self.weights_[labels]
            yield [
                weights.new_zeros(len(block), num_classes).scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(dim=1)
                for k in ks
            ]

    def _neighbors(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(B, D) normalised -> cosines and class indices (B, k) of the most similar images of all ranks, best first."""
        cosine, index = (queries @ self.features_.T).topk(min(k, len(self.features_)), dim=1)
        labels = self.labels_[self.start_ + index]
        if self.ranks.world_size == 1:
            return cosine, labels
        parts = self.ranks.gather((cosine.cpu(), labels.cpu()))  # their best together hold the best of all
        cosine, place = torch.cat([part for part, _ in parts], dim=1).topk(k, dim=1)
        labels = torch.cat([part for _, part in parts], dim=1).gather(1, place)
        return cosine.to(queries.device), labels.to(queries.device)

    def _check(self, k: int) -> None:
        if not 1 <= k <= (num_bank := len(self.labels_)):
            raise EvaluationError(f"k={k} neighbours of a bank of {num_bank} images: choose 1 <= k <= {num_bank}")


@dataclass(frozen=True, kw_only=True)
class Knn(Classification):
    """Weighted k-NN on frozen features: accuracy with its interval, beside pixels and a random start.

    --data is a folder of class folders, or other images with classes. train/ and val/ (or test/) below it are bank and
    test; without them every fifth image is test. --data shapes needs no folder.
    """

    kind: ClassVar[str] = "knn"

    neighbors: tuple[int, ...] = DEFAULT_NEIGHBORS
    """Values of k. The headline is k=20, as DINO reports it, else the largest. Those of the default that exceed the
    bank are left out."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine / temperature); DINO's value."""
    tokens: Tokens = "cls"
    """What is compared."""
    balance: Literal["none", "weights"] = "none"
    """weights: divide the votes for a class by its images in the bank; else large classes win."""
    per_class: tuple[int, ...] = ()
    """Also with so many images of each class in the bank, drawn --tries times, as DINOv2 does."""
    tries: int = 5
    """Draws of --per-class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ks = self.neighbors
        require(len(ks) > 0, "--neighbors", ks, "one k or more", "there is no accuracy without one")
        require(min(ks) >= 1 and len({*ks}) == len(ks), "--neighbors", ks, "different k >= 1", "counts of images")
        require(self.temperature > 0, "--temperature", self.temperature, "positive", "it divides the cosines")
        require(all(n >= 1 for n in self.per_class), "--per-class", self.per_class, "1 or more", "counts of images")
        require(self.tries >= 1, "--tries", self.tries, "at least 1", "a count of draws")

    def open(self, subject: Subject) -> Sets:
        """Bank and test. Raises ConfigError also for more neighbours, or images of a class, than there are."""
        sets = super().open(subject)
        self.ks(len(sets.bank))
        if self.per_class:
            labels = torch.tensor([sets.bank.label(i) for i in range(len(sets.bank))])
            counts = class_counts(labels, len(sets.bank.labels))
            if (most := max(self.per_class)) > (least := int(counts.min())):
                name = sets.bank.labels[int(counts.argmin())]
                raise ConfigError(
                    f"--per-class {most}: the bank has {least} images of {name}: ask for {least} or fewer"
                )
        return sets

    def judge(self, subject: Subject, data: Sets) -> Found:
        """accuracy is that of the headline's k."""
        bank, test = self.both(subject, data, self.tokens)
        ks = self.ks(len(bank.labels))
        main = PUBLISHED if PUBLISHED in ks else max(ks)
        told = self._fitted(bank, min(ks), subject.ranks).predictions(test.vectors, ks)
        hits = {k: int((best == test.labels).sum()) for k, best in told.items()}
        scores = {f"knn_{k}": wilson(count, len(test.labels)) for k, count in hits.items()}
        for count in self.per_class:
            scores[f"knn_{count}_per_class"] = self._per_class(bank, test, count, subject.ranks)
        protocol = {
            **self.protocol(subject, self.tokens),
            "k": main,
            "temperature": self.temperature,
            "balance": self.balance,
        }
        predictions = self.predictions(data, bank, test, told[main])
        return self.found(data, predictions, protocol, scores=scores)

    def accuracy(self, bank: Features, test: Features) -> dict[str, float]:
        """Top-1 accuracy in [0, 1] as one entry "knn_K" per k."""
        ks = self.ks(len(bank.labels))
        scores = self._fitted(bank, min(ks)).scores(test.vectors, test.labels, ks)
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

    def _fitted(self, bank: Features, k: int, ranks: Ranks | None = None) -> KNeighbors:
        found = KNeighbors(k, self.temperature, self.balance == "weights", ranks)
        return found.fit(bank.vectors, bank.labels)

    def _per_class(self, bank: Features, test: Features, count: int, ranks: Ranks) -> Score:
        """Mean accuracy over draws of ``count`` images of each class, with k = count.

        Source: DINOv2's eval/knn.py: a try's number is the seed of its permutations.
        """
        values = []
        for seed in range(self.tries):
            generator = torch.Generator().manual_seed(seed)
            places = [(bank.labels.cpu() == label).nonzero().flatten() for label in bank.labels.cpu().unique()]
            drawn = torch.cat([x[torch.randperm(len(x), generator=generator)[:count]] for x in places])
            drawn = drawn.to(bank.vectors.device)
            few = Features(bank.vectors[drawn], bank.labels[drawn], bank.places[drawn])
            fitted = self._fitted(few, count, ranks)
            values.append(100 * fitted.score(test.vectors, test.labels))
        return normal(values, "draws")

"""Weighted k-nearest neighbours, the evaluation of DINO v1 that needs no training (section 4.1 of the paper)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.data.sources.source import Source
from fastdino.eval.features import EvaluationError, Protocol, extract
from fastdino.eval.splits import bank_and_test

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


def evaluate_knn(
    backbone: nn.Module,
    bank: Source,
    test: Source,
    protocol: Protocol | None = None,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 accuracy in [0, 1] of weighted k-NN on frozen features, one entry "knn_K" per k.

    Args:
        backbone: maps (B, 3, s, s) normalised images to (B, D).
        bank: labelled images that vote.
        test: labelled images that are judged, of the same classes in the same order.
        protocol: size, normalisation and precision; DINO v1's 224 pixels by default.
        ks: k = 20 is what DINO v1 publishes.

    Raises EvaluationError when the bank is smaller than a k, has no labels, or has other classes than the test images.
    """
    protocol = protocol or Protocol()
    if bank.labels != test.labels:
        raise EvaluationError(f"bank and test name different classes: {bank.labels[:5]}... and {test.labels[:5]}...")
    if max(ks) > len(bank):
        raise EvaluationError(f"k={max(ks)} neighbours of a bank of {len(bank)} images: choose k <= {len(bank)}")
    features, labels = extract(backbone, bank, protocol)
    if (labels < 0).any():
        raise EvaluationError("the bank has images without a class: put them into class folders or take them out")
    neighbors = KNeighbors(min(ks), temperature).fit(features, labels)
    scores = neighbors.scores(*extract(backbone, test, protocol), ks)
    return {f"knn_{k}": score for k, score in scores.items()}


def online_knn(backbone: nn.Module, root: str, config: Config) -> dict[str, float]:
    """k-NN accuracy during training, as {"knn": percent, "knn_neighbors": k}; k is 20, or the bank's size if less.

    Args:
        backbone: the teacher's, where it is and in the dtype that it has.
        root: the word shapes or a folder of class folders, see :func:`fastdino.eval.splits.bank_and_test`.
        config: of the run; sizes, normalisation and workers are read.
    """
    bank, test = bank_and_test(root, config.data.image_size)
    protocol = Protocol(
        size=config.views.global_size,
        batch_size=config.run.local_batch,
        num_workers=config.data.num_workers,
        normalize=config.data.normalize,
    )
    k = min(20, len(bank))
    return {"knn": 100 * evaluate_knn(backbone, bank, test, protocol, ks=[k])[f"knn_{k}"], "knn_neighbors": k}

"""Do classes show where nobody named them? k-means on features, and how its clusters agree with the classes."""

import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.data.benchmarks.class_folders import Sets
from fastdino.eval.classify.classification import Classification
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError
from fastdino.eval.result import Found
from fastdino.eval.unlabelled.jackknife import jackknife

MANY = 200_000  # images beyond which k-means looks at some at a time
STARTS = 3  # of which the best is taken


def k_means(features: Tensor, k: int, seed: int = 0) -> Any:
    """scikit-learn's fitted KMeans of (n, D) features, or MiniBatchKMeans of more than 200,000; ``predict`` clusters.

    Raises EvaluationError where the features are fewer than k points.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    points = features.cpu().numpy()
    kind = MiniBatchKMeans if len(points) > MANY else KMeans
    if len(points) < k:
        raise EvaluationError(f"{k} clusters of {len(points)} images: there have to be as many images as clusters")
    if not np.isfinite(points).all():
        raise EvaluationError("the features are not finite: the weights hold infinities or what is not a number")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that points are alike, which is said below
        fitted = kind(k, n_init=STARTS, random_state=seed).fit(points)
    if (found := len(np.unique(fitted.labels_))) < k:
        raise EvaluationError(
            f"the features of {len(points)} images are {found} points for {k} clusters: the images are alike, or the "
            "backbone has collapsed"
        )
    return fitted


def matched(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K,) the class of each cluster, one to one, so that most of (n,) images are in the cluster of their class.

    Source: Kuhn 1955, by scipy.
    """
    from scipy.optimize import linear_sum_assignment

    classes = np.unique(labels)
    table = np.zeros((max(int(clusters.max()) + 1, len(classes)), len(classes)), np.int64)
    np.add.at(table, (clusters, np.searchsorted(classes, labels)), 1)
    return classes[linear_sum_assignment(table, maximize=True)[1]]


@dataclass(frozen=True, kw_only=True)
class Cluster(Classification):
    """Clusters without labels, compared with the classes: accuracy, NMI and ARI.

    k-means, with as many clusters as there are classes, sees the L2-normalised features of the bank and no label. Each
    cluster then gets a class of its own, so that most of the bank is right; test images are judged by the cluster whose
    center is nearest. --data as for knn. Needs scikit-learn: pip install 'fastdino[eval]'.
    """

    kind: ClassVar[str] = "cluster"

    def open(self, subject: Subject) -> Sets:
        """Bank and test; at least as many images as classes."""
        if find_spec("sklearn") is None:
            raise EvaluationError("k-means is scikit-learn's, which is not installed: pip install 'fastdino[eval]'")
        sets = super().open(subject)
        if len(sets.bank) < len(sets.bank.labels):
            raise EvaluationError(
                f"{self.data} has {len(sets.bank)} images in the bank, and {len(sets.bank.labels)} classes with a "
                "cluster for each: add images"
            )
        return sets

    def judge(self, subject: Subject, data: Sets) -> Found:
        """hungarian_accuracy in percent, nmi and ari in percent of a perfect agreement."""
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        bank, test = self.both(subject, data)
        k = len(bank.labels.unique())
        fitted = k_means(F.normalize(bank.vectors, dim=1), k, self.seed)
        classes = matched(fitted.labels_, bank.labels.cpu().numpy())
        clusters = fitted.predict(F.normalize(test.vectors, dim=1).cpu().numpy())
        truth = test.labels.cpu().numpy()
        told = torch.from_numpy(classes[clusters])
        protocol = self.protocol(subject) | {"clusters": k, "starts": STARTS, "matched": "on the bank"}
        found = self.found(data, self.predictions(data, bank, test, told), protocol)
        agreements = {
            "nmi": jackknife(lambda some: 100 * normalized_mutual_info_score(truth[some], clusters[some]), len(truth)),
            "ari": jackknife(lambda some: 100 * adjusted_rand_score(truth[some], clusters[some]), len(truth)),
        }
        scores = {"hungarian_accuracy" if name == "accuracy" else name: x for name, x in found.scores.items()}
        return replace(found, scores=scores | agreements, arrays=found.arrays | {"clusters": clusters})

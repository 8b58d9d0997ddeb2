"""Segmentation without labels but for names: k-means on patches, each cluster then named after a class."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.eval.dense.segment.in_context import Examples
from fastdino.eval.features import EvaluationError


def k_means() -> Any:
    """scikit-learn's class. Raises EvaluationError where it is not installed."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise EvaluationError("--method cluster needs scikit-learn: pip install 'fastdino[eval]'") from error
    return KMeans


def fit_clusters(examples: Examples, num_clusters: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """k-means of the examples' tokens: (.., D) tokens -> (.., C), one for the class of the nearest center.

    Raises EvaluationError where there are fewer examples than clusters.
    """
    if len(examples.tokens) < num_clusters:
        raise EvaluationError(f"--clusters={num_clusters} of {len(examples.tokens)} patches: give more images")
    found = k_means()(num_clusters, n_init=3, random_state=seed).fit(examples.tokens.cpu().numpy())
    centers = torch.from_numpy(found.cluster_centers_).to(examples.tokens)
    named = match(nearest_center(examples.tokens, centers), examples.classes, num_clusters)

    def tell(tokens: Tensor) -> Tensor:
        cluster = nearest_center(F.normalize(tokens.float(), dim=-1), centers)
        return F.one_hot(named[cluster], examples.classes.shape[1]).float()

    return tell


def match(clusters: Tensor, classes: Tensor, num_clusters: int) -> Tensor:
    """(K,) int64, the class that each cluster is named after.

    Args:
        clusters: (M,) int64, of examples.
        classes: (M, C) shares of theirs.
        num_clusters: K. Where it is C, each class is given to one cluster, so that most pixels are right (Hungarian
            algorithm); where it is another, a cluster takes the class that most of its pixels have (many to one).
    """
    counts = classes.new_zeros(num_clusters, classes.shape[1], dtype=torch.float64)
    counts.index_add_(0, clusters, classes.double())
    if counts.shape[0] != counts.shape[1]:
        return counts.argmax(dim=1)
    from scipy.optimize import linear_sum_assignment

    _, named = linear_sum_assignment(counts.cpu().numpy(), maximize=True)
    return torch.from_numpy(named).to(clusters.device)


def nearest_center(tokens: Tensor, centers: Tensor) -> Tensor:
    """(.., D) -> (..,): by Euclid's distance, less what is the same for every center."""
    return (tokens @ centers.T - centers.square().sum(-1) / 2).argmax(dim=-1)

"""What a classifier's probabilities are worth: calibration, and the remedies for classes of unequal size.

Below: n images, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.eval.pictures import new_figure
from fastdino.eval.result import Found, Picture

NUM_BINS = 15
_BISECTIONS = 60
_SHARPEST, _FLATTEST = -7.0, 7.0  # logarithms of the temperatures that are tried


def class_weights(counts: Tensor) -> Tensor:
    """(C,) counts -> (C,) fp64 weights of an image by its class, n / (C n_c): every class then weighs the same.

    scikit-learn's "balanced". A class without images weighs nothing.
    """
    counts = counts.double()
    return torch.where(counts > 0, counts.sum() / (len(counts) * counts), 0.0)


def logit_adjustment(counts: Tensor, tau: float = 1.0) -> Tensor:
    """(C,) counts of training images -> (C,) fp64, -tau log(share): what to add to the logits of a trained classifier.

    It then tells the class that is most likely if all were as frequent (Menon et al. 2021, eq. 9). A class without
    images gets as much as one with a single image.
    """
    counts = counts.double().clamp(min=1)
    return -tau * (counts / counts.sum()).log()


Balance = Literal["none", "weights", "logit-adjust"]


class Remedy(NamedTuple):
    """What is done about classes of unequal size."""

    weights: Tensor | None
    """(C,) fp64, of an image in the loss by its class; None: all the same."""
    shift: Tensor
    """(C,) fp64, added to the logits of a trained classifier."""
    balanced: bool
    """Choose by the mean over classes of the accuracy."""

    @classmethod
    def of(cls, balance: Balance, labels: Tensor, num_classes: int) -> "Remedy":
        """For (n,) labels of training images, where these are."""
        counts = labels.bincount(minlength=num_classes)
        shift = logit_adjustment(counts) if balance == "logit-adjust" else torch.zeros_like(counts).double()
        return cls(class_weights(counts) if balance == "weights" else None, shift, balance != "none")


def percent_right(told: Tensor, labels: Tensor, balanced: bool = False) -> Tensor:
    """Percent of (n, ...) predictions that are the (n,) labels, fp64 (...); ``balanced``: the mean over classes."""
    share = torch.ones_like(labels, dtype=torch.float64)
    if balanced:
        share = 1 / labels.bincount().double()[labels]
    hits = (told.movedim(0, -1) == labels).double()
    return 100 * (hits @ (share / share.sum()))


def best_of(percent: Sequence[float], logits: Callable[[int], Tensor], labels: Tensor) -> int:
    """Index of the highest; of several, of the one with the lowest cross-entropy. Few images leave many equal.

    Args:
        percent: of the images, by each of several classifiers.
        logits: (n, C) of a classifier, by its index.
        labels: (n,) of the images.
    """
    best = [index for index, value in enumerate(percent) if value == max(percent)]
    return min(best, key=lambda index: negative_log_likelihood(logits(index), labels)) if len(best) > 1 else best[0]


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = NUM_BINS) -> float:
    """Mean gap of confidence and accuracy over bins of equally many images; equal confidences share a bin.

    Args:
        confidence: (n,) probability of the predicted class.
        correct: (n,) bool, whether it is the true one.

    Source: Guo et al. 2017, whose bins are of equal width; of equal mass, none is nearly empty.
    """
    return sum(share * abs(told - right) for share, told, right in reliability(confidence, correct, bins))


def reliability(confidence: Tensor, correct: Tensor, bins: int = NUM_BINS) -> list[tuple[float, float, float]]:
    """Of each bin that is not empty its share of the images, their mean confidence and their accuracy."""
    told, right = confidence.double().cpu().numpy(), correct.double().cpu().numpy()
    edges = np.unique(np.quantile(told, np.arange(1, bins) / bins))
    place = np.searchsorted(edges, told, side="left")
    found = [(told[place == bin_], right[place == bin_]) for bin_ in np.unique(place)]
    return [(len(a) / len(told), float(a.mean()), float(b.mean())) for a, b in found]


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(true class), from (n, C) logits and (n,) labels."""
    return F.cross_entropy(logits.double(), labels).item()


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities to the one-hot truth, in [0, 2] (Brier 1950)."""
    probabilities = logits.double().softmax(dim=1)
    return (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(dim=1).mean().item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T that minimises the cross-entropy of softmax(logits / T); logits (n, C) of images that were not trained on.

    Source: Guo et al. 2017. The targets are smoothed by 1 / (n + 1), as Platt (1999) does for two classes: n images
    that are all told right are no proof of certainty, and T would be 0.
    """
    z = logits.double()
    smoothing = 1 / (len(z) + 1)
    target = (1 - smoothing) * z.gather(1, labels.unsqueeze(1)).squeeze(1) + smoothing * z.mean(dim=1)
    low, high = _SHARPEST, _FLATTEST
    for _ in range(_BISECTIONS):  # the slope by 1 / T grows with 1 / T, so it is 0 at one place
        middle = (low + high) / 2
        expected = ((z / np.exp(middle)).softmax(dim=1) * z).sum(dim=1)
        low, high = (middle, high) if (expected - target).mean() > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def with_calibration(found: Found, logits: Tensor, labels: Tensor, temperature: float | None = None) -> Found:
    """``found`` with the calibration of (n, C) logits of the test images: ECE in percent, NLL and Brier score; the same
    at a temperature, if there is one; and a picture of it."""
    told = _calibration(logits, labels)
    if temperature is not None:
        told |= {"temperature": round(temperature, 4), "scaled": _calibration(logits.double() / temperature, labels)}
    picture = Picture("-reliability", lambda path: _draw(path, logits, labels, temperature))
    also = found.also | {"calibration": told}
    return dataclasses.replace(found, also=also, pictures=[*found.pictures, picture])


def _told(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence in the predicted class, and whether it is right."""
    confidence, told = logits.double().softmax(dim=1).max(dim=1)
    return confidence, told == labels


def _calibration(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    error = expected_calibration_error(*_told(logits, labels))
    nll, brier = negative_log_likelihood(logits, labels), brier_score(logits, labels)
    return {"ece": round(100 * error, 4), "nll": round(nll, 4), "brier": round(brier, 4)}


def _draw(path: Path, logits: Tensor, labels: Tensor, temperature: float | None) -> None:
    figure = new_figure(4.2, 4.0, dpi=110)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for scale, name in ((1.0, "as trained"), (temperature, f"temperature {temperature or 1:.2f}")):
        if scale is not None:
            _, told, right = zip(*reliability(*_told(logits.double() / scale, labels)), strict=True)
            axes.plot(told, right, marker="o", markersize=4, label=name)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    axes.set_aspect("equal")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.canvas.print_png(path)

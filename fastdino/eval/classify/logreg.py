"""Logistic regression on frozen features, its penalty chosen on held-out training images."""

import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.eval.classify.calibration import (
    Balance,
    Remedy,
    best_of,
    fit_temperature,
    percent_right,
    with_calibration,
)
from fastdino.eval.classify.classification import Classification, held_out
from fastdino.eval.classify.heads import Picked
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError, Features, Tokens, check_size
from fastdino.eval.intervals import wilson
from fastdino.eval.result import Found

log = logging.getLogger(__name__)

POWERS = (-6, 5)  # of ten, between which C lies in DINOv2's sweep of 45
ITERATIONS, TOLERANCE = 100, 1e-6
MOST = 1e12  # images times numbers of each times classes: hours
BEYOND = 50  # times the best C so far, where the sweep ends: weaker penalties take longest
WIDE, RANK = 256, 1e-10  # numbers of an image from which it pays to look for a span; a share of the largest square
TYPICAL = 70  # iterations for a value of C, of which the estimate of the time is made
PROBE = 2**27  # multiplications that are timed for it
ABSENT = 100.0  # so far below the others is the logit of a class of which no training image could be read


def solver(balance: Balance = "none", iterations: int = ITERATIONS) -> Any:
    """scikit-learn's LogisticRegression, by L-BFGS. Fitted again, it starts from where it is.

    Raises EvaluationError where scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise EvaluationError("logistic regression needs scikit-learn: pip install 'fastdino[eval]'") from error
    weights = "balanced" if balance == "weights" else None
    return LogisticRegression(max_iter=iterations, tol=TOLERANCE, warm_start=True, class_weight=weights)


def fit(model: Any, features: Tensor, labels: Tensor, c: float) -> bool:
    """Minimises c * (sum of cross-entropies) + |weights|^2 / 2; whether it got there in its iterations.

    Args:
        model: of :func:`solver`.
        features: (n, D) fp32 or fp64, on the CPU; in fp32 rounding ends it after fewer iterations.
        labels: (n,), on the CPU.
        c: the larger, the weaker the penalty.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=c).fit(features.numpy(), labels.numpy())
    return int(model.n_iter_.max()) < model.max_iter


def told_by(model: Any, features: Tensor, num_classes: int) -> Tensor:
    """(n, D) -> (n, C) fp64 logits."""
    scores = torch.from_numpy(model.decision_function(features.numpy())).double()
    if scores.ndim == 1:  # of two classes, one against the other
        scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
    logits = scores.new_full((len(scores), num_classes), float(scores.min()) - ABSENT)
    logits[:, torch.from_numpy(model.classes_)] = scores
    return logits


def standardized(features: Tensor, of: Tensor) -> Tensor:
    """(m, D) less the mean of (n, D) ``of``, divided by their deviation; what does not vary becomes 0."""
    deviation, mean = torch.std_mean(of, dim=0, correction=0)
    return (features - mean) / torch.where(deviation > 0, deviation, 1)


def within_span(features: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) and (m, D) -> (n, r) and (m, r), in an orthonormal basis of the features' span, where it is much smaller.

    The penalised weights lie in that span, so the classifier is the same: of grey pixels in three channels, or of fewer
    images than numbers, at a fraction of the time.
    """
    if features.shape[1] <= WIDE:
        return features, queries
    x = features.double()
    few = len(x) < x.shape[1]
    values, directions = torch.linalg.eigh(x @ x.T if few else x.T @ x)  # ascending
    kept = values > RANK * values[-1]
    if int(kept.sum()) > 0.7 * x.shape[1]:
        return features, queries
    basis = x.T @ (directions[:, kept] / values[kept].sqrt()) if few else directions[:, kept]
    return features @ basis.to(features.dtype), queries @ basis.to(queries.dtype)


@dataclass(frozen=True, kw_only=True)
class LogReg(Classification):
    """Logistic regression on frozen features, with the C that is best on held-out images, as DINOv2 does it.

    --data is as for knn. C is chosen on a tenth of the bank, then the classifier is fitted to all of it.
    published_style is the best on the test images. It needs scikit-learn: pip install 'fastdino[eval]'.
    """

    kind: ClassVar[str] = "logreg"

    tokens: Tokens = "cls"
    """What is classified."""
    c_values: int = 12
    """How many values of C are tried, from 1e-6 up to 1e5, or to 50 times the one that is best on the held-out images;
    DINOv2 takes 45."""
    iterations: int = ITERATIONS
    """Of L-BFGS at most for a value of C, from where the value before ended; DINOv2 takes 1,000."""
    standardize: bool = False
    """Give every number the mean 0 and the deviation 1, which helps with few images; DINOv2 does not."""
    balance: Balance = "none"
    """weights: every class weighs the same in the loss. logit-adjust: the logarithm of a class's share of the bank is
    taken off its logit. With either, C is chosen by balanced accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.iterations >= 1, "--iterations", self.iterations, "at least 1", "a count of steps")
        require(self.c_values >= 1, "--c-values", self.c_values, "at least 1", "a count of penalties")

    def open(self, subject: Subject) -> Sets:
        """Bank and test. Raises EvaluationError without scikit-learn, and where it would take hours."""
        solver()
        sets = super().open(subject)
        n, classes = len(sets.bank), len(sets.bank.labels)
        width = check_size(subject.backbone, self.reading(subject.config, self.tokens))
        if n * width * classes > MOST:
            raise EvaluationError(
                f"logistic regression of {n} images, {width} numbers of each and {classes} classes would take hours: "
                f"fastdino eval linear does it in minutes"
            )
        return sets

    def judge(self, subject: Subject, data: Sets) -> Found:
        """accuracy is that of the chosen C; published_style that of the best on the test images."""
        bank, test = self.both(subject, data, self.tokens)
        picked = self.choose(bank, test, len(data.bank.labels))
        protocol = self.protocol(subject, self.tokens) | {
            "c_values": self.c_values,
            "iterations": self.iterations,
            "standardize": self.standardize,
        }
        protocol |= {"balance": self.balance, "chosen_on": "held-out"}
        predictions = self.predictions(data, bank, test, picked.logits.argmax(1))
        scores = {"published_style": wilson(round(picked.best / 100 * len(test.labels)), len(test.labels))}
        found = self.found(data, predictions, protocol, scores=scores, also=picked.also, notes=picked.notes)
        return with_calibration(found, picked.logits, test.labels.cpu(), picked.temperature)

    def choose(self, bank: Features, test: Features, num_classes: int) -> Picked:
        """The classifier of the whole bank with the C that told the held-out tenth of it best."""
        x, queries = (features.vectors.cpu() for features in (bank, test))  # fp32: fp64 takes 5 times as long
        if self.standardize:
            x, queries = standardized(x, x), standardized(queries, x)
        x, queries = within_span(x, queries)
        y, truth = bank.labels.cpu(), test.labels.cpu()
        log.info("logistic regression: about %s", self._estimate(x, num_classes))
        learn, choose = held_out(y, seed=self.seed)
        remedy = Remedy.of(self.balance, y, num_classes)
        by_held, held = list[Tensor](), list[float]()
        for told, _ in self._path(x[learn], y[learn], x[choose], remedy, self.cs()):
            by_held.append(told)
            held.append(percent_right(told.argmax(1), y[choose], remedy.balanced).item())
            best = max(range(len(held)), key=lambda i: (held[i], i))  # the last of equals: more may be as good
            if self.cs()[len(held) - 1] > BEYOND * self.cs()[best]:
                break
        by_test, converged = zip(*self._path(x, y, queries, remedy, self.cs()[: len(held)]), strict=True)
        right = [percent_right(told.argmax(1), truth).item() for told in by_test]
        chosen, values = best_of(held, by_held.__getitem__, y[choose]), [f"{c:.3g}" for c in self.cs()[: len(held)]]
        each = zip(values, held, right, strict=True)
        also = {
            "C": values[chosen],
            "held_out": round(held[chosen], 4),
            "best_C_on_test": values[right.index(max(right))],
            "values": {
                c: {"held_out": round(by_choice, 4), "test": round(by_truth, 4)} for c, by_choice, by_truth in each
            },
        }
        late = [c for c, done in zip(values, converged, strict=True) if not done]
        notes = (f"not converged after {self.iterations} iterations: C = {', '.join(late)}",) if late else ()
        temperature = fit_temperature(by_held[chosen], y[choose])
        return Picked(by_test[chosen], also, max(right), temperature, notes)

    def cs(self) -> list[float]:
        """Values of C, from strong to weak penalties."""
        return np.logspace(*POWERS, self.c_values).tolist()

    def _path(
        self, x: Tensor, y: Tensor, queries: Tensor, remedy: Remedy, cs: list[float]
    ) -> Iterator[tuple[Tensor, bool]]:
        """For each of ``cs`` the logits of ``queries`` and whether it converged; it starts where the last ended."""
        model = solver(self.balance, self.iterations)
        for c in tqdm(cs, desc="logistic regression", unit="C", leave=False, disable=None):
            converged = fit(model, x, y, c)
            yield told_by(model, queries, len(remedy.shift)) + remedy.shift, converged

    def _estimate(self, x: Tensor, classes: int) -> str:
        """How long both sweeps take, by the time of the two products of an iteration."""
        rows = max(1, min(len(x), PROBE // (x.shape[1] * classes)))
        weight = torch.zeros(x.shape[1], classes, dtype=x.dtype)
        started = time.perf_counter()
        x[:rows].T @ (x[:rows] @ weight)
        seconds = (time.perf_counter() - started) * len(x) / rows * TYPICAL * 2 * self.c_values
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

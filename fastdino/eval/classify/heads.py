"""Many linear classifiers of the same features, trained together: their weights lie side by side in one matrix.

Below: B images, H heads, C classes, D numbers of an image's features, of which each head reads some.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdino.data.sampler import epoch_order
from fastdino.eval.classify.calibration import Remedy, best_of, fit_temperature, percent_right
from fastdino.eval.features import EvaluationError, Features

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates of DINOv2's sweep, for batches of RATE_BATCH images; they grow with the batch."""
RATE_BATCH = 256
MOMENTUM = 0.9
INIT_STD = 0.01  # of a weight; biases start at 0
MAX_ELEMENTS = 2**27  # of one block of logits: 0.5 GB of fp32


class Part(NamedTuple):
    """Heads that read the same columns of the features, R of them or one."""

    columns: slice
    weight: Tensor  # (d, R * C)
    bias: Tensor  # (R * C,)


class Heads:
    """H = parts * R linear classifiers, each as if it were trained alone.

    Args:
        parts: by name, which columns of the features a head reads; each is read by as many heads as there are rates.
        rates: of learning, at the peak, for a batch of RATE_BATCH images.
        num_classes: C.
        seed: of the first values.
        like: the weights have its device and dtype.

    The loss is the sum of the heads' cross-entropies, so no head knows of the others: one that diverges stays alone.
    Stacked, they are a product for each part rather than one for each head (DINOv2's eval/linear.py has 52).
    """

    def __init__(
        self, parts: dict[str, slice], rates: Sequence[float], num_classes: int, *, seed: int, like: Tensor
    ) -> None:
        self.num_classes, self.rates = num_classes, tuple(rates)
        self.names = [f"{part}, rate {rate:g}" for part in parts for rate in rates]
        generator = torch.Generator().manual_seed(seed)
        self.parts = []
        for columns in parts.values():
            shape = columns.stop - columns.start, len(rates) * num_classes
            weight = torch.empty(shape).normal_(0, INIT_STD, generator=generator)
            self.parts.append(Part(columns, weight.to(like), like.new_zeros(shape[1])))
        self._velocity = [[torch.zeros_like(x) for x in part[1:]] for part in self.parts]
        self._rates = like.new_tensor(self.rates).repeat_interleave(num_classes)  # (R * C,)

    def __len__(self) -> int:
        return len(self.names)

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, H, C)."""
        each = [torch.addmm(bias, features[:, columns], weight) for columns, weight, bias in self.parts]
        return torch.cat(each, dim=1).unflatten(1, (len(self), self.num_classes))

    def step(self, features: Tensor, labels: Tensor, factor: float, weights: Tensor | None = None) -> None:
        """SGD with momentum, no weight decay, on one batch; torch.optim.SGD written out.

        Args:
            features: (B, D).
            labels: (B,) int64.
            factor: of each rate: the schedule's, times B / RATE_BATCH.
            weights: (C,) of an image in the mean over the batch, by its class; None: all the same.
        """
        gradient = self.logits(features).softmax(dim=-1)  # of the cross-entropy by the logits
        gradient[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        share = torch.ones_like(features[:, 0]) if weights is None else weights[labels]
        gradient *= (share / share.sum())[:, None, None]
        by_part = gradient.flatten(1).chunk(len(self.parts), dim=1)  # (B, R * C) each
        for (columns, *values), g, velocity in zip(self.parts, by_part, self._velocity, strict=True):
            by_value = features[:, columns].T @ g, g.sum(0)
            for value, grad, v in zip(values, by_value, velocity, strict=True):
                v.mul_(MOMENTUM).add_(grad)
                value.addcmul_(v, self._rates, value=-factor)

    def finite(self) -> list[bool]:
        """Of each head, whether it has no weight that is infinite or not a number."""
        columns = [weight.isfinite().all(0) & bias.isfinite() for _, weight, bias in self.parts]
        return torch.cat(columns).view(len(self), self.num_classes).all(dim=1).tolist()

    def one(self, head: int) -> Part:
        """A head alone: weight (d, C), bias (C,)."""
        part, place = divmod(head, len(self.rates))
        columns, weight, bias = self.parts[part]
        own = slice(place * self.num_classes, (place + 1) * self.num_classes)
        return Part(columns, weight[:, own], bias[own])

    def told(self, head: int, features: Tensor) -> Tensor:
        """(n, D) -> (n, C) logits of one head."""
        columns, weight, bias = self.one(head)
        return torch.addmm(bias, features[:, columns], weight)

    def scores(self, features: Tensor, labels: Tensor, shift: Tensor, balanced: bool = False) -> Tensor:
        """Percent of (n, D) features whose class each head tells, (H,) fp64; ``balanced``: the mean over classes.

        ``shift`` (C,) is added to the logits. A head that diverged has minus infinity.
        """
        rows = max(1, MAX_ELEMENTS // (len(self) * self.num_classes))
        told = [(self.logits(block) + shift.to(block)).argmax(dim=-1) for block in features.split(rows)]
        percent = percent_right(torch.cat(told), labels, balanced)
        return torch.where(torch.tensor(self.finite(), device=percent.device), percent, -math.inf)


class Training(NamedTuple):
    """How heads are trained."""

    parts: dict[str, slice]
    """Which columns of the features they read, by name."""
    rates: tuple[float, ...]
    batch: int
    steps: int
    epoch: int
    """Steps of one."""
    seed: int
    """Of first values and of the order of the images."""
    by_epoch: bool = False
    """The learning rate changes with each epoch rather than with each step."""

    def heads(self, num_classes: int, like: Tensor) -> Heads:
        """Heads that have not learned."""
        return Heads(self.parts, self.rates, num_classes, seed=self.seed, like=like)

    def factor(self, step: int) -> float:
        """Of the rates: half a cosine from 1 towards 0, and in proportion to the batch."""
        start = step // self.epoch * self.epoch if self.by_epoch else step
        return (1 + math.cos(math.pi * start / self.steps)) / 2 * self.batch / RATE_BATCH

    def order(self, num_images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Epochs and images of each step's batch, int64 (batch,): an epoch begins in the batch where one ends."""
        for step in range(self.steps):
            epochs, places = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), num_images)
            each = [
                epoch_order(self.seed, int(epoch), num_images)[places[epochs == epoch]] for epoch in np.unique(epochs)
            ]
            yield epochs, np.concatenate(each)


Batch = tuple[Tensor, Tensor, Tensor]
"""Features (B, D) and labels (B,), and places (B,) among the training images, which are on the CPU."""


def train(
    groups: list[tuple[Heads, Tensor]], batches: Iterator[Batch], training: Training, weights: Tensor | None = None
) -> Iterator[int]:
    """Trains groups of heads, each on the images that its (n,) mask has, and counts the epochs as they end.

    ``weights``: see :meth:`Heads.step`.
    """
    with tqdm(total=training.steps, desc="linear heads", unit="step", leave=False, disable=None) as bar:
        for step, (features, labels, places) in enumerate(batches):
            for heads, learns in groups:
                rows = learns[places].nonzero().flatten().to(labels.device)
                if len(rows):
                    heads.step(features[rows], labels[rows], training.factor(step), weights)
            bar.update()
            if (step + 1) % training.epoch == 0:
                yield (step + 1) // training.epoch


class Picked(NamedTuple):
    """A classifier that was chosen among several, and what it tells."""

    logits: Tensor
    """(n, C), of the test images."""
    also: dict[str, Any]
    """For the result: which it is."""
    best: float
    """Percent of the test images that the best of all on these tells."""
    temperature: float | None = None
    notes: tuple[str, ...] = ()


def best_on_held_out(
    batches: Iterator[Batch], training: Training, learn: Tensor, held: Features, test: Features, remedy: Remedy
) -> Picked:
    """Of heads that learn from all images, the one whose twin, which learns from some, tells the held-out ones best.

    See :func:`best_of`. Both see the same batches, of which the twins leave out what they do not learn from.

    Args:
        learn: (n,) bool, the training images from which the twins learn.
        held: features of the others.
    """
    final, twins = (training.heads(len(remedy.shift), test.vectors) for _ in range(2))
    weights = None if remedy.weights is None else remedy.weights.to(test.vectors)
    for _ in train([(final, torch.ones_like(learn)), (twins, learn)], batches, training, weights):
        pass
    by_test = final.scores(test.vectors, test.labels, remedy.shift)
    by_held = twins.scores(held.vectors, held.labels, remedy.shift, remedy.balanced)
    by_held[by_test.isinf()] = -math.inf
    lost = [name for name, score in zip(final.names, by_held.tolist(), strict=True) if math.isinf(score)]
    if len(lost) == len(final):
        raise EvaluationError("every head diverged: the features are not finite, or the rates are far too high")

    def held_logits(head: int) -> Tensor:
        return twins.told(head, held.vectors) + remedy.shift.to(held.vectors)

    head = best_of(by_held.tolist(), held_logits, held.labels)
    logits = final.told(head, test.vectors) + remedy.shift.to(test.vectors)
    temperature = fit_temperature(held_logits(head), held.labels)
    each = zip(final.names, by_held.tolist(), by_test.tolist(), strict=True)
    also = {
        "head": final.names[head],
        "held_out": round(by_held[head].item(), 4),
        "best_head_on_test": final.names[int(by_test.argmax())],
        "heads": {name: {"held_out": round(a, 4), "test": round(b, 4)} for name, a, b in each if name not in lost},
    }
    notes = (f"{len(lost)} of {len(final)} heads diverged and are left out: {', '.join(lost)}",) if lost else ()
    return Picked(logits, also, by_test.max().item(), temperature, notes)


def best_on_test(
    batches: Iterator[Batch], training: Training, num_images: int, test: Features, remedy: Remedy
) -> Picked:
    """The best on the test images, as papers report it: of the heads, and where rates change by the epoch, of epochs.

    Each learns from all of ``num_images``.
    """
    heads = training.heads(len(remedy.shift), test.vectors)
    picked = None
    for epoch in chain(train([(heads, torch.ones(num_images, dtype=torch.bool))], batches, training), ("last",)):
        if training.by_epoch or epoch == "last":
            scores = heads.scores(test.vectors, test.labels, remedy.shift)
            head, most = int(scores.argmax()), scores.max().item()
            if picked is None or most > picked.best:
                name = f"{heads.names[head]}, epoch {epoch}" if training.by_epoch else heads.names[head]
                picked = Picked(heads.told(head, test.vectors), {"head": name}, most)
    assert picked is not None
    return picked

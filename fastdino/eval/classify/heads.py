"""Many linear classifiers of the same features, trained together: their weights lie side by side in one matrix.

Below: B images, H heads, C classes, D numbers of an image's features, of which each head reads some.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdino.data.sampler import epoch_order

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates of DINOv2's sweep, for batches of RATE_BATCH images; they grow with the batch."""
RATE_BATCH = 256
MOMENTUM = 0.9
INIT_STD = 0.01  # of a weight; biases start at 0
MAX_ELEMENTS = 2**27  # of one block of logits: 0.5 GB of fp32


class Part(NamedTuple):
    """Heads that read the same columns of the features, one for each learning rate."""

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
        like: its device and dtype are those of the weights.

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
        gradient[torch.arange(len(labels)), :, labels] -= 1
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

    def one(self, head: int) -> "Heads":
        """A head alone."""
        part, place = divmod(head, len(self.rates))
        columns, *values = self.parts[part]
        own = slice(place * self.num_classes, (place + 1) * self.num_classes)
        alone = Heads.__new__(Heads)
        alone.num_classes, alone.rates, alone.names = self.num_classes, self.rates[place:][:1], self.names[head:][:1]
        alone.parts = [Part(columns, *(value[..., own] for value in values))]
        return alone

    def blocks(self, features: Tensor) -> Iterator[Tensor]:
        """:meth:`logits` of any number of images, which may lie elsewhere, by blocks of rows: bounded memory."""
        rows = max(1, MAX_ELEMENTS // (len(self) * self.num_classes))
        for block in features.split(rows):
            yield self.logits(block.to(self.parts[0].weight))

    def predict(self, features: Tensor, shift: Tensor | None = None) -> Tensor:
        """(n, D) -> (n, H) int64 classes. ``shift`` (C,) is added to the logits."""
        blocks = self.blocks(features)
        return torch.cat([(x if shift is None else x + shift.to(x)).argmax(dim=-1) for x in blocks])


def cosine(step: int, num_steps: int) -> float:
    """Factor of the learning rates in a step: 1 at the first, towards 0 at the last (torch's CosineAnnealingLR)."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def order(num_images: int, batch: int, num_steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of epochs and images, int64 (batch,) each, all full: an epoch begins in the batch where one ends."""
    for step in range(num_steps):
        epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), num_images)
        each = [epoch_order(seed, int(epoch), num_images)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        yield epochs, np.concatenate(each)

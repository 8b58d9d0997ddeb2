"""The losses and targets written out: loops over views, images and patches, in float64, with none of our kernels."""

import math

import torch
from torch import Tensor

from fastdino.model import Outputs


def centered(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """(R, K) targets: softmax((logits - center) / temp), row by row."""
    rows = []
    for row in logits:
        e = torch.exp((row - center) / temp - ((row - center) / temp).max())
        rows.append(e / e.sum())
    return torch.stack(rows)


def balanced(logits: Tensor, temp: float) -> Tensor:
    """(R, K) targets as DINOv2 writes Sinkhorn-Knopp: with all its divisions, on the whole matrix."""
    q = torch.exp(logits / temp).T
    num_prototypes, num_samples = q.shape
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_samples
    return (q * num_samples).T


def cross_entropy(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    """-sum of target * log softmax(logits / temp), of one row."""
    x = logits / temp
    return -(target * (x - torch.log(torch.exp(x - x.max()).sum()) - x.max())).sum()


def dino(made: Outputs, targets: Tensor, temp: float) -> Tensor:
    """Mean over images and pairs of a teacher view and another student view; ``targets`` (2, B, K)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(2):
        for j in range(len(made.cls_points)):
            for b in range(targets.shape[1]):
                if i != j:
                    total = total + cross_entropy(targets[i, b], made.prototypes @ made.cls_points[j, b], temp)
                    count += 1
    return total / count


def ibot(made: Outputs, targets: Tensor, hidden: Tensor, temp: float) -> Tensor:
    """Mean over a view's hidden patches, then over the 2B global views; a view that hides none adds 0."""
    total, at = torch.zeros((), dtype=torch.float64), 0
    for view in hidden:  # (N,)
        num_hidden = int(view.sum())
        for _ in range(num_hidden):
            logits = made.patch_prototypes @ made.patch_points[at]
            total = total + cross_entropy(targets[at], logits, temp) / num_hidden / len(hidden)
            at += 1
    assert at == len(made.patch_points) == len(targets)
    return total


def koleo(made: Outputs) -> Tensor:
    """Summed over the two global views: minus the mean log distance to the nearest other image of that view."""
    total = torch.zeros((), dtype=torch.float64)
    for view in made.cls[:2]:
        unit = [x / x.norm() for x in view]
        for i, x in enumerate(unit):
            others = [y for j, y in enumerate(unit) if j != i]
            nearest = max(others, key=lambda y: float((x @ y).detach()))
            total = total - torch.log((x - nearest).norm() + 1e-8) / len(unit)
    return total


def entropy(p: Tensor) -> float:
    """In nats."""
    return -sum(float(x) * math.log(x) for x in p.flatten() if x > 0)

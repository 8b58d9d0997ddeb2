"""How well a ranking finds what shows the same thing: average precision in its two versions, and shares of the top.

Everything here reads ``ranked``, uint8 (q, n): of each query what the images are that it ranks, the best first, as
RIGHT, HARD (right, but difficult), JUNK (neither right nor wrong: taken out of the ranking before it is judged) or
WRONG. The figures are fp64 (q,), NaN for a query to which nothing is right.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WRONG, RIGHT, HARD, JUNK = range(4)
MAX_ELEMENTS = 2**24  # of one block of similarities: with what is counted in it, 0.5 GB

Truth = Callable[[range], Tensor]
"""Some of the queries become uint8 (queries, database), what each image is to them, on the CPU."""

SETUPS = {"easy": ({RIGHT}, {HARD, JUNK}), "medium": ({RIGHT, HARD}, {JUNK}), "hard": ({HARD}, {RIGHT, JUNK})}
"""What is right and what is junk in the three setups of the revisited Oxford and Paris (Radenovic et al. 2018)."""


def rankings(
    queries: Tensor, database: Tensor, truth: Truth, top: int | None = None
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Blocks of queries, their int64 (q, n) ranking of the database and uint8 (q, n) ``ranked``, both on the CPU.

    Args:
        queries: (Q, D), L2-normalised.
        database: (n, D), L2-normalised, on the same device.
        truth: what the images are to a query.
        top: only that many of each ranking.

    Of equally similar images the first in the database is ranked first.
    """
    rows = max(1, MAX_ELEMENTS // max(1, len(database)))
    for start in range(0, len(queries), rows):
        block = range(start, min(start + rows, len(queries)))
        similar = queries[block.start : block.stop] @ database.T
        order = similar.sort(dim=1, descending=True, stable=True).indices[:, :top].cpu()
        yield block, order, truth(block).gather(1, order)


def in_setup(ranked: Tensor, setup: str) -> Tensor:
    """``ranked`` as one of SETUPS has it: RIGHT, JUNK and WRONG alone."""
    right, junk = SETUPS[setup]
    becomes = torch.tensor([RIGHT if kind in right else JUNK if kind in junk else WRONG for kind in range(4)])
    return becomes.to(torch.uint8)[ranked.long()]


def average_precision(ranked: Tensor, num_right: Tensor | None = None) -> Tensor:
    """Area under precision over recall by trapezoids, as Oxford, Paris, Holidays and Copydays are judged by.

    The precision before the j-th right image (from 0) at rank r (from 0) is j / r, or 1 at rank 0; after it
    (j + 1) / (r + 1). The mean of both counts 1 / num_right. One right image at rank 1: (0 + 1/2) / 2 = 0.25.

    Args:
        ranked: see the module.
        num_right: (q,) how many there are, where ``ranked`` is only the top; default: those in it.
    """
    hit, found, kept = _counts(ranked)
    rank = kept - 1
    before = torch.where(rank > 0, (found - 1) / rank.clamp(min=1), 1.0)
    return _mean_of_hits((before + found / kept.clamp(min=1)) / 2, hit, num_right)


def precision_of_hits(ranked: Tensor, first: Tensor | int | None = None, num_right: Tensor | None = None) -> Tensor:
    """Sum of the precision at each right image of the ``first`` ranks, / the smaller of ``first`` and num_right.

    Without ``first`` it is the average precision of scikit-learn. With 100 it is that of Google Landmarks v2; with
    num_right, mAP@R (Musgrave et al. 2020). One right image at rank 1 of 2: 1/2.

    Args:
        ranked: see the module.
        first: ranks that count, junk apart; of all queries, or (q,) of each.
        num_right: as of :func:`average_precision`.
    """
    hit, found, kept = _counts(ranked)
    right = hit.sum(1) if num_right is None else num_right
    if first is not None:
        limit = torch.as_tensor(first).expand(len(ranked))
        hit, right = hit & (kept <= limit.unsqueeze(1)), right.minimum(limit)
    return _mean_of_hits(found / kept.clamp(min=1), hit, right)


def found_in(ranked: Tensor, first: int) -> Tensor:
    """Recall@k: 1 where one of the ``first`` images or more is right, junk apart, else 0."""
    hit, _, kept = _counts(ranked)
    found = (hit & (kept <= first)).any(1).double()
    return found.where(hit.any(1), torch.nan)


def precision_at(ranked: Tensor, first: int) -> Tensor:
    """mP@k of the revisited protocol: the share that is right of the ``first`` images, junk apart.

    Of fewer where the last right image comes before: a query with 2 right images, both on top, has 1 at any k.
    """
    hit, _, kept = _counts(ranked)
    last = (kept * hit).amax(1).clamp(max=first).unsqueeze(1)
    return (hit & (kept <= last)).sum(1) / last.squeeze(1).double().where(hit.any(1), torch.nan)


def _counts(ranked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per place: whether it is right; up to it, how many are right, and how many are not junk."""
    hit, kept = ranked == RIGHT, ranked != JUNK
    return hit, hit.cumsum(1).double(), kept.cumsum(1).double()


def _mean_of_hits(precision: Tensor, hit: Tensor, num_right: Tensor | None) -> Tensor:
    right = (hit.sum(1) if num_right is None else num_right).double()
    return (precision * hit).sum(1) / right.where(right > 0, torch.nan)

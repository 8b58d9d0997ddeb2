"""Sequences of several lengths in one row of tokens, so that each linear layer runs once for all of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdino.model.attention import Lengths, measured, starts_of

PACKED: dict[str, bool] = {}
"""Whether views of all sizes go through a network at once, by a part of a GPU's name: what is faster in
bench/results/step-*.json, as bench.report writes it. Where nothing was measured they do: it launches less."""


def is_packed(choice: str, device: torch.device) -> bool:
    """What model.packed comes to on a device."""
    if choice != "auto" or device.type != "cuda":
        return choice != "off"
    return measured(PACKED, device) is not False


class Reading(NamedTuple):
    """The rows of a block's output that are read: the first of every sequence, its CLS, then patches of group one.

    A group of which CLS alone is read asks one query per sequence. One of which patches are read asks all of its own:
    how many are read of a sequence varies, and sequences of one length need no ragged mask.
    """

    queries: Lengths
    starts: Tensor
    """(sequences + 1,) int32, where the queries of each sequence begin, and their number."""
    asking: Tensor
    """(queries,) the tokens whose queries are computed."""
    rows: Tensor
    """(read,) the tokens that are read."""
    answers: Tensor | None
    """(read,) the same, as indices into ``asking``; None where each query is read."""
    sequence: Tensor | None
    """(read,) the sequence of each; None where each sequence is read once."""


class Subset(NamedTuple):
    """The sequences that a branch runs on, in a packing of their own: group after group, in the order of the rows."""

    whole: "Packing"
    rows: list[Tensor]
    """Per group (M,) int64, in no order."""
    packing: "Packing"

    def tokens(self) -> Tensor:
        """Where in the whole batch their tokens lie."""
        lengths = self.whole.lengths
        tokens = torch.arange(len(self.whole.sequence), device=self.whole.sequence.device)
        groups = zip(tokens.split([n * each for n, each in lengths]), lengths, self.rows, strict=True)
        return torch.cat([group.view(shape).index_select(0, rows).flatten() for group, shape, rows in groups])


Drop = Tensor | Subset | None
"""What drop path leaves of a residual branch: a factor for each of its rows, (rows, 1), 0 or 1 / (1 - p); the sequences
that it runs on; None: all of it."""


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie. It depends on shapes alone and is kept between steps."""

    lengths: Lengths
    starts: Tensor
    """(sequences + 1,) int32, where each sequence begins, and the number of tokens."""
    first: Tensor
    """(sequences,) the token with which each sequence begins, its CLS."""
    sequence: Tensor
    """(tokens,) the sequence that each token belongs to."""

    @property
    def num_sequences(self) -> int:
        """Sequences of all groups."""
        return sum(sequences for sequences, _ in self.lengths)

    def reading(self, patches: Tensor | None, num_prefix: int) -> Reading:
        """The CLS of every sequence, and ``patches`` of the first group.

        Args:
            patches: (M,) int64 indices into the patches of the first group, its sequences one after the other.
            num_prefix: tokens of a sequence before its patches.
        """
        if patches is None:
            queries = tuple((sequences, 1) for sequences, _ in self.lengths)
            return Reading(queries, starts_of(queries, self.first.device), self.first, self.first, None, None)
        tokens = self.lengths[0][1]
        sequence = patches // (tokens - num_prefix)
        rows = patches + num_prefix * (sequence + 1)
        asking, answers, cls = _asking(self.lengths, self.first.device)
        queries = (self.lengths[0], *((sequences, 1) for sequences, _ in self.lengths[1:]))
        return Reading(
            queries,
            starts_of(queries, self.first.device),
            asking,
            torch.cat([self.first, rows]),
            torch.cat([answers, rows]),  # the first group comes first in both
            torch.cat([cls, sequence]),
        )

    def draw_factors(self, rates: Sequence[float], dtype: torch.dtype) -> Tensor:
        """(blocks, 2, sequences, 1): drop path's factors of both branches of blocks with these ``rates``, all at once.

        A sequence keeps a branch with probability 1 - rate, times 1 / (1 - rate).
        """
        keep = _keep(tuple(rates), dtype if dtype == torch.float64 else torch.float32, self.first.device)
        return torch.bernoulli(keep.expand(-1, 2, self.num_sequences, 1)).div_(keep).to(dtype)

    def draw_subsets(self, rate: float, count: int) -> list[Subset]:
        """``count`` draws of max(1, int(n * (1 - rate))) of the n sequences of each group, uniformly, all at once."""
        lengths = tuple((max(1, int(sequences * (1 - rate))), tokens) for sequences, tokens in self.lengths)
        packing = packing_of(lengths, self.first.device)
        drawn = []  # per group (count, kept)
        for (sequences, _), (kept, _) in zip(self.lengths, lengths, strict=True):
            order = torch.rand(count, sequences, device=self.first.device).argsort(dim=1)
            drawn.append(order[:, :kept].unbind())
        return [Subset(self, list(rows), packing) for rows in zip(*drawn, strict=True)]

    def per_token(self, x: Tensor, reading: Reading | None = None) -> Tensor:
        """(.., sequences, 1) -> (.., tokens, 1), each sequence's value for its tokens, or for those that are read."""
        sequence = self.sequence if reading is None else reading.sequence
        return x if sequence is None else x.index_select(-2, sequence)


@functools.lru_cache(maxsize=64)
def packing_of(lengths: Lengths, device: torch.device) -> Packing:
    """The packing of groups of (sequences, tokens of each), the sequences of each group one after the other."""
    with torch.inference_mode(False):  # kept between calls, so they must not be inference tensors
        sequence, first, first_sequence, first_token = [], [], 0, 0
        for sequences, tokens in lengths:
            index = torch.arange(sequences, device=device)
            sequence.append((first_sequence + index).unsqueeze(1).expand(-1, tokens).flatten())
            first.append(first_token + tokens * index)
            first_sequence, first_token = first_sequence + sequences, first_token + sequences * tokens
        return Packing(lengths, starts_of(lengths, device), torch.cat(first), torch.cat(sequence))


@functools.lru_cache(maxsize=64)
def _keep(rates: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(blocks, 1, 1, 1) probabilities of keeping a branch."""
    with torch.inference_mode(False):
        return torch.tensor([1 - rate for rate in rates], dtype=dtype, device=device).view(-1, 1, 1, 1)


@functools.lru_cache(maxsize=64)
def _asking(lengths: Lengths, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the first group asks all its queries: the tokens that ask, each CLS among them, each sequence's number."""
    with torch.inference_mode(False):
        sequences, tokens = lengths[0]
        first = packing_of(lengths, device).first
        number = torch.arange(len(first), device=device)
        asking = torch.cat([torch.arange(sequences * tokens, device=device), first[sequences:]])
        answers = torch.cat([first[:sequences], sequences * (tokens - 1) + number[sequences:]])
        return asking, answers, number

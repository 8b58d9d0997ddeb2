"""Sequences of several lengths in one row of tokens, so that each linear layer runs once for all of them."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdino.model.attention import Lengths


class Reading(NamedTuple):
    """The rows of a block's output that are read: the first of every sequence, its CLS, then patches of group one.

    A group of which CLS alone is read asks one query per sequence. One of which patches are read asks all of its own:
    how many are read of a sequence varies, and sequences of one length need no ragged mask.
    """

    queries: Lengths
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


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie. It depends on shapes alone and is kept between steps."""

    lengths: Lengths
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
            return Reading(queries, self.first, self.first, None, None)
        tokens = self.lengths[0][1]
        sequence = patches // (tokens - num_prefix)
        rows = patches + num_prefix * (sequence + 1)
        asking, answers, cls = _asking(self.lengths, self.first.device)
        return Reading(
            (self.lengths[0], *((sequences, 1) for sequences, _ in self.lengths[1:])),
            asking,
            torch.cat([self.first, rows]),
            torch.cat([answers, rows]),  # the first group comes first in both
            torch.cat([cls, sequence]),
        )

    def draw(self, drop: float) -> Subset:
        """max(1, int(n * (1 - drop))) of the n sequences of each group, uniformly: as many at every call."""
        lengths = tuple((max(1, int(sequences * (1 - drop))), tokens) for sequences, tokens in self.lengths)
        drawn = [torch.randperm(sequences, device=self.first.device) for sequences, _ in self.lengths]
        rows = [order[:kept] for order, (kept, _) in zip(drawn, lengths, strict=True)]
        return Subset(self, rows, _packing(lengths, self.first.device))

    def per_token(self, x: Tensor, reading: Reading | None = None) -> Tensor:
        """(sequences, ..) -> (tokens, ..), each sequence's value for its tokens, or for those that are read."""
        sequence = self.sequence if reading is None else reading.sequence
        return x if sequence is None else x[sequence]


def pack(groups: list[Tensor]) -> tuple[Tensor, Packing]:
    """(sequences, tokens, D) per group -> (1, all tokens, D) and where each sequence lies in it."""
    lengths = tuple((x.shape[0], x.shape[1]) for x in groups)
    packed = torch.cat([x.flatten(0, 1) for x in groups]).unsqueeze(0)
    return packed, _packing(lengths, packed.device)


@functools.lru_cache(maxsize=64)
def _packing(lengths: Lengths, device: torch.device) -> Packing:
    with torch.inference_mode(False):  # kept between calls, so they must not be inference tensors
        sequence, first, first_sequence, first_token = [], [], 0, 0
        for sequences, tokens in lengths:
            index = torch.arange(sequences, device=device)
            sequence.append((first_sequence + index).unsqueeze(1).expand(-1, tokens).flatten())
            first.append(first_token + tokens * index)
            first_sequence, first_token = first_sequence + sequences, first_token + sequences * tokens
        return Packing(lengths, torch.cat(first), torch.cat(sequence))


@functools.lru_cache(maxsize=64)
def _asking(lengths: Lengths, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the first group asks all its queries: the tokens that ask, each CLS among them, each sequence's number."""
    with torch.inference_mode(False):
        sequences, tokens = lengths[0]
        first = _packing(lengths, device).first
        number = torch.arange(len(first), device=device)
        asking = torch.cat([torch.arange(sequences * tokens, device=device), first[sequences:]])
        answers = torch.cat([first[:sequences], sequences * (tokens - 1) + number[sequences:]])
        return asking, answers, number

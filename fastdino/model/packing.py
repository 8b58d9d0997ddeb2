"""Sequences of several lengths in one row of tokens, so that each linear layer runs once for all of them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdino.model.attention import Lengths


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie. It depends on shapes alone and is kept between steps."""

    lengths: Lengths
    first: Tensor | None
    """(sequences,) the token with which each sequence begins, its CLS; None where a sequence has no other."""
    sequence: Tensor | None
    """(tokens,) the sequence that each token belongs to; None where a sequence is one token."""

    @property
    def num_sequences(self) -> int:
        """Sequences of all groups."""
        return sum(sequences for sequences, _ in self.lengths)

    def first_tokens(self) -> "Packing":
        """What is left of this packing by :meth:`take_first`."""
        return Packing(tuple((sequences, 1) for sequences, _ in self.lengths), None, None)

    def take_first(self, x: Tensor) -> Tensor:
        """(1, tokens, ..) -> (1, sequences, ..), the first token of each sequence."""
        return x if self.first is None else x.index_select(1, self.first)

    def per_token(self, x: Tensor) -> Tensor:
        """(sequences, ..) -> (tokens, ..), each sequence's value repeated for its tokens."""
        return x if self.sequence is None else x[self.sequence]


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

"""Flat tensors: which elements of which parameter lie where in a rank's share of a group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastdino.engine.groups import Group

Values = Callable[[str, int, int], Tensor]
"""(name, start, stop) -> (stop - start,) fp32, elements of a flattened parameter."""
CHUNK = 2**22  # elements that are asked for at a time


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter ``name``, at ``offset`` of the flat tensor that holds them.

    ``tensors`` are live 1-D fp32 views: ``param`` (the master weight), ``ema`` (the teacher), and the optimizer's
    moments, ``exp_avg`` and ``exp_avg_sq`` (AdamW) or ``momentum_buffer`` (SGD, LARS). A parameter that is not trained
    has ``param`` and ``ema`` only, one tensor. Empty where only the place is meant.
    """

    name: str
    start: int
    stop: int
    offset: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    def view(self, flat: Tensor) -> Tensor:
        """Its elements of a flat tensor."""
        return flat[self.offset : self.offset + self.numel]


def fragments(group: Group, start: int, stop: int) -> list[Fragment]:
    """What elements [start, stop) of the group's flat tensor are; padding beyond its last parameter is nothing."""
    found, position = [], 0
    for name, param in group.params.items():
        low, high = max(start, position), min(stop, position + param.numel())
        if low < high:
            found.append(Fragment(name, low - position, high - position, low - start))
        position += param.numel()
    return found


def partitions(group: Group, parts: int, part: int) -> tuple[list[Fragment], int]:
    """Part ``part`` of each parameter of the group, one after another, and the elements that they take.

    A parameter's parts are equally long, so that what ``parts`` does not divide leaves padding behind the last of them.
    """
    found, offset = [], 0
    for name, param in group.params.items():
        size = -(-param.numel() // parts)
        start, stop = part * size, min((part + 1) * size, param.numel())
        if start < stop:
            found.append(Fragment(name, start, stop, offset))
        offset += size
    return found, offset


@dataclass(frozen=True)
class Shard:
    """This rank's share of a group: 1-D tensors of one length. What no fragment covers is padding."""

    param: Tensor  # fp32
    ema: Tensor  # fp32, the teacher
    fragments: list[Fragment]  # in the order of their offsets
    param_lp: Tensor | None  # copies in the precision of the forward pass; None where there is none to write
    ema_lp: Tensor | None

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of ``flat``, laid out like the shard, for each fragment."""
        return [fragment.view(flat) for fragment in self.fragments]

    def segments(self) -> Iterator[tuple[str | None, int]]:
        """The shard from end to end: (parameter, elements), and (None, elements) for padding, wherever it lies."""
        position = 0
        for fragment in self.fragments:
            if position < fragment.offset:
                yield None, fragment.offset - position
            yield fragment.name, fragment.numel
            position = fragment.offset + fragment.numel
        if position < self.param.numel():
            yield None, self.param.numel() - position


def views_of(flat: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Views of a flat tensor in the shapes of parameters that lie one after another in it."""
    sizes = [param.numel() for param in params]
    parts = flat[: sum(sizes)].split(sizes)  # what follows is padding
    return [part.view_as(param) for part, param in zip(parts, params, strict=True)]


def point_into(flat: Tensor, params: list[nn.Parameter]) -> None:
    """Makes parameters views of ``flat``, one after another. It takes their values, if they have any."""
    for view, param in zip(views_of(flat, params), params, strict=True):
        if param.is_meta:
            place(param, view)
        else:
            view.copy_(param.data)
            param.data = view


def place(param: nn.Parameter, tensor: Tensor) -> None:
    """Gives a parameter its elements; from the meta device too, where it stays the object that groups know."""
    if param.is_meta:
        torch.utils.swap_tensors(param, nn.Parameter(tensor, requires_grad=param.requires_grad))
    else:
        param.data = tensor


def cast(param: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
    """A parameter in ``dtype`` on the device; what was on the meta device has no values yet."""
    place(param, torch.empty_like(param, dtype=dtype, device=device) if param.is_meta else param.data.to(dtype))


def fill(flat: Tensor, fragments: list[Fragment], values: Values) -> None:
    """Writes the fragments' elements where they lie in ``flat``."""
    for fragment in fragments:
        for start in range(fragment.start, fragment.stop, CHUNK):
            part = values(fragment.name, start, min(start + CHUNK, fragment.stop))
            fragment.view(flat)[start - fragment.start :][: part.numel()].copy_(part)

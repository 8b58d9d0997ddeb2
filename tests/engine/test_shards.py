"""Flat shards: every element once, padding anywhere, views that are made once."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastdino.config import OptimConfig
from fastdino.distributed import Ranks
from fastdino.engine import shards
from fastdino.engine.groups import Group
from fastdino.engine.optimizer import OPTIMIZERS, Optimizer
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Fragment, Shard, fragments, partitions
from tests.engine.test_optimizer import Net, make_engine

SIZES = {"a": 5, "b": 1, "c": 12, "d": 3}
NOW = Now(lr=0.1, weight_decay=0.1, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)


def group() -> Group:
    return Group("decay", True, False, {name: nn.Parameter(torch.zeros(n)) for name, n in SIZES.items()})


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_fragments_cover_each_element_once(parts: int) -> None:
    size = -(-group().numel // parts)
    flat = torch.cat([torch.full((n,), ord(name) + 0.0) for name, n in SIZES.items()] + [torch.zeros(parts * size)])
    covered: dict[str, list[int]] = {name: [] for name in SIZES}
    for part in range(parts):
        shard = flat[part * size : (part + 1) * size]
        for fragment in fragments(group(), part * size, (part + 1) * size):
            assert fragment.start < fragment.stop
            assert (fragment.view(shard) == ord(fragment.name)).all()
            covered[fragment.name] += range(fragment.start, fragment.stop)
    assert covered == {name: list(range(n)) for name, n in SIZES.items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_partitions_cover_each_element_once_and_lie_alike_on_every_rank(parts: int) -> None:
    """Of a parameter with fewer elements than there are ranks, some hold padding alone."""
    covered: dict[str, list[int]] = {name: [] for name in SIZES}
    for part in range(parts):
        held, size = partitions(group(), parts, part)
        *offsets, end = itertools.accumulate((-(-n // parts) for n in SIZES.values()), initial=0)
        assert size == end
        for fragment in held:
            assert 0 < fragment.numel <= -(-SIZES[fragment.name] // parts)
            assert fragment.offset == offsets[list(SIZES).index(fragment.name)]
            covered[fragment.name] += range(fragment.start, fragment.stop)
    assert covered == {name: list(range(n)) for name, n in SIZES.items()}


def two_steps(name: Any, values: Tensor, grads: Tensor, gaps: dict[str, int]) -> tuple[list[Tensor], Tensor]:
    """Weights and teacher of each parameter after two clipped steps on a shard with ``gaps`` of padding behind each."""
    held, position = [], 0
    for parameter, size in SIZES.items():
        held.append(Fragment(parameter, 0, size, position))
        position += size + gaps.get(parameter, 0)
    optimizer: Optimizer = OPTIMIZERS[name]([group()], OptimConfig(name=name, clip=0.5))
    param, ema, grad = (torch.zeros(position) for _ in range(3))
    shard = Shard(nn.Parameter(param), ema, held, None, None)
    optimizer.bind([shard], sharded=True, ranks=Ranks(0, 1, 0, torch.device("cpu")))
    for flat, whole in ((param, values), (ema, values)):
        for view, part in zip(shard.views(flat), whole.split(list(SIZES.values())), strict=True):
            view.copy_(part)
    for _ in range(2):
        for view, part in zip(shard.views(grad), grads.split(list(SIZES.values())), strict=True):
            view.copy_(part)
        shard.param.grad = grad
        assert optimizer.prepare(NOW, [grad], torch.tensor(0.0))
        optimizer.step()
    return [*shard.views(param), *shard.views(ema)], optimizer.grad_norm


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("gaps", [{"a": 3}, {"b": 1, "c": 4}, {"a": 2, "d": 7}], ids=str)
def test_padding_may_lie_anywhere(name: str, gaps: dict[str, int]) -> None:
    """ZeRO 3 pads each parameter; a coefficient or a trust ratio must not reach the wrong neighbour for it."""
    torch.manual_seed(0)
    values, grads = torch.randn(sum(SIZES.values())), torch.randn(sum(SIZES.values()))
    grads[:5] *= 100  # clipped alone
    padded, padded_norm = two_steps(name, values, grads, gaps)
    plain, plain_norm = two_steps(name, values, grads, {})
    torch.testing.assert_close(padded_norm, plain_norm)
    for mine, wanted in zip(padded, plain, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_views_of_a_flat_tensor_are_made_once() -> None:
    """A checkpoint asks for all fragments while training waits: the work is linear in their number."""
    engine = make_engine(Net())
    with mock.patch.object(Shard, "views", autospec=True, side_effect=Shard.views) as views:
        found = list(engine.fragments())
    flats = {"param", "ema", *engine.optimizer.moments}
    assert views.call_count == len(flats) * len(engine.groups)
    assert {name for fragment in found for name in fragment.tensors} == flats


def test_values_are_asked_for_in_chunks_and_written_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 4)
    asked = []

    def values(name: str, start: int, stop: int) -> Tensor:
        asked.append((name, start, stop))
        return torch.arange(start, stop) + {"a": 100.0, "b": 200.0}[name]

    flat = torch.zeros(15)
    shards.fill(flat, [Fragment("a", 7, 16, offset=1), Fragment("b", 0, 3, offset=11)], values)
    assert asked == [("a", 7, 11), ("a", 11, 15), ("a", 15, 16), ("b", 0, 3)]
    assert flat.tolist() == [0, *range(107, 116), 0, 200, 201, 202, 0]

"""Stacked heads against heads that are trained one by one, and what must not reach from one to another."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.eval.classify import heads as room
from fastdino.eval.classify.heads import RATE_BATCH, RATES, Heads, cosine, order

D, C, B = 6, 3, 16
PARTS = {"last": slice(2, 4), "all": slice(0, 6)}
LIKE = torch.zeros((), dtype=torch.float64)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(B, D, generator=generator, dtype=torch.float64), torch.randint(C, (B,), generator=generator))
        for _ in range(count)
    ]


def trained(rates: tuple[float, ...], steps: int = 20, weights: Tensor | None = None) -> Heads:
    heads = Heads(PARTS, rates, C, seed=3, like=LIKE)
    for step, (x, y) in enumerate(batches(steps)):
        heads.step(x, y, cosine(step, steps) * B / RATE_BATCH, weights)
    return heads


@pytest.mark.parametrize(
    "weights", [None, torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)], ids=["plain", "weighed"]
)
def test_stacked_heads_are_heads_trained_one_by_one(weights: Tensor | None) -> None:
    """torch's own SGD, schedule and cross-entropy, a layer at a time, from the same first values."""
    rates, steps = (0.1, 3.0, 30.0), 20
    start, got = Heads(PARTS, rates, C, seed=3, like=LIKE), trained(rates, steps, weights)
    for head, name in enumerate(got.names):
        (columns, weight, bias), = start.one(head).parts  # fmt: skip
        layer = torch.nn.Linear(len(weight), C, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        rate = rates[head % len(rates)] * B / RATE_BATCH
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for x, y in batches(steps):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[:, columns]), y, weight=weights).backward()
            optimizer.step()
            schedule.step()
        (_, weight, bias), = got.one(head).parts  # fmt: skip
        torch.testing.assert_close(weight, layer.weight.T, rtol=0, atol=1e-13, msg=name)
        torch.testing.assert_close(bias, layer.bias, rtol=0, atol=1e-13, msg=name)
    assert got.names[0] == "last, rate 0.1"
    assert got.names[-1] == "all, rate 30"


def test_the_first_values() -> None:
    """Weights of N(0, 0.01), no two heads alike, biases 0."""
    heads = Heads({"wide": slice(0, 400)}, RATES, 20, seed=0, like=torch.zeros(()))
    (_, weight, bias), = heads.parts  # fmt: skip
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not bias.any()
    assert len(RATES) == len(heads) == 13
    assert not torch.equal(heads.one(0).parts[0].weight, heads.one(1).parts[0].weight)


def test_a_diverging_head_is_named_and_stays_alone() -> None:
    """The others become what they become without it."""
    wild, tame = (Heads(PARTS, (0.1, rate), C, seed=3, like=LIKE) for rate in (1e308, 1.0))
    for x, y in batches(20):
        wild.step(x, y, 1.0)
        tame.step(x, y, 1.0)
    assert wild.finite() == [True, False, True, False]
    for head in (0, 2):
        assert torch.equal(wild.one(head).parts[0].weight, tame.one(head).parts[0].weight)
    # Cross-entropy has a bounded slope: a rate that is merely absurd leaves large numbers, which lose on their merits.
    assert all(trained((0.1, 1e6)).finite())


def test_blocks_and_a_head_alone_predict_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, x = trained((0.1, 3.0)), torch.cat([x for x, _ in batches(3)])
    want = heads.logits(x)
    told = heads.predict(x)
    assert told.shape == (48, 4)
    monkeypatch.setattr(room, "MAX_ELEMENTS", 7 * 4 * C)  # 7 rows at a time
    assert [len(block) for block in heads.blocks(x)] == [7] * 6 + [6]
    assert torch.equal(heads.predict(x), told)
    for head in range(4):
        torch.testing.assert_close(torch.cat([*heads.one(head).blocks(x)])[:, 0], want[:, head])
    shift = torch.tensor([0.0, 0.0, 1e9])
    assert (heads.predict(x, shift) == 2).all()


def test_the_schedule() -> None:
    root = math.sqrt(0.5)
    assert [cosine(step, 4) for step in range(4)] == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2])


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    taken = [*order(num_images=10, batch=4, num_steps=5, seed=7)]
    epochs, images = (np.concatenate(column) for column in zip(*taken, strict=True))
    assert [len(batch) for _, batch in taken] == [4] * 5
    assert epochs.tolist() == [0] * 10 + [1] * 10
    first, second = images[:10].tolist(), images[10:].tolist()
    assert sorted(first) == sorted(second) == [*range(10)]
    assert first != second
    assert images[:4].tolist() == next(order(num_images=10, batch=4, num_steps=1, seed=7))[1].tolist()
    assert images[:4].tolist() != next(order(num_images=10, batch=4, num_steps=1, seed=8))[1].tolist()

"""Stacked heads against heads that are trained one by one, and what must not reach from one to another."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.eval import EvaluationError, Features
from fastdino.eval.classify import heads as room
from fastdino.eval.classify.calibration import Remedy
from fastdino.eval.classify.heads import (
    RATE_BATCH,
    RATES,
    Heads,
    Training,
    best_on_held_out,
    best_on_test,
    train,
)

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
    how = Training(PARTS, rates, B, steps, 1, seed=3)
    heads = how.heads(C, LIKE)
    for step, (x, y) in enumerate(batches(steps)):
        heads.step(x, y, how.factor(step), weights)
    return heads


@pytest.mark.parametrize(
    "weights", [None, torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)], ids=["plain", "weighed"]
)
def test_stacked_heads_are_heads_trained_one_by_one(weights: Tensor | None) -> None:
    """torch's own SGD, schedule and cross-entropy, a layer at a time, from the same first values."""
    rates, steps = (0.1, 3.0, 30.0), 20
    start, got = Heads(PARTS, rates, C, seed=3, like=LIKE), trained(rates, steps, weights)
    for head, name in enumerate(got.names):
        columns, weight, bias = start.one(head)
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
        _, weight, bias = got.one(head)
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
    assert not torch.equal(heads.one(0).weight, heads.one(1).weight)


def test_a_diverging_head_is_named_and_stays_alone() -> None:
    """The others become what they become without it."""
    wild, tame = (Heads(PARTS, (0.1, rate), C, seed=3, like=LIKE) for rate in (1e308, 1.0))
    for x, y in batches(20):
        wild.step(x, y, 1.0)
        tame.step(x, y, 1.0)
    assert wild.finite() == [True, False, True, False]
    for head in (0, 2):
        assert torch.equal(wild.one(head).weight, tame.one(head).weight)
    # Cross-entropy has a bounded slope: a rate that is merely absurd leaves large numbers, which lose on their merits.
    assert all(trained((0.1, 1e6)).finite())


def test_blocks_and_a_head_alone_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, x, y = trained((0.1, 3.0)), *(torch.cat(part) for part in zip(*batches(3), strict=True))
    want, none = heads.logits(x), torch.zeros(C)
    scores = heads.scores(x, y, none)
    sizes = []
    monkeypatch.setattr(heads, "logits", lambda block: sizes.append(len(block)) or want[: len(block)])
    monkeypatch.setattr(room, "MAX_ELEMENTS", 7 * 4 * C)
    heads.scores(x, y, none)
    assert sizes == [7] * 6 + [6], "rows at a time"
    monkeypatch.undo()
    for head in range(4):
        torch.testing.assert_close(heads.told(head, x), want[:, head])
        right = (want[:, head].argmax(1) == y).double().mean()
        assert scores[head].item() == pytest.approx(100 * right.item())


def test_scores() -> None:
    """Told always the first class: 3 of 4 right, balanced half; shifted, the second: 1 of 4."""
    heads = Heads({"all": slice(0, 1)}, (0.1, 1.0), 2, seed=0, like=LIKE)
    for value in heads.parts[0][1:]:
        value.zero_()
    heads.parts[0].bias[:] = torch.tensor([1.0, 0.0, math.nan, 0.0])
    x, y = torch.zeros(4, 1, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    assert heads.scores(x, y, torch.zeros(2)).tolist() == [75, -math.inf]
    assert heads.scores(x, y, torch.zeros(2), balanced=True).tolist() == pytest.approx([50, -math.inf])
    assert heads.scores(x, y, torch.tensor([0.0, 2.0])).tolist() == [25, -math.inf]


def training(batch: int, steps: int, epoch: int, rates: tuple[float, ...] = (0.1, 3.0), seed: int = 7) -> Training:
    return Training(PARTS, rates, batch, steps, epoch, seed)


def test_the_schedule() -> None:
    """Half a cosine, in proportion to the batch; by epochs for DINO v1."""
    root, by_step = math.sqrt(0.5), training(512, 4, 2)
    want = [2, 1 + root, 1, 1 - root]
    assert [by_step.factor(step) for step in range(4)] == pytest.approx(want)
    assert [by_step._replace(by_epoch=True).factor(step) for step in range(4)] == pytest.approx([2, 2, 1, 1])


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    taken = [*training(4, 5, 3).order(10)]
    epochs, images = (np.concatenate(column) for column in zip(*taken, strict=True))
    assert [len(batch) for _, batch in taken] == [4] * 5
    assert epochs.tolist() == [0] * 10 + [1] * 10
    first, second = images[:10].tolist(), images[10:].tolist()
    assert sorted(first) == sorted(second) == [*range(10)]
    assert first != second
    for seed, same in ((7, True), (8, False)):
        assert (next(training(4, 1, 3, seed=seed).order(10))[1].tolist() == images[:4].tolist()) == same


def stream(x: Tensor, y: Tensor, how: Training) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for _, images in how.order(len(x)):
        places = torch.from_numpy(images)
        yield x[places], y[places], places


def clouds(n: int, seed: int) -> Features:
    """Three overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=generator)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + 1.2 * F.one_hot(y, D)
    return Features(x, y, torch.arange(n))


def test_images_that_are_held_out_are_not_learned_from() -> None:
    """Were they, not a number would spread."""
    bank, how = clouds(40, 0), training(8, 10, 5)
    learn = torch.arange(40) % 4 > 0
    bank.vectors[~learn] = math.nan
    heads, others = how.heads(C, LIKE), how.heads(C, LIKE)
    epochs = [*train([(heads, learn), (others, torch.ones(40, dtype=torch.bool))], stream(*bank[:2], how), how)]
    assert all(heads.finite())
    assert not any(others.finite())
    assert epochs == [1, 2]


def test_the_head_that_is_best_on_held_out_images_is_chosen() -> None:
    """It is the one a twin of which, trained alone on the rest, tells them best; judged as trained on all."""
    bank, test, how = clouds(60, 0), clouds(200, 1), training(16, 40, 4)
    learn = torch.arange(60) % 3 > 0
    held = Features(*(x[~learn] for x in bank))
    remedy = Remedy.of("none", bank.labels, C)
    picked = best_on_held_out(stream(*bank[:2], how), how, learn, held, test, remedy)
    scores = {}
    for mask in (learn, torch.ones_like(learn)):
        heads = how.heads(C, LIKE)
        assert len([*train([(heads, mask)], stream(*bank[:2], how), how)]) == 10
        scores[bool(mask.all())] = [heads.scores(x.vectors, x.labels, remedy.shift) for x in (held, test)]
    most = scores[False][0].max()
    (chosen,) = (scores[False][0] == most).nonzero().flatten().tolist()
    assert picked.also["head"] == heads.names[chosen]
    assert picked.also["held_out"] == pytest.approx(most.item(), abs=1e-4)
    assert picked.best == scores[True][1].max().item()
    torch.testing.assert_close(picked.logits, heads.told(chosen, test.vectors))
    assert [pair["test"] for pair in picked.also["heads"].values()] == pytest.approx(scores[True][1].tolist(), abs=1e-4)


def test_all_that_diverge_are_an_error_and_some_a_note() -> None:
    bank, how = clouds(40, 0), training(512, 10, 1, rates=(0.1, 1e308))
    learn = torch.arange(40) % 4 > 0
    given = learn, Features(*(x[~learn] for x in bank)), clouds(20, 1), Remedy.of("none", bank.labels, C)
    picked = best_on_held_out(stream(*bank[:2], how), how, *given)
    assert picked.notes == ("2 of 4 heads diverged and are left out: last, rate 1e+308, all, rate 1e+308",)
    assert picked.also["heads"].keys() == {"last, rate 0.1", "all, rate 0.1"}
    bank.vectors[:] = math.inf
    with pytest.raises(EvaluationError, match="every head diverged"):
        best_on_held_out(stream(*bank[:2], how), how, *given)


def test_the_best_on_the_test_images() -> None:
    """Of all heads after the last step; where the rate changes by epochs, of all epochs."""
    bank, test, how = clouds(60, 0), clouds(50, 1), training(16, 30, 4)
    none = Remedy.of("none", bank.labels, C)
    heads, after = how.heads(C, LIKE), list[Tensor]()
    everything = torch.ones(60, dtype=torch.bool)
    for _ in train([(heads, everything)], stream(*bank[:2], how), how):
        pass
    picked = best_on_test(stream(*bank[:2], how), how, 60, test, none)
    scores = heads.scores(test.vectors, test.labels, none.shift)
    assert picked.best == scores.max().item()
    assert picked.also == {"head": heads.names[int(scores.argmax())]}
    how = training(16, 40, 4, rates=(30.0,))._replace(parts={"all": slice(0, D)}, by_epoch=True)
    heads = how.heads(C, LIKE)
    for _ in train([(heads, everything)], stream(*bank[:2], how), how):
        after.append(heads.scores(test.vectors, test.labels, none.shift)[0])
    picked = best_on_test(stream(*bank[:2], how), how, 60, test, none)
    assert picked.best == max(after) > after[-1]
    assert picked.also["head"] == f"all, rate 30, epoch {1 + after.index(max(after))}"

"""Rankings judged by hand, by a literal loop and by scikit-learn; whitening and pooling by hand."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from fastdino.eval import EvaluationError
from fastdino.eval.features import gem
from fastdino.eval.retrieve import ranking as room
from fastdino.eval.retrieve.ranking import (
    HARD,
    JUNK,
    RIGHT,
    WRONG,
    average_precision,
    found_in,
    in_setup,
    precision_at,
    precision_of_hits,
    rankings,
)
from fastdino.eval.retrieve.whitening import Whitening


def row(*kinds: int) -> Tensor:
    return torch.tensor([kinds], dtype=torch.uint8)


def test_average_precision_by_hand() -> None:
    assert average_precision(row(RIGHT, WRONG, RIGHT)).item() == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(row(WRONG, RIGHT)).item() == pytest.approx(0.25)
    assert average_precision(row(WRONG, RIGHT), torch.tensor([2])).item() == pytest.approx(0.125)  # one was not found
    assert average_precision(row(RIGHT, RIGHT, WRONG)).item() == 1
    assert math.isnan(average_precision(row(WRONG, JUNK)).item())
    assert precision_of_hits(row(RIGHT, WRONG, RIGHT)).item() == pytest.approx((1 + 2 / 3) / 2)


def test_the_setups_of_oxford_by_hand() -> None:
    """Ranking [2, 0, 3, 1] with easy {0}, hard {1}, junk {2}."""
    truth, order = torch.tensor([RIGHT, HARD, JUNK, WRONG], dtype=torch.uint8), [2, 0, 3, 1]
    ranked = truth[order].unsqueeze(0)
    found = {setup: average_precision(in_setup(ranked, setup)).item() for setup in ("easy", "medium", "hard")}
    assert found == pytest.approx({"easy": 1.0, "medium": 0.791667, "hard": 0.25}, abs=1e-6)
    without_hard = row(JUNK, RIGHT, WRONG)
    assert math.isnan(average_precision(in_setup(without_hard, "hard")).item())
    assert math.isnan(precision_at(in_setup(without_hard, "hard"), 5).item())


def test_junk_is_taken_out_of_the_ranking() -> None:
    kinds = (RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT)
    with_junk = row(JUNK, RIGHT, WRONG, JUNK, JUNK, RIGHT, WRONG, WRONG, RIGHT, JUNK)
    for score in (average_precision, precision_of_hits):
        assert score(with_junk).item() == score(row(*kinds)).item()
    for k in range(1, 8):
        for at in (precision_at, found_in):
            assert at(with_junk, k).item() == at(row(*kinds), k).item()


def test_the_top_by_hand() -> None:
    late = row(WRONG, RIGHT, WRONG, RIGHT, WRONG, WRONG)
    assert [precision_at(late, k).item() for k in (1, 5, 10)] == [0, 0.5, 0.5]  # of 4, where the last right one is
    assert [found_in(late, k).item() for k in (1, 2)] == [0, 1]
    assert precision_of_hits(late, 2).item() == 0.25  # mAP@R with R = 2: (1/2) / 2
    assert precision_of_hits(late, torch.tensor([2])).item() == 0.25
    many = row(RIGHT, *[WRONG] * 5, *[RIGHT] * 149)
    assert precision_of_hits(many, 100).item() == pytest.approx(
        (1 + sum((i - 4) / (i + 1) for i in range(6, 100))) / 100
    )


def literal(kinds: list[int], num_right: int) -> float:
    """Trapezoids one after the other, over a ranking without junk."""
    kept = [kind for kind in kinds if kind != JUNK]
    area, found = 0.0, 0
    for rank, kind in enumerate(kept):
        if kind == RIGHT:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2 / num_right
    return area


def test_random_rankings_against_a_loop_and_scikit_learn() -> None:
    kinds = torch.randint(4, (40, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ranked = in_setup(kinds, "hard")
    want = [literal(line, line.count(RIGHT)) for line in ranked.tolist()]
    torch.testing.assert_close(average_precision(ranked), torch.tensor(want, dtype=torch.float64))
    for line, got in zip(ranked, precision_of_hits(ranked).tolist(), strict=True):
        kept = line[line != JUNK]
        assert got == pytest.approx(average_precision_score(kept == RIGHT, -torch.arange(len(kept))))


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.randn(n, 4, generator=generator) for n in (7, 9))
    kinds = torch.randint(4, (7, 9), generator=generator).to(torch.uint8)

    def truth(block: range) -> Tensor:
        return kinds[block.start : block.stop]

    ((_, order, ranked),) = rankings(queries, database, truth)
    assert torch.equal(order, (queries @ database.T).argsort(dim=1, descending=True))
    assert torch.equal(ranked, kinds.gather(1, order))
    monkeypatch.setattr(room, "MAX_ELEMENTS", 30)  # 3 queries at a time, the last block of 1
    blocks = list(rankings(queries, database, truth))
    assert [len(block) for block, *_ in blocks] == [3, 3, 1]
    assert torch.equal(torch.cat([x for *_, x in blocks]), ranked)
    assert torch.equal(torch.cat([x for *_, x in rankings(queries, database, truth, top=2)]), ranked[:, :2])


def test_gem_by_hand() -> None:
    tokens = torch.tensor([[[1.0, -3.0], [2.0, -5.0]]])
    assert gem(tokens, 4)[0].tolist() == pytest.approx([8.5**0.25, 1e-6])
    assert gem(tokens, 1)[0, 0].item() == 1.5


def test_whitening_by_hand() -> None:
    rows = torch.tensor([[2.0, 0, 5], [-2, 0, 5], [0, 1, 5], [0, -1, 5]])  # the third never changes
    white = Whitening.fit(rows)(rows)
    covariance = white.T @ white / 4
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1.0, 1, 0])), atol=1e-6, rtol=0)
    torch.testing.assert_close(white.abs()[:, :2], torch.tensor([[2**0.5, 0], [2**0.5, 0], [0, 2**0.5], [0, 2**0.5]]))
    out_of_plane = Whitening.fit(rows)(torch.tensor([[0.0, 0, 6]])).norm().item()
    assert out_of_plane == pytest.approx(1 / math.sqrt(1e-5 * 2))  # not infinite: clamped at 1e-5 of the largest, 2


def test_whitening_by_the_second_moment() -> None:
    """DINO's script takes E[x x'], not the covariance: in one direction both differ by the mean's square."""
    rows = torch.tensor([[1.0], [3.0]])
    assert Whitening.fit(rows)(rows).flatten().abs().tolist() == pytest.approx([1, 1])
    assert Whitening.fit(rows, centered=False)(rows).flatten().abs().tolist() == pytest.approx([1 / 5**0.5] * 2)


def test_what_cannot_be_whitened(caplog: pytest.LogCaptureFixture) -> None:
    Whitening.fit(torch.eye(3))
    assert "whitening learns 3 directions from 3 images: give it more of them" in caplog.text
    with pytest.raises(EvaluationError, match="2 images or more, and there is 1"):
        Whitening.fit(torch.ones(1, 3))
    with pytest.raises(EvaluationError, match="have the same features"):
        Whitening.fit(torch.ones(4, 3))

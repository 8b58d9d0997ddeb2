"""Centering: when the center moves, by what, and over which points."""

import pytest
import torch

from fastdino.method.targets import Centering

R, P, K = 6, 5, 7
APPLIED, SKIPPED = torch.tensor(True), torch.tensor(False)


def outputs(seed: int, rows: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, P), torch.randn(K, P)


def centering(ranks, accumulate: int = 1) -> Centering:
    return Centering(K, momentum=0.9, accumulate=accumulate, ranks=ranks)


def test_it_follows_the_mean_of_the_logits_after_their_use(alone):
    target, expected = centering(alone), torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        points, prototypes = outputs(step)
        given = target(points, prototypes, 0.04)
        torch.testing.assert_close(given.double(), expected, rtol=1e-6, atol=1e-7)
        target.after_step(APPLIED)
        expected = 0.9 * expected + 0.1 * (points.double() @ prototypes.double().T).mean(0)
    torch.testing.assert_close(target.state()["center"].double(), expected, rtol=1e-6, atol=1e-7)


def test_it_is_more_exact_than_a_mean_of_bf16_logits(alone):
    """The reason to average points: a logit in bf16 is off by 2^-9 of its size."""
    points, prototypes = (torch.nn.functional.normalize(x, dim=-1).bfloat16() for x in outputs(0, rows=512))
    exact = 0.1 * (points.double() @ prototypes.double().T).mean(0)
    target = centering(alone)
    target(points, prototypes, 0.04)
    target.after_step(APPLIED)
    ours = (target.center.double() - exact).abs().max()
    of_logits = (0.1 * (points @ prototypes.T).double().mean(0) - exact).abs().max()
    assert ours < of_logits / 100


def test_accumulation_moves_it_once_by_the_mean_of_all(alone):
    points, prototypes = outputs(0)
    whole, parts = centering(alone), centering(alone, accumulate=2)
    whole(points, prototypes, 0.04)
    for half in points.split(R // 2):
        assert not parts(half, prototypes, 0.04).any(), "the center moved within a step"
    for target in (whole, parts):
        target.after_step(APPLIED)
    torch.testing.assert_close(whole.center, parts.center)
    parts(points, prototypes, 0.04)
    with pytest.raises(AssertionError, match="1 losses in a step of 2"):
        parts.after_step(APPLIED)


def test_a_skipped_step_leaves_it(alone):
    target = centering(alone)
    target.center.copy_(before := torch.randn(K))
    points, prototypes = outputs(0)
    target(points * torch.nan, prototypes, 0.04)
    target.after_step(SKIPPED)
    assert torch.equal(target.center, before)
    target(points, prototypes, 0.04)
    target.after_step(APPLIED)
    assert target.center.isfinite().all(), "what was not finite is forgotten"
    assert not torch.equal(target.center, before)

"""Centering: when the center moves, by what, and over which points. Sinkhorn: what it balances. Which one is built."""

import logging

import pytest
import torch

from fastdino.config import Config, ConfigError, HeadConfig, LossConfig, PatchHeadConfig, RunConfig, ViewsConfig
from fastdino.distributed import Ranks
from fastdino.method.targets import Centering, Sinkhorn, build_targets
from tests.method import plain

R, P, K = 6, 5, 7
CPU = torch.device("cpu")
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


@pytest.mark.parametrize("rows", [R, 40, 2])
def test_sinkhorn_equals_the_official_form(alone, rows):
    """With far fewer samples than prototypes too, and with more."""
    points, prototypes = outputs(0, rows)
    points, prototypes = torch.nn.functional.normalize(points, dim=-1), prototypes / 4
    center = Sinkhorn(alone)(points, prototypes, 0.05)
    logits = points.double() @ prototypes.double().T
    assert center.shape == (K,)
    assert center.dtype == torch.float32
    found = torch.softmax((logits - center.double()) / 0.05, dim=-1)
    torch.testing.assert_close(found, plain.balanced(logits, 0.05), rtol=1e-4, atol=1e-6)


def test_sinkhorn_remembers_nothing(alone):
    """Each micro batch is balanced on its own."""
    target, (points, prototypes) = Sinkhorn(alone), outputs(0)
    first = target(points[:3], prototypes, 0.5)
    other = target(points[3:], prototypes, 0.5)
    target.after_step(APPLIED)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(target(points[:3], prototypes, 0.5), first)
    assert target.state() == {}


def test_log_sum_exps_of_large_logits_add_up():
    """In fp64 without a maximum: at logits of 28 and a temperature of 0.04, on either side."""
    total = []

    class Two(Ranks):
        def sum_(self, x: torch.Tensor) -> None:
            total.append(x.dtype)
            x += torch.tensor([700.0, -700.0, 3.0, 0.0], dtype=torch.float64).exp() * torch.tensor([1, 1, 1, 0])

    found = Two(0, 2, 0, CPU).logsumexp(torch.tensor([700.0, -700.0, 1.0, -2.0]))
    assert total == [torch.float64]
    expected = torch.tensor([700 + 0.693147, -700 + 0.693147, 3 + 0.126928, -2.0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def config(targets: str, patch_targets: str | None = None, local_batch: int = 64, **changes: object) -> Config:
    loss = LossConfig(patch_weight=1.0, targets=targets, patch_targets=patch_targets)  # type: ignore[arg-type]
    return Config(head=HeadConfig(num_prototypes=30), loss=loss, run=RunConfig(local_batch=local_batch), **changes)


@pytest.mark.parametrize(
    ("targets", "patch_targets", "kinds"),
    [
        ("center", None, [Centering, Centering]),
        ("sinkhorn", None, [Sinkhorn, Sinkhorn]),
        ("center", "sinkhorn", [Centering, Sinkhorn]),
        ("sinkhorn", "center", [Sinkhorn, Centering]),
    ],
)
def test_targets_of_views_and_patches(alone, targets, patch_targets, kinds):
    made = build_targets(config(targets, patch_targets), alone)
    assert [type(target) for target in made] == kinds
    assert made[0] is not made[1]
    if kinds == [Centering, Centering]:
        assert made[0].center is not made[1].center, "two centers, even where the head is one"


def test_a_center_is_as_wide_as_its_head(alone):
    own = config("center", patch_head=PatchHeadConfig(num_prototypes=20))
    assert [target.center.shape for target in build_targets(own, alone)] == [(30,), (20,)]
    assert build_targets(Config(), alone)[1] is None


@pytest.mark.parametrize(
    ("targets", "patch_targets", "local_batch", "ranks", "says"),
    [
        ("sinkhorn", None, 3, 1, r"loss.targets=sinkhorn balances 6 samples .* raise run.local_batch"),
        ("sinkhorn", "center", 1, 2, r"balances 4 samples .* or use loss.targets=center"),
        ("center", "sinkhorn", 1, 1, r"loss.patch_targets=sinkhorn balances 4 samples"),
    ],
)
def test_too_few_samples_for_sinkhorn_are_refused(targets, patch_targets, local_batch, ranks, says):
    views = ViewsConfig(global_size=64) if patch_targets == "sinkhorn" else ViewsConfig()
    settings = config(targets, patch_targets, local_batch, views=views)
    with pytest.raises(ConfigError, match=says):
        build_targets(settings, Ranks(0, ranks, 0, CPU))


@pytest.mark.parametrize(
    ("targets", "patch_targets", "local_batch", "ranks", "warned"),
    [
        ("sinkhorn", None, 1, 4, ["targets=sinkhorn balances 8 samples"]),
        (
            "sinkhorn",
            None,
            16,
            1,
            ["targets=sinkhorn balances 32 samples of a micro batch over all ranks, which"],
        ),
        ("sinkhorn", None, 16, 2, []),
        ("center", "sinkhorn", 1, 1, ["patch_targets=sinkhorn balances 58 samples"]),
        ("center", "sinkhorn", 2, 1, []),
        ("center", None, 1, 1, []),
    ],
)
def test_few_samples_for_sinkhorn_are_warned_of(caplog, targets, patch_targets, local_batch, ranks, warned):
    """By one rank; of views and of patches, each by their number."""
    caplog.set_level(logging.WARNING)
    for rank in range(ranks):
        build_targets(config(targets, patch_targets, local_batch), Ranks(rank, ranks, rank, CPU))
    assert len(caplog.messages) == len(warned)
    assert all(text in message for text, message in zip(warned, caplog.messages, strict=True))

"""The method: which views meet, when the center moves, what the statistics say of collapse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import LossConfig
from fastdino.distributed import Ranks
from fastdino.method.dino import Dino

B, D, K = 3, 4, 7
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CONFIG = LossConfig(student_temp=0.1, center_momentum=0.9)


class TinyHead(nn.Linear):
    """Counts how often its prototypes are asked for."""

    asked = 0

    def prototypes(self) -> Tensor:
        self.asked += 1
        return self.weight

    def forward(self, features: Tensor, prototypes: Tensor | None = None) -> Tensor:
        return F.linear(features, self.weight if prototypes is None else prototypes, self.bias)


class Tiny(nn.Module):
    """A network with the interface of fastdino.model.Network: mean pixels through one linear layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.head = nn.Linear(3, D), TinyHead(D, K)

    def features(self, groups: list[Tensor]) -> Tensor:
        return self.backbone(torch.cat([views.mean((-1, -2)) for views in groups]))

    def forward(self, groups: list[Tensor]) -> Tensor:
        return self.head(self.features(groups))


def groups(seed: int, batch: int = B) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, batch, 3, 8, 8) * 8, torch.randn(3, batch, 3, 4, 4) * 8]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_step(student: Tiny, teacher: Tiny, views: list[Tensor], center: np.ndarray, teacher_temp: float):
    """Algorithm 1 of the paper, view by view in float64: loss, and the center after it."""
    with torch.no_grad():
        s, t = student(views).double().numpy(), teacher(views[:1]).double().numpy()
    total, pairs = 0.0, 0
    for i in range(2):
        p = softmax((t[i] - center) / teacher_temp)
        for j in range(5):
            if i != j:
                total += -(p * np.log(softmax(s[j] / 0.1))).sum(-1).mean()
                pairs += 1
    return total / pairs, 0.9 * center + 0.1 * t.reshape(-1, K).mean(0)


def test_three_steps_equal_algorithm_1():
    student, teacher, center = Tiny(0), Tiny(1), torch.zeros(K)
    dino, expected = Dino(student, teacher, CONFIG, center, ALONE), np.zeros(K)
    for step in range(3):
        loss = dino.loss(groups(step), teacher_temp=0.05)
        wanted, after = plain_step(student, teacher, groups(step), expected, 0.05)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_allclose(center.numpy(), expected, rtol=1e-5, atol=1e-7, err_msg="moved before its use")
        dino.update_center(torch.tensor(True))
        expected = after
        np.testing.assert_allclose(center.numpy(), expected, rtol=1e-5)


def test_gradient_reaches_the_student_only():
    student, teacher = Tiny(0), Tiny(1)
    Dino(student, teacher, CONFIG, torch.zeros(K), ALONE).loss(groups(0), teacher_temp=0.05).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_accumulation_moves_the_center_once_by_the_mean_of_all():
    whole, parts = torch.zeros(K), torch.zeros(K)
    views = groups(0, batch=6)
    one, two = (Dino(Tiny(0), Tiny(1), CONFIG, center, ALONE, n) for center, n in ((whole, 1), (parts, 2)))
    loss = one.loss(views, teacher_temp=0.05)
    halves = [two.loss([group[:, half] for group in views], teacher_temp=0.05) for half in (slice(3), slice(3, 6))]
    assert not parts.any(), "the center moved within a step"
    assert two.teacher.head.asked == 1, "the teacher's prototypes are normalised once per update"
    one.update_center(torch.tensor(True))
    two.update_center(torch.tensor(True))
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(loss, sum(halves) / 2)
    with torch.no_grad():
        two.teacher.head.weight.mul_(-1)
    moved = two.loss(views, teacher_temp=0.05)
    assert abs(moved - Dino(Tiny(0), two.teacher, CONFIG, whole, ALONE).loss(views, teacher_temp=0.05)) < 1e-6, (
        "stale weights"
    )


def test_a_skipped_step_leaves_the_center():
    center = torch.randn(K)
    before = center.clone()
    dino = Dino(Tiny(0), Tiny(1), CONFIG, center, ALONE)
    dino.loss([group * torch.nan for group in groups(0)], teacher_temp=0.05)
    dino.update_center(torch.tensor(False))
    assert torch.equal(center, before)
    dino.loss(groups(0), teacher_temp=0.05)
    dino.update_center(torch.tensor(True))
    assert center.isfinite().all(), "what was not finite is forgotten"
    assert not torch.equal(center, before)


class Fixed(nn.Module):
    """A teacher whose outputs are given."""

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        super().__init__()
        self._features, self._logits = features, logits

    @property
    def head(self) -> "Fixed":
        return self

    def features(self, groups: list[Tensor]) -> Tensor:
        return self._features

    def prototypes(self) -> None:
        return None

    def forward(self, features: Tensor, prototypes: None) -> Tensor:
        return self._logits


@pytest.mark.parametrize(
    ("logits", "entropy", "usage"),
    [
        (torch.zeros(2, B, K), math.log(K), math.log(K)),  # uniform
        (torch.eye(K)[0].expand(2, B, K) * 100, 0.0, 0.0),  # one prototype for all
        (torch.eye(K)[:6].view(2, B, K) * 100, 0.0, math.log(6)),  # each view its own
    ],
)
def test_statistics_tell_the_collapses_apart(logits, entropy, usage):
    dino = Dino(Tiny(0), Fixed(torch.ones(2, B, D), logits), CONFIG, torch.zeros(K), ALONE)
    dino.loss(groups(0), teacher_temp=0.05)
    found = {name: value.item() for name, value in dino.statistics(teacher_temp=0.05).items()}
    assert found["teacher_entropy"] == pytest.approx(entropy, abs=1e-4)
    assert found["kl_to_uniform"] == pytest.approx(math.log(K) - entropy, abs=1e-4)
    assert found["usage_entropy"] == pytest.approx(usage, abs=1e-4)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["center_norm"] == 0


def test_feature_std_of_random_directions_is_one():
    dino = Dino(Tiny(0), Fixed(torch.randn(2, 500, 64), torch.zeros(2, 500, K)), CONFIG, torch.zeros(K), ALONE)
    dino.loss(groups(0, batch=500), teacher_temp=0.05)
    assert dino.statistics(teacher_temp=0.05)["feature_std"].item() == pytest.approx(1, abs=0.02)

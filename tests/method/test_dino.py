"""The method: which views meet, what the statistics say of collapse; and, over steps, algorithm 1."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdino.config import LossConfig
from fastdino.data import Masks
from fastdino.engine.schedules import Now
from fastdino.method.dino import Dino
from fastdino.method.targets import Centering
from fastdino.model import Outputs
from tests.method.networks import B, D, Given, K, Tiny, batch

CONFIG = LossConfig(student_temp=0.1)
NOW = Now(lr=0.0, weight_decay=0.0, momentum=0.0, teacher_temp=0.05, freeze_last_layer=False)


def dino(ranks: Any, student: nn.Module, teacher: nn.Module) -> Dino:
    return Dino(student, teacher, CONFIG, Centering(K, momentum=0.9, accumulate=1, ranks=ranks))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(network: nn.Module, views: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        made = network(views)
        return (made.cls_points.double() @ made.prototypes.double().T).numpy()


def plain_step(student: Tiny, teacher: Tiny, views: dict[str, Tensor], center: np.ndarray):
    """Algorithm 1 of the paper, view by view in float64: loss, and the center after it."""
    s, t = logits(student, views), logits(teacher, {"global": views["global"]})
    total, pairs = 0.0, 0
    for i in range(2):
        p = softmax((t[i] - center) / NOW.teacher_temp)
        for j in range(5):
            if i != j:
                total += -(p * np.log(softmax(s[j] / 0.1))).sum(-1).mean()
                pairs += 1
    return total / pairs, 0.9 * center + 0.1 * t.reshape(-1, K).mean(0)


def test_three_steps_equal_algorithm_1(alone):
    student, teacher = Tiny(0), Tiny(1)
    method, expected = dino(alone, student, teacher), np.zeros(K)
    center = method.state()["center"]
    for step in range(3):
        loss, parts = method.loss(batch(step), NOW)
        wanted, after = plain_step(student, teacher, batch(step).views, expected)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        assert parts.keys() == {"dino"}
        assert parts["dino"].item() == loss.item()
        assert not parts["dino"].requires_grad
        np.testing.assert_allclose(center.numpy(), expected, rtol=1e-5, atol=1e-7, err_msg="moved before its use")
        method.after_step(torch.tensor(True))
        expected = after
        np.testing.assert_allclose(center.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_gradient_reaches_the_student_only(alone):
    student, teacher = Tiny(0), Tiny(1)
    dino(alone, student, teacher).loss(batch(0), NOW)[0].backward()
    unmoved = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert unmoved == {"mask_token"}  # nothing is hidden
    assert all(p.grad is None for p in teacher.parameters())


def test_networks_are_called_whole_and_once(alone):
    """So an engine may partition them, and the teacher never sees a local view."""

    class Closed(Tiny):
        """Refuses to have its parts touched from outside its forward."""

        def __getattribute__(self, name: str) -> Any:
            if name in ("backbone", "mlp", "prototypes") and not object.__getattribute__(self, "__dict__")["open"]:
                raise AssertionError(f"{name} is read outside a call of the network")
            return super().__getattribute__(name)

        def __init__(self, seed: int) -> None:
            object.__setattr__(self, "open", True)
            super().__init__(seed)
            self.seen: list[list[str]] = []
            self.open = False

        def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
            self.seen.append(list(views))
            self.open = True
            made = super().forward(views, masks)
            self.open = False
            return made

    student, teacher = Closed(0), Closed(1)
    method = dino(alone, student, teacher)
    method.loss(batch(0), NOW)[0].backward()
    method.statistics()
    method.after_step(torch.tensor(True))
    assert student.seen == [["global", "local"]]
    assert teacher.seen == [["global"]]


@pytest.mark.parametrize(
    ("logits", "entropy", "usage"),
    [
        (torch.zeros(2, B, K), math.log(K), math.log(K)),  # uniform
        (torch.eye(K)[0].expand(2, B, K) * 100, 0.0, 0.0),  # one prototype for all
        (torch.eye(K)[:6].view(2, B, K) * 100, 0.0, math.log(6)),  # each view its own
    ],
)
def test_statistics_tell_the_collapses_apart(alone, logits, entropy, usage):
    method = dino(alone, Tiny(0), Given(torch.ones(2, B, D), logits))
    method.loss(batch(0), NOW)
    found = {name: value.item() for name, value in method.statistics().items()}
    assert found["teacher_entropy"] == pytest.approx(entropy, abs=1e-4)
    assert found["kl_to_uniform"] == pytest.approx(math.log(K) - entropy, abs=1e-4)
    assert found["usage_entropy"] == pytest.approx(usage, abs=1e-4)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["center_norm"] == 0


def test_statistics_are_of_the_targets_that_the_loss_used(alone):
    """Not of those that the center would make once it has moved."""
    method = dino(alone, Tiny(0), Tiny(1))
    for step in range(2):  # from the second on the center is not zero
        method.loss(batch(step), NOW)
        center = method.state()["center"].double().numpy()
        t = logits(method.teacher, {"global": batch(step).views["global"]})
        p = softmax((t - center) / NOW.teacher_temp)
        found = method.statistics()
        assert found["teacher_entropy"].item() == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
        assert found["center_norm"].item() == pytest.approx(np.linalg.norm(center), rel=1e-5)
        method.after_step(torch.tensor(True))
    with pytest.raises(AssertionError, match="before its step"):
        method.statistics()


def test_feature_std_of_random_directions_is_one(alone):
    method = dino(alone, Tiny(0), Given(torch.randn(2, 500, 64), torch.zeros(2, 500, K)))
    method.loss(batch(0, images=500), NOW)
    assert method.statistics()["feature_std"].item() == pytest.approx(1, abs=0.02)

"""One process: parameter groups, and each optimizer against DINO v1's step written out in plain torch."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import Config, EngineConfig, HeadConfig, OptimConfig
from fastdino.distributed import Ranks
from fastdino.engine import build_engine
from fastdino.engine.engine import Engine
from fastdino.engine.groups import parameter_groups
from fastdino.engine.schedules import Now
from fastdino.model.head import Head


class Net(nn.Module):
    """Tokens, norms, biases, prototypes with trainable norms: every kind of parameter."""

    def __init__(self, freeze_norm: bool = False) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU())
        sizes = {"num_prototypes": 7, "num_layers": 2, "hidden_dim": 5, "bottleneck_dim": 3}
        self.head = Head(6, HeadConfig(**sizes, freeze_prototype_norm=freeze_norm))

    def forward(self, x: Tensor) -> Tensor:
        points, prototypes = self.head(self.backbone(x + self.cls_token[0]))
        return points @ prototypes.T


def make_engine(network: nn.Module, **optim: Any) -> Engine:
    config = Config(optim=OptimConfig(**optim), engine=EngineConfig(name="torch", device="cpu", precision="fp32"))
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    return build_engine(config, copy.deepcopy(network), copy.deepcopy(network), ranks)


def loss_of(network: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return 20 * F.cross_entropy(network(x), torch.arange(16) % 7)


def now(step: int) -> Now:
    return Now(0.01 * (step + 1), 0.1 * (step + 1), 0.9 + 0.01 * step, 0.04, freeze_last_layer=step < 2)


class PlainV1:
    """DINO v1's loop: clip each tensor, drop the last layer's gradients, step, move the teacher."""

    def __init__(self, network: nn.Module, config: OptimConfig) -> None:
        self.student, self.teacher, self.config = copy.deepcopy(network), copy.deepcopy(network), config
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if not (n.endswith(".bias") or p.ndim == 1)]},
            {"params": [p for n, p in named if n.endswith(".bias") or p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = {
            "adamw": lambda: torch.optim.AdamW(groups),
            "sgd": lambda: torch.optim.SGD(groups, lr=0, momentum=0.9),
            "lars": lambda: PlainLars(groups),
        }[config.name]()

    def step(self, step: int) -> None:
        values, clip = now(step), self.config.clip
        self.optimizer.zero_grad()
        loss_of(self.student, step).backward()
        named = [(n, p) for n, p in self.student.named_parameters() if p.grad is not None]
        whole = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]).norm()
        for name, param in named:
            assert param.grad is not None
            coefficient = clip / ((param.grad.norm() if self.config.clip_mode == "tensor" else whole) + 1e-6)
            if clip and coefficient < 1:
                param.grad.mul_(coefficient)
            if "last_layer" in name and values.freeze_last_layer:
                param.grad = None
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = values.lr
            if i == 0:
                group["weight_decay"] = values.weight_decay
        self.optimizer.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(values.momentum).add_(s, alpha=1 - values.momentum)


class PlainLars(torch.optim.Optimizer):
    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    if p.norm() > 0 and update.norm() > 0:
                        update = update * (0.001 * p.norm() / update.norm())
                velocity = self.state[p].setdefault("mu", torch.zeros_like(p))
                velocity.mul_(0.9).add_(update)
                p.sub_(group["lr"] * velocity)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize(("clip", "clip_mode"), [(1.0, "tensor"), (1.0, "global"), (0.0, "tensor")])
@pytest.mark.parametrize("freeze_norm", [False, True])
def test_steps_equal_v1(name: Any, clip: float, clip_mode: Any, freeze_norm: bool) -> None:
    torch.manual_seed(0)
    network = Net(freeze_norm)
    engine = make_engine(network, name=name, clip=clip, clip_mode=clip_mode)
    plain = PlainV1(network, OptimConfig(name=name, clip=clip, clip_mode=clip_mode))
    for step in range(5):
        plain.step(step)
        loss = loss_of(engine.student, step)
        engine.backward(loss)
        engine.step(now(step), loss)
        for mine, theirs in ((engine.student, plain.student), (engine.teacher, plain.teacher)):
            for (key, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(
                    a.detach(), b.detach(), rtol=2e-5, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
    moved = (network.head.last_layer.v - engine.student.get_parameter("head.last_layer.v")).abs().max()
    assert moved > 1e-5


def test_frozen_means_untouched_bit_for_bit() -> None:
    torch.manual_seed(0)
    network = Net()
    engine = make_engine(network)
    pieces = {f.name: f.tensors for f in engine.fragments()}
    for step in range(2):
        loss = loss_of(engine.student, step)
        engine.backward(loss)
        engine.step(now(step), loss)
        for name in ("head.last_layer.v", "head.last_layer.g"):
            start = network.get_parameter(name).detach().flatten()
            assert torch.equal(pieces[name]["param"], start), "not even decayed"
            assert torch.equal(pieces[name]["ema"], start)
            assert not pieces[name]["exp_avg"].any()
        assert engine.counters()["updates/last_layer_decay"] == 0
        assert engine.counters()["updates/decay"] == step + 1


def test_the_frozen_last_layers_teacher_still_follows() -> None:
    """v1 moves the teacher by all parameters, always; it shows when the teacher differs from the student."""
    engine = make_engine(Net())
    piece = next(f for f in engine.fragments() if f.name == "head.last_layer.v").tensors
    piece["ema"].zero_()
    loss = loss_of(engine.student, 0)
    engine.backward(loss)
    engine.step(now(0), loss)
    torch.testing.assert_close(piece["ema"], 0.1 * piece["param"])


def test_parameter_groups() -> None:
    groups = {group.name: group for group in parameter_groups(Net())}
    assert set(groups) == {"decay", "no_decay", "last_layer_decay"}
    assert set(groups["decay"].params) == {
        "cls_token", "backbone.0.weight", "head.mlp.0.weight", "head.mlp.2.weight",
    }  # fmt: skip
    assert set(groups["no_decay"].params) == {
        "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "head.mlp.0.bias", "head.mlp.2.bias",
    }  # fmt: skip
    assert set(groups["last_layer_decay"].params) == {"head.last_layer.v", "head.last_layer.g"}
    assert [g.regularized for g in groups.values()] == [True, False, True]
    assert [g.last_layer for g in groups.values()] == [False, False, True]
    frozen = {group.name: group for group in parameter_groups(Net(freeze_norm=True))}
    assert set(frozen["last_layer_decay"].params) == {"head.last_layer.v"}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])  # 1e30: finite, but its square is not
def test_a_step_that_is_not_finite_changes_nothing(name: Any, poison: float) -> None:
    engine = make_engine(Net(), name=name)
    for step in range(3):
        loss = loss_of(engine.student, step)
        engine.backward(loss)
        engine.step(now(step), loss)
    before = [{k: v.clone() for k, v in f.tensors.items()} for f in engine.fragments()]
    updates = [v.clone() for k, v in engine.counters().items() if k.startswith("updates/")]
    for _ in range(2):
        engine.backward(poison * loss_of(engine.student, 3))
        assert not engine.step(now(3), torch.tensor(0.0))
    for old, f in zip(before, engine.fragments(), strict=True):
        assert all(torch.equal(old[key], value) for key, value in f.tensors.items()), f.name
    assert updates == [v for k, v in engine.counters().items() if k.startswith("updates/")]
    assert {k: int(engine.counters()[k]) for k in ("steps", "skipped", "skipped_in_row", "last_skipped")} == {
        "steps": 5, "skipped": 2, "skipped_in_row": 2, "last_skipped": 4,
    }  # fmt: skip
    loss = loss_of(engine.student, 4)
    engine.backward(loss)
    assert engine.step(now(4), loss)
    assert engine.counters()["skipped_in_row"] == 0
    assert all(torch.isfinite(v).all() for f in engine.fragments() for v in f.tensors.values())


def test_gradient_norm_is_that_before_clipping() -> None:
    engine, network = make_engine(Net(), clip=0.01), Net()
    network.load_state_dict(engine.student.state_dict())
    loss_of(network, 0).backward()
    loss = loss_of(engine.student, 0)
    engine.backward(loss)
    engine.step(now(0), loss)
    want = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(engine.grad_norm, want)
    grads: dict[str, list[Tensor]] = {}
    for name, param in network.named_parameters():
        if param.grad is not None:
            grads.setdefault(name.split(".")[0], []).append(param.grad.flatten())
    parts = {name: torch.cat(of).norm() for name, of in grads.items()}
    assert len(parts) > 1
    found = engine.grad_norms()
    torch.testing.assert_close(found.pop("grad_norm"), want)
    for name, norm in parts.items():
        torch.testing.assert_close(found[f"grad_norm_{name}"], norm)
    assert sum(norm**2 for norm in found.values()).item() == pytest.approx(want.item() ** 2)

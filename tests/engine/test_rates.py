"""DINOv2's optimizer: a rate for each parameter, clipping by module, prototypes frozen by a rate of 0."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import HeadConfig, OptimConfig
from fastdino.engine.groups import parameter_groups
from fastdino.engine.schedules import Now
from fastdino.model.block import Shape
from fastdino.model.head import Head
from fastdino.model.network import layer_rates
from fastdino.model.vit import ViT
from tests.engine.test_optimizer import make_engine

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "dinov2_param_groups.json").read_text())
DECAY = OptimConfig(layer_decay=0.9, patch_embed_lr=0.2)
BACKBONES: dict[str, tuple[Any, dict[str, int], OptimConfig]] = {
    "vit_small_reg4": ("small", {"registers": 4}, DECAY),
    "vit_96x3_swiglu": (Shape(96, 3, 3, 256, swiglu=True), {}, DECAY),
    "vit_small_no_decay": ("small", {"registers": 4}, OptimConfig()),
}
V2: dict[str, Any] = {
    "layer_decay": 0.7, "patch_embed_lr": 0.2, "beta2": 0.95, "clip": 100.0, "clip_mode": "module", "freeze_how": "lr",
}  # fmt: skip


class Net(nn.Module):
    """Our ViT with two heads, the first of which has the larger gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViT("nano", patch_size=8, image_size=16)
        sizes = {"num_prototypes": 7, "num_layers": 3, "hidden_dim": 5, "bottleneck_dim": 3}
        self.head, self.patch_head = (
            Head(96, HeadConfig(**sizes, freeze_prototype_norm=False), "xavier") for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        (x, prototypes), (y, patch_prototypes) = self.head(features), self.patch_head(features)
        return 40 * x @ prototypes.T + y @ patch_prototypes.T


def loss_of(network: nn.Module, step: int) -> Tensor:
    images = torch.randn(14, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(network(images), torch.arange(14) % 7)


def now(step: int) -> Now:
    return Now(0.003 * (step + 1), 0.1 * (step + 1), 0.9 + 0.01 * step, 0.04, freeze_last_layer=step < 2)


def ours(official: str) -> str:
    """Our name of an official parameter: blocks lie in chunks there, and the prototypes are torch's weight norm."""
    name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", official)
    return name.replace("last_layer.weight_", "last_layer.")


@pytest.mark.parametrize("name", BACKBONES)
def test_groups_and_rates_are_the_official_ones(name: str) -> None:
    """Every parameter of the network is in the table, and the table has no other."""
    size, options, settings = BACKBONES[name]
    network = Net()
    network.backbone = ViT(size, image_size=32, layer_scale=1e-5, mask_token=True, **options)
    official = {f"backbone.{ours(param)}": row for param, row in OFFICIAL[name].items()}
    for head in ("head", "patch_head"):
        official |= {f"{head}.{ours(param)}": row for param, row in OFFICIAL["dino_head"].items()}
    rates = layer_rates(dict(network.named_parameters()), settings.layer_decay, settings.patch_embed_lr)
    found = {
        param: [pytest.approx(rates[param], rel=1e-10), float(group.regularized), group.last_layer]
        for group in parameter_groups(network) for param in group.params
    }  # fmt: skip
    assert found == official


class PlainV2:
    """DINOv2's loop: clip each module, set each parameter's rate, step, move the teacher."""

    def __init__(self, network: nn.Module) -> None:
        self.student, self.teacher = copy.deepcopy(network), copy.deepcopy(network)
        groups = []
        for name, param in self.student.named_parameters():
            first, second, *rest = name.split(".")
            distance = 0  # from the final norm; 4 blocks
            if first == "backbone" and second != "norm":
                distance = 4 - int(rest[0]) if second == "blocks" else 5
            scale = V2["layer_decay"] ** distance * (V2["patch_embed_lr"] if second == "patch_embed" else 1)
            decays = not (name.endswith(".bias") or param.ndim == 1)
            groups.append({"params": [param], "scale": scale, "decays": decays, "last_layer": second == "last_layer"})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, V2["beta2"]))

    def step(self, step: int) -> list[float]:
        """Takes a step; returns the modules' gradient norms."""
        values = now(step)
        self.optimizer.zero_grad()
        loss_of(self.student, step).backward()
        norms = [float(nn.utils.clip_grad_norm_(m.parameters(), V2["clip"])) for m in self.student.children()]
        for group in self.optimizer.param_groups:
            still = group["last_layer"] and values.freeze_last_layer
            group["lr"] = 0.0 if still else values.lr * group["scale"]
            group["weight_decay"] = values.weight_decay if group["decays"] else 0.0
        self.optimizer.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(values.momentum).add_(s, alpha=1 - values.momentum)
        return norms


def felt(name: str, x: Tensor) -> Tensor:
    """Without the biases of attention's keys, whose gradient is rounding and nothing else, which Adam makes large."""
    return x.detach().unflatten(0, (3, -1))[::2] if name.endswith("qkv.bias") else x.detach()


def test_steps_equal_v2() -> None:
    torch.manual_seed(0)
    network = Net()
    engine, plain = make_engine(network, **V2), PlainV2(network)
    for step in range(5):
        norms = plain.step(step)
        if step == 0:
            assert min(norms) < V2["clip"] < sorted(norms)[1], "some modules are clipped, and one is not"
        loss = loss_of(engine.student, step)
        engine.backward(loss)
        engine.step(now(step), loss)
        for mine, theirs in ((engine.student, plain.student), (engine.teacher, plain.teacher)):
            for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(
                    felt(name, a), felt(name, b), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
    for fragment in engine.fragments():
        state = plain.optimizer.state[plain.student.get_parameter(fragment.name)]
        for moment in ("exp_avg", "exp_avg_sq"):
            want = state[moment].flatten()
            torch.testing.assert_close(fragment.tensors[moment], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    for name, param in network.named_parameters():
        assert not torch.equal(param, engine.student.get_parameter(name)), name


def test_a_rate_of_zero_freezes_bit_for_bit_while_moments_and_counters_run() -> None:
    network = Net()
    network.head.last_layer.v.data[0] = torch.tensor([-0.0, 1.0, -0.0])
    engine = make_engine(network, freeze_how="lr")
    pieces = {f.name: f.tensors for f in engine.fragments()}
    frozen = [name for name in pieces if "last_layer" in name]
    assert len(frozen) == 4
    for step in range(2):
        loss = loss_of(engine.student, step)
        engine.backward(loss)
        engine.step(now(step), loss)
        assert engine.counters()["updates/last_layer_decay"] == engine.counters()["updates/decay"] == step + 1
        for name in frozen:
            start = network.get_parameter(name).detach().flatten()
            assert torch.equal(pieces[name]["param"].view(torch.int32), start.view(torch.int32)), "not even decayed"
            assert pieces[name]["exp_avg"].any()
    loss = loss_of(engine.student, 2)
    engine.backward(loss)
    engine.step(now(2), loss)
    assert all((pieces[name]["param"] != network.get_parameter(name).flatten()).any() for name in frozen)


def test_rates_of_one_cost_nothing() -> None:
    """DINO v1's step has no table of rates; only a group in which one differs has."""

    def tables(**optim: Any) -> list[bool]:
        groups = make_engine(Net(), **optim).optimizer.param_groups
        return [group["lr_scale"] is not None for group in groups]

    assert tables() == [False, False, False]
    assert tables(layer_decay=0.9) == tables(patch_embed_lr=0.2) == [True, True, False]
    assert tables(freeze_how="lr") == [False, False, True]


def test_a_patch_embedding_at_rate_zero_stays() -> None:
    network = Net()
    engine = make_engine(network, patch_embed_lr=0.0)
    loss = loss_of(engine.student, 2)
    engine.backward(loss)
    engine.step(now(2), loss)
    for name, param in network.named_parameters():
        same = torch.equal(param, engine.student.get_parameter(name))
        assert same == name.startswith("backbone.patch_embed."), name

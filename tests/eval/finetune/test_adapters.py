"""What learns in each mode, at which rate; and low-rank changes, which merge into plain weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdino.config import ModelConfig
from fastdino.eval.features import EvaluationError
from fastdino.eval.finetune.adapters import (
    Classifier,
    LowRank,
    add_low_rank,
    biases_and_norms,
    groups,
    let_learn,
    merge_low_rank,
)
from fastdino.model import ViT, build_backbone
from fastdino.model.block import Linear, Shape
from tests.model.textbook import nano

TINY = Shape(16, 2, 2, 32)
NETWORKS: dict[str, dict[str, Any]] = {
    "v1": {},
    "rope": {"pos_embed": "rope", "rope_scale": 1.0, "layer_scale": 0.1, "registers": 2},
}


def moved(module: nn.Module) -> None:
    """Gives low-rank changes values that change something."""
    generator = torch.Generator().manual_seed(5)
    for part in module.modules():
        if isinstance(part, LowRank):
            with torch.no_grad():
                part.up.copy_(torch.randn(part.up.shape, generator=generator, dtype=part.up.dtype) * 0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_change_starts_at_nothing_and_merges_into_plain_names(name: str) -> None:
    vit, images = nano(**NETWORKS[name]).eval(), torch.randn(3, 3, 48, 48, dtype=torch.float64)
    names, before = sorted(vit.state_dict()), copy.deepcopy(vit.state_dict())
    plain = vit(images)
    add_low_rank(vit, rank=2, alpha=6.0)
    assert torch.equal(vit(images), plain), "to the bit"
    moved(vit)
    changed = vit(images)
    assert (changed - plain).abs().max() > 0.1
    merge_low_rank(vit)
    assert torch.equal(vit(images), changed)
    assert sorted(vit.state_dict()) == names
    assert not [m for m in vit.modules() if isinstance(m, LowRank)]
    assert {type(vit.blocks[0].attn.proj), type(vit.blocks[0].attn.qkv).__mro__[1]} == {Linear}  # type: ignore[union-attr]
    differ = {key for key, x in vit.state_dict().items() if not torch.equal(x, before[key])}
    assert differ == {f"blocks.{i}.attn.{layer}.weight" for i in range(4) for layer in ("qkv", "proj")}


def test_the_change_is_alpha_over_rank_times_up_times_down() -> None:
    weight = torch.zeros(3, 4)
    change = LowRank(weight, rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    assert change.down.abs().max() <= 0.5, "uniform within 1 / sqrt(4)"
    assert (change.up == 0).all()
    with torch.no_grad():
        change.up.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        change.down.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    want = torch.tensor([[3.0, 6.0, 9.0, 12.0], [30.0, 36.0, 42.0, 48.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(change(weight), want)
    assert torch.equal(change(weight + 1), want + 1)


def test_fp8_layers_stay_fp8_and_their_changes_learn() -> None:
    wide = ViT(Shape(1024, 1, 16, 64), patch_size=8, image_size=16)
    wide.use_fp8()
    add_low_rank(wide, rank=2, alpha=2.0)
    layers = [m for m in wide.modules() if isinstance(m, Linear)]
    assert all(layer.fp8 for layer in layers)
    (wide(torch.randn(1, 3, 16, 16)) * torch.randn(1, 1024)).sum().backward()
    (change,) = wide.blocks[0].attn.proj.parametrizations.weight  # type: ignore[union-attr]
    assert change.up.grad.abs().max() > 0
    merge_low_rank(wide)
    assert all(m.fp8 for m in wide.modules() if isinstance(m, Linear))


def test_changes_are_drawn_by_seed_and_differ_between_layers() -> None:
    def downs(seed: int) -> list[Tensor]:
        vit = ViT(TINY, patch_size=8, image_size=16)
        add_low_rank(vit, 2, 2.0, seed)
        return [m.down for m in vit.modules() if isinstance(m, LowRank)]

    one, same, other = downs(0), downs(0), downs(1)
    assert len(one) == 4
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_a_vit_of_timm_has_them_too_and_a_network_without_attention_is_refused() -> None:
    timms = build_backbone(ModelConfig(arch="timm:vit_tiny_patch16_224", drop_path=0.0), 32)
    let_learn(Classifier(timms, 192, 2), "lora")
    assert sum(isinstance(m, LowRank) for m in timms.modules()) == 24
    resnet = build_backbone(ModelConfig(arch="timm:resnet10t", drop_path=0.0), 32)
    with pytest.raises(EvaluationError, match=r"--mode lora .* timm:resnet10t has none: use bias or full"):
        let_learn(Classifier(resnet, 512, 2), "lora")


HEAD = {"head.weight", "head.bias"}
NORMS = {f"backbone.{norm}.{kind}" for norm in ("norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)))
         for kind in ("weight", "bias")}  # fmt: skip
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BIASES = {f"backbone.blocks.{i}.{layer}.bias" for i in (0, 1) for layer in LAYERS}
LOW_RANK = {f"backbone.blocks.{i}.attn.{layer}.parametrizations.weight.0.{side}"
            for i in (0, 1) for layer in ("qkv", "proj") for side in ("up", "down")}  # fmt: skip
LEARNS = {
    "head": HEAD,
    "bias": HEAD | NORMS | BIASES | {"backbone.patch_embed.proj.bias"},
    "lora": HEAD | LOW_RANK,
    "full": None,
    "lp-ft": None,
}


@pytest.mark.parametrize("mode", LEARNS)
def test_each_mode_trains_exactly_what_it_says(mode: Any) -> None:
    """By name, and by what a step changes."""
    model = Classifier(ViT(TINY, patch_size=8, image_size=16, layer_scale=0.1, mask_token=True), 16, 3)
    let_learn(model, mode, rank=2)
    want = LEARNS[mode] or {name for name, _ in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(groups(model, 0.1, 0.0))
    for _ in range(2):  # in the first, a low-rank change has no gradient on one of its sides
        optimizer.zero_grad()
        (model(torch.randn(4, 3, 16, 16)) ** 2).sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == want - {"backbone.mask_token"}


def test_norms_of_every_kind_are_bit_fits() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.Linear(4, 2, bias=False)
    )
    assert biases_and_norms(module) == {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight"}
    assert biases_and_norms(nn.LayerNorm(3)) == {"weight", "bias"}


def test_rates_fall_by_the_layer_and_biases_do_not_decay() -> None:
    """Depth 2: the head and the last norm have the rate, the blocks a half and a quarter, the tokens an eighth."""
    model = Classifier(ViT(TINY, patch_size=8, image_size=16), 16, 3)
    let_learn(model, "full")
    made = groups(model, 8.0, 0.05, 0.5)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in made for p in group["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(by_name)
    want = {
        "head.weight": (8.0, 0.05), "head.bias": (8.0, 0.0), "backbone.norm.weight": (8.0, 0.0),
        "backbone.blocks.1.attn.qkv.weight": (4.0, 0.05), "backbone.blocks.1.mlp.fc1.bias": (4.0, 0.0),
        "backbone.blocks.0.norm1.weight": (2.0, 0.0), "backbone.blocks.0.attn.proj.weight": (2.0, 0.05),
        "backbone.cls_token": (1.0, 0.05), "backbone.pos_embed": (1.0, 0.05),
        "backbone.patch_embed.proj.weight": (1.0, 0.05), "backbone.patch_embed.proj.bias": (1.0, 0.0),
    }  # fmt: skip
    assert {name: by_name[name] for name in want} == want


def test_rates_of_a_vit_of_timm_are_those_of_ours() -> None:
    timms = Classifier(build_backbone(ModelConfig(arch="timm:vit_tiny_patch16_224", drop_path=0.0), 32), 192, 2)
    ours = Classifier(ViT("tiny", image_size=32), 192, 2)
    rates = []
    for model in (timms, ours):
        of = {id(p): group["lr"] for group in groups(model, 1.0, 0.05, 0.75) for p in group["params"]}
        rates.append({name.replace("backbone.model.", "backbone."): of[id(p)] for name, p in model.named_parameters()})
    assert rates[0] == rates[1]
    assert len({*rates[0].values()}) == 14

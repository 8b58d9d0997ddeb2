"""Backbones of images of any number of channels: what they compute, are exported as, and are loaded from."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.model import build_network, export_backbone, restore_backbone
from fastdino.model.network import build_backbone
from fastdino.model.vit import ViT
from fastdino.model.weights import WeightsError, form_of, load_backbone, settled

FORMS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"registers": 4, "layer_scale": 1e-5},
    "v3": {"registers": 4, "layer_scale": 1e-5, "pos_embed": "rope"},
}


def config(channels: int, arch: str = "vit_nano", **model: Any) -> Config:
    return Config(
        model=ModelConfig(arch=arch, drop_path=0.0, **model),
        views=ViewsConfig(global_size=64, local_size=32, num_local=2, jitter=0.0, grayscale=0.0),
        data=DataConfig(channels=channels, normalize="image"),
    )


def vit(channels: int, seed: int = 0, **options: Any) -> ViT:
    return ViT("nano", image_size=64, channels=channels, seed=seed, **options).eval()


def test_channels_add_up():
    """The patch embedding is linear: the same weights for three of five channels, zeros for the others."""
    three, five = vit(3), vit(5)
    state = {**three.state_dict(), "patch_embed.proj.weight": five.patch_embed.proj.weight.detach().clone()}
    state["patch_embed.proj.weight"].zero_()[:, [4, 0, 2]] = three.patch_embed.proj.weight.detach()
    five.load_state_dict(state)
    x = torch.randn(2, 5, 64, 48)
    torch.testing.assert_close(five(x), three(x[:, [4, 0, 2]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["vit_nano", "timm:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_a_network_takes_them(arch, channels):
    made = config(channels, arch)
    if arch.startswith("timm:vit"):
        made = dataclasses.replace(made, views=dataclasses.replace(made.views, num_local=0))
    network = build_network(made)
    assert network.backbone.channels == channels
    views = {"global": torch.randn(2, 3, channels, 64, 64)}
    if made.views.num_local:
        views["local"] = torch.randn(2, 3, channels, 32, 32)
    out = network(views)
    assert out.cls.shape == (sum(map(len, views.values())), 3, network.backbone.num_features)
    out.cls_points.sum().backward()
    first = next(p for p in network.backbone.parameters() if p.ndim == 4)
    assert first.shape[1] == channels
    assert all(first.grad[:, c].any() for c in range(channels)), "every channel is read"


def expressive(channels: int, name: str) -> ViT:
    """One whose blocks show: LayerScale starts too small for that."""
    ours = vit(channels, 1, **FORMS[name])
    with torch.no_grad():
        for factors in (p for n, p in ours.named_parameters() if "gamma" in n):
            factors.fill_(1.0)
    return ours


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("channels", [1, 4])
def test_timm_computes_the_same(tmp_path, name, channels):
    import timm

    ours, x = expressive(channels, name), torch.randn(2, channels, 64, 64)
    expression = export_backbone(ours, tmp_path / "a.safetensors")
    assert f"in_chans={channels}" in expression
    theirs = eval(expression, {"timm": timm, "torch": torch}).eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("channels", [1, 4])
def test_hugging_face_computes_the_same(tmp_path, name, channels):
    transformers = pytest.importorskip("transformers")
    ours, x = expressive(channels, name), torch.randn(2, channels, 64, 64)
    export_backbone(ours, tmp_path / "hf", format="hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(x).last_hidden_state[:, 0], ours(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", ["timm", "hf", "repository"])
@pytest.mark.parametrize("described", [True, False])
def test_an_export_knows_its_channels(tmp_path, format, described):
    ours = vit(4, 1)
    path = tmp_path / ("a" if format == "hf" else "a.safetensors")
    run = dataclasses.replace(config(4), data=DataConfig(channels=4, normalize="image", range=(0, 4095)))
    export_backbone(ours, path, {"config": run.to_json()} if described else {}, format)
    again, found = restore_backbone(path)
    assert again.channels == found.data.channels == 4
    assert found.data.normalize == "image"
    assert found.data.range == ((0, 4095) if described else None)
    x = torch.randn(2, 4, 64, 64)
    torch.testing.assert_close(again.eval()(x), ours(x), rtol=0, atol=1e-5)


def test_an_export_of_timm_knows_its_channels(tmp_path):
    import timm

    made = config(4, "timm:resnet18")
    ours = build_backbone(made.model, 64, channels=4, seed=1).eval()
    expression = export_backbone(ours, tmp_path / "a.safetensors", {"config": made.to_json()})
    x = torch.randn(2, 4, 64, 64)
    theirs = eval(expression, {"timm": timm}).eval()
    again, _ = restore_backbone(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(theirs(x), ours(x))
        assert torch.equal(again.eval()(x), ours(x))


def test_weights_of_other_channels_are_refused(tmp_path: Path):
    path = tmp_path / "three.safetensors"
    save_file(vit(3).state_dict(), path)
    assert form_of(path).channels == 3
    asked = config(4)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, weights=path))
    says = r"are of images with 3 channels, and data\.channels=4: set data\.channels=3, or"
    with pytest.raises(ConfigError, match=says):
        settled(asked)
    with pytest.raises(ConfigError, match=says):
        build_network(asked)
    with pytest.raises(WeightsError, match=r"\(96, 3, 16, 16\) for \(96, 4, 16, 16\)\. Are .* data\.channels the same"):
        load_backbone(vit(4), path)
    torch.save(load_file(path), tmp_path / "timm.pth")
    other = build_backbone(ModelConfig(arch="timm:resnet18"), 64, channels=4)
    save_file(
        {
            n: x.contiguous()
            for n, x in build_backbone(ModelConfig(arch="timm:resnet18"), 64).published.state_dict().items()
        },
        path,
    )
    with pytest.raises(WeightsError, match=r"conv1\.weight \(64, 3, 7, 7\) for \(64, 4, 7, 7\)\. Are"):
        load_backbone(other, path)


def test_weights_of_the_same_channels_are_a_start(tmp_path: Path):
    path = tmp_path / "four.safetensors"
    save_file(vit(4, 3).state_dict(), path)
    asked = config(4)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, weights=path))
    loaded = build_network(asked).backbone.state_dict()["patch_embed.proj.weight"]
    assert torch.equal(loaded, vit(4, 3).patch_embed.proj.weight)
    assert math.prod(loaded.shape) == 96 * 4 * 16 * 16

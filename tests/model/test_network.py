"""Networks built from settings, with our backbones and timm's."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fastdino.config import Config, ConfigError, HeadConfig, ModelConfig, ViewsConfig
from fastdino.model import ViT, build_backbone, build_network, export_backbone

HEAD = HeadConfig(num_prototypes=16, hidden_dim=24, bottleneck_dim=8)


def config(model: ModelConfig, **views: Any) -> Config:
    return Config(model=model, head=HEAD, views=ViewsConfig(**{"global_size": 64, "local_size": 32, **views}))


def groups(batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, batch, 3, 64, 64), torch.randn(3, batch, 3, 32, 32)]


@pytest.mark.parametrize("arch", ["vit_nano", "timm:vit_tiny_patch16_224", "timm:resnet18"])
def test_logits_are_view_major(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(config(ModelConfig(arch=arch, drop_path=0.0))).eval()
    views = groups()
    with torch.no_grad():
        logits = network(views)
        assert logits.shape == (5, 2, 16)
        for i, view in enumerate([*views[0], *views[1]]):
            for image in range(2):
                want = network.head(network.backbone(view[image : image + 1]))
                torch.testing.assert_close(logits[i, image], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(views[:1]), logits[:2], rtol=1e-4, atol=1e-5)


def test_the_seed_decides_and_the_teacher_has_no_drop_path() -> None:
    settings = config(ModelConfig(arch="vit_nano", drop_path=0.4))
    networks = []
    for teacher in (False, True):
        torch.manual_seed(3)
        networks.append(build_network(settings, teacher=teacher))
    student, teacher_ = networks
    assert student.state_dict().keys() == teacher_.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher_.parameters(), strict=True))
    assert isinstance(student.backbone, ViT)
    assert isinstance(teacher_.backbone, ViT)
    assert student.backbone.blocks[-1].drop_path == pytest.approx(0.4)
    assert teacher_.backbone.blocks[-1].drop_path == 0
    assert [p.requires_grad for p in teacher_.parameters()] == [False] * len(list(teacher_.parameters()))
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {"head.last_layer.g"}
    assert student.training
    assert teacher_.training  # as in DINO v1


def test_options_reach_the_backbone() -> None:
    model = ModelConfig(arch="vit_tiny", patch_size=8, attention="sdpa", pos_embed="sincos", init="xavier")
    backbone = build_backbone(model, 48)
    assert backbone.num_features == 192
    assert backbone.grid == (6, 6)
    assert backbone.blocks[0].attn.choice == "sdpa"
    assert not backbone.pos_embed[0, 0].any()
    assert backbone.blocks[0].mlp.fc1.weight.abs().max() < (6 / (192 + 768)) ** 0.5  # uniform, so bounded


def test_weights_are_loaded(tmp_path: Path) -> None:
    source = build_backbone(ModelConfig(arch="vit_nano"), 64)
    export_backbone(source, tmp_path / "nano.safetensors")
    network = build_network(config(ModelConfig(arch="vit_nano", weights=tmp_path / "nano.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(network.backbone.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arch", "width"),
    [("convnext_atto", 320), ("swin_tiny_patch4_window7_224", 768), ("mobilenetv3_small_050", 1024)],
)  # ConvNeXt knows no image size, Swin must be told, MobileNet's num_features is not its output's width
def test_timm_backbones_take_both_sizes(arch: str, width: int) -> None:
    backbone = build_backbone(ModelConfig(arch=f"timm:{arch}", drop_path=0.1), 224, 96).eval()
    assert backbone.num_features == width
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, width)
    assert backbone.state_dict().keys() == timm.create_model(arch, num_classes=0).state_dict().keys()


def test_timm_vit_equals_ours() -> None:
    """On views of the size that both were made for; other sizes differ, as timm resamples positions its own way."""
    torch.manual_seed(0)
    ours = build_network(config(ModelConfig(arch="vit_tiny", drop_path=0.0))).eval()
    theirs = build_network(config(ModelConfig(arch="timm:vit_tiny_patch16_224", drop_path=0.0))).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs(groups()[:1]), ours(groups()[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "drop_path", "message"),
    [
        ("timm:resnet5", 0.0, r"no such model; did you mean resnet50"),
        ("timm:mixer_s16_224", 0.0, r"local views of 96 px \(views.local_size\).*Input height \(96\)"),
        ("timm:vgg11", 0.1, r"model.drop_path=0.1: vgg11 has no drop path, set it to 0"),
    ],
)
def test_what_timm_cannot_do(arch: str, drop_path: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(ModelConfig(arch=arch, drop_path=drop_path), 224, 96)


def test_without_local_views_their_size_does_not_matter() -> None:
    model = ModelConfig(arch="timm:mixer_s32_224", drop_path=0.0)
    network = build_network(config(model, global_size=224, num_local=0, local_size=96))
    assert network.backbone.num_features == 512


def test_bf16_timm_backbone_takes_fp32_views() -> None:
    network = build_network(config(ModelConfig(arch="timm:resnet18", drop_path=0.0))).eval().bfloat16()
    assert network(groups()).dtype == torch.bfloat16

"""A backbone with its classifier, written for timm: every key has its place, and the logits are ours."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fastdino.config import ConfigError, ModelConfig
from fastdino.model import ViT, build_backbone, export_backbone, restore_backbone
from tests.model.textbook import nano

VITS: dict[str, dict[str, Any]] = {
    "v1": {},
    "reg2": {"layer_scale": 1e-1, "registers": 2, "interpolation": "antialias"},
    "rope": {"pos_embed": "rope", "rope_scale": 1.0},
}


def model_of(told: str, path: Path) -> nn.Module:
    """What the told expression makes, without its weights, and these loaded as strictly as torch does."""
    model = eval(re.sub(r", checkpoint_path=.*\)$", ")", told), {"timm": timm, "torch": torch})
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


@pytest.mark.parametrize("name", VITS)
def test_our_vit(name: str, tmp_path: Path) -> None:
    vit, head, path = nano(**VITS[name]).float().eval(), nn.Linear(96, 5), tmp_path / "a.safetensors"
    told = export_backbone(vit, path, {"classes": '["a"]'}, head=head)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(model_of(told, path)(images), head(vit(images)), atol=1e-5)
    with safe_open(path, "pt") as file:
        assert file.metadata()["classes"] == '["a"]'
    if name == "v1":  # read back, the backbone is what it was: the classifier is left out
        again, _ = restore_backbone(path)
        assert isinstance(again, ViT)
        assert torch.equal(again.eval()(images), vit(images))


@pytest.mark.parametrize("arch", ["timm:resnet10t", "timm:convnext_atto"])
def test_a_backbone_of_timm(arch: str, tmp_path: Path) -> None:
    backbone, path = build_backbone(ModelConfig(arch=arch, drop_path=0.0), 32).eval(), tmp_path / "a.safetensors"
    head, images = nn.Linear(backbone.num_features, 5), torch.randn(2, 3, 32, 32)
    told = export_backbone(backbone, path, head=head)
    with torch.no_grad():
        assert torch.allclose(model_of(told, path)(images), head(backbone(images)), atol=1e-5)


def test_a_model_with_two_classifiers_is_refused(tmp_path: Path) -> None:
    arch = "timm:deit_tiny_distilled_patch16_224"
    backbone = build_backbone(ModelConfig(arch=arch, drop_path=0.0), 32)
    with pytest.raises(ConfigError, match=r"several classifiers, head, head_dist"):
        export_backbone(backbone, tmp_path / "a.safetensors", head=nn.Linear(192, 5))
    assert not [*tmp_path.iterdir()]

"""Feature extraction: order, modes, precision, unreadable images."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdino.config import Config, ModelConfig, ViewsConfig
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.sources.source import Source
from fastdino.data.views import center_view, normalize
from fastdino.eval import Features, Reading, extract
from fastdino.eval.features import gem
from fastdino.model import ViT, build_backbone, export_backbone, restore_backbone

READING = Reading(size=32)


def vit(**options: float) -> ViT:
    return ViT("nano", patch_size=8, image_size=32, **options)


def seen(backbone: nn.Module, source: Source, reading: Reading = READING) -> Features:
    return extract(backbone, source, reading, batch=4, num_workers=0)


def test_features_are_the_backbones_in_order() -> None:
    source, backbone = ShapesSource(10, 40), vit()
    features, labels, places = seen(backbone, source)
    images = torch.stack([center_view(source.read(i)[0], 32) for i in range(10)])
    want = backbone.eval()(normalize(images, "imagenet"))
    torch.testing.assert_close(features, want.detach(), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [source.read(i)[1] for i in range(10)]
    assert places.tolist() == [*range(10)]
    assert features.dtype == torch.float32
    assert not features.requires_grad
    nn.Linear(96, 2)(features).sum().backward()  # a probe can train on them


def test_features_are_of_as_much_as_the_reading_shows() -> None:
    source, backbone = ShapesSource(6, 40), vit().eval()
    images = torch.stack([center_view(source.read(i)[0], 32, crop=1.0) for i in range(6)])
    want = backbone(normalize(images, "imagenet")).detach()
    torch.testing.assert_close(seen(backbone, source, Reading(size=32, crop=1.0))[0], want, rtol=1e-4, atol=1e-5)


def test_evaluation_mode_and_back() -> None:
    """Drop path and BatchNorm are off during the pass, and each module returns to the mode it had."""
    source = ShapesSource(8, 32)
    backbone = nn.Sequential(vit(drop_path=0.9), nn.BatchNorm1d(96), nn.Dropout(0.5).eval())
    first, second = (seen(backbone, source)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not backbone[1].running_mean.any()
    assert [module.training for module in backbone] == [True, True, False]


def test_modes_return_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    backbone = Fails()
    with pytest.raises(ValueError, match="cannot take images of 32 px: no"):
        seen(backbone, ShapesSource(2, 32))
    assert backbone.training
    assert torch.is_grad_enabled()


def test_bf16_weights_and_autocast() -> None:
    source = ShapesSource(8, 32)
    want = seen(vit(), source)[0]
    autocast = seen(vit(), source, Reading(size=32, precision="bf16"))[0]
    half = seen(vit().bfloat16(), source)[0]
    assert seen(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).bfloat16(), source)[0].shape == (8, 5)
    for got in (autocast, half):
        assert got.dtype == torch.float32
        assert not torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


class Half:
    """Every second image cannot be read."""

    labels = ("a", "b")

    def __init__(self, every: int) -> None:
        self.every = every

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> tuple[np.ndarray, int]:
        if index % self.every == 0:
            raise BadImage(str(index), "broken")
        return np.zeros((32, 32, 3), np.uint8), index

    def name(self, index: int) -> str:
        return str(index)


def test_unreadable_images_are_left_out() -> None:
    assert seen(vit(), Half(2)).labels.tolist() == [1, 3, 5]
    assert seen(vit(), Half(2)).places.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="none of the images could be read"):
        seen(vit(), Half(1))


def test_tokens_are_those_of_the_layers() -> None:
    source, backbone = ShapesSource(6, 32), vit().eval()
    images = normalize(torch.stack([center_view(source.read(i)[0], 32) for i in range(6)]), "imagenet")
    with torch.no_grad():
        layers = backbone.intermediate_layers(images, 4)
        cls, patches = backbone(images), backbone.patch_tokens(images).flatten(1, 2)
    assert len(layers) == 4
    torch.testing.assert_close(layers[-1][0], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers[-1][1], patches, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layers[0][0], layers[1][0], atol=1e-2), "each block has its own"
    last4, mean = torch.cat([token for token, _ in layers], dim=1), patches.mean(1)
    want = {
        "mean": mean,
        "cls+mean": torch.cat([cls, mean], 1),
        "last4": last4,
        "last4+mean": torch.cat([last4, mean], 1),
        "gem": gem(patches, 3),
        "cls+gem": torch.cat([cls, gem(patches, 3)], 1),
    }
    for tokens, features in want.items():
        got = seen(backbone, source, Reading(size=32, tokens=tokens)).vectors
        torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-5, msg=tokens)
    with pytest.raises(ValueError, match="tokens 'mean': this needs one of our ViTs"):
        seen(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), source, Reading(size=32, tokens="mean"))


def test_a_size_that_the_backbone_cannot_take() -> None:
    """One message before the first image is read, of our ViT and of any other backbone."""
    for backbone in (vit(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))):
        with pytest.raises(ValueError, match=r"36.*(patches of 8|cannot be multiplied)"):
            seen(backbone, Half(1), Reading(size=36))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "levit_128s", "vit_relpos_small_patch16_224"])
def test_backbones_with_buffers_that_are_no_state(tmp_path: Path, name: str) -> None:
    """What a model computes when it is made (index tables, masks) is in no file, and is there again when restored."""
    config = Config(model=ModelConfig(arch=f"timm:{name}", drop_path=0.0), views=ViewsConfig(num_local=0))
    backbone = build_backbone(config.model, 224, seed=1)
    assert {name for name, _ in backbone.named_buffers()} - backbone.state_dict().keys()
    export_backbone(backbone, tmp_path / "a.safetensors", {"config": config.to_json()})
    restored, _ = restore_backbone(tmp_path / "a.safetensors")
    timm.create_model(name, num_classes=0).load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    images = ShapesSource(2, 64)
    features = [seen(model, images, Reading()).vectors for model in (backbone, restored)]
    assert torch.equal(*features)

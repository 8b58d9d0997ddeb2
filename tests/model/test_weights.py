"""Weights move between timm, DINO v1 and us, and wrong files are refused with a reason."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdino.config import Config, HeadConfig, ModelConfig, ViewsConfig
from fastdino.model import Head, ViT, export_backbone, load_backbone, load_head, restore_backbone
from fastdino.model.vit import resample_positions

HEAD: dict[str, Any] = {"num_prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8}


def nano(seed: int = 0, **options: Any) -> ViT:
    torch.manual_seed(seed)
    return ViT("nano", **{"image_size": 64, **options})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_timm_loads_an_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "small.safetensors"
    ours = ViT("small").eval()
    export_backbone(ours, path, {"epoch": "7"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "7"}
    assert os.listdir(tmp_path) == ["small.safetensors"]
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    through_path = timm.create_model("vit_small_patch16_224", num_classes=0, checkpoint_path=str(path))
    assert same(through_path, theirs)


def test_export_of_views_of_one_buffer(tmp_path: Path) -> None:
    """A teacher's parameters are slices of a flat buffer; the file holds each once, not the buffer each time."""
    vit, path = nano(), tmp_path / "a.safetensors"
    want = {name: x.clone() for name, x in vit.state_dict().items()}
    flat = torch.cat([p.detach().flatten() for p in vit.parameters()])
    start = 0
    for p in vit.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    export_backbone(vit, path)
    assert path.stat().st_size < 4 * flat.numel() + 20000
    assert all(torch.equal(x, want[name]) for name, x in load_file(path).items())


def test_timms_weights_with_a_classifier(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    save_file(theirs.state_dict(), tmp_path / "tiny.safetensors")
    ours = ViT("tiny")
    load_backbone(ours, tmp_path / "tiny.safetensors")
    assert torch.equal(ours.blocks[3].mlp.fc1.weight, theirs.blocks[3].mlp.fc1.weight)


def v1_checkpoint(path: Path, vit: ViT, head: dict[str, Tensor], prefix: str = "") -> None:
    """As DINO v1 writes it, its command line included; the student holds other weights than the teacher."""
    teacher = {f"{prefix}backbone.{k}": v for k, v in vit.state_dict().items()} | {
        f"{prefix}head.{k}": v for k, v in head.items()
    }
    student = {f"module.{k.removeprefix('module.')}": v + 1 for k, v in teacher.items()}
    content = {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=0.1)}
    torch.save(content, path)


def v1_head(num_layers: int, new_names: bool) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    ours = Head(96, HeadConfig(**HEAD, num_layers=num_layers, freeze_prototype_norm=False))
    state = ours.state_dict()
    g, v = state.pop("last_layer.g"), state.pop("last_layer.v")
    wrapped = "last_layer.parametrizations.weight.original" if new_names else "last_layer.weight_"
    state |= {wrapped + ("0" if new_names else "g"): g, wrapped + ("1" if new_names else "v"): v}
    if num_layers == 1:
        state = {k.replace("mlp.0.", "mlp."): v for k, v in state.items()}
    return ours, state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("num_layers", "new_names"), [(3, False), (1, True)])
def test_dino_v1_checkpoint(tmp_path: Path, num_layers: int, new_names: bool, prefix: str) -> None:
    torch.manual_seed(5)
    head, state = v1_head(num_layers, new_names)
    v1_checkpoint(tmp_path / "full.pth", nano(1), state, prefix)
    backbone, other = nano(2), Head(96, HeadConfig(**HEAD, num_layers=num_layers))
    load_backbone(backbone, tmp_path / "full.pth")
    load_head(other, tmp_path / "full.pth")
    assert same(backbone, nano(1))
    assert same(other, head)


def test_dino_v1_backbone_file(tmp_path: Path) -> None:
    torch.save(nano(1).state_dict(), tmp_path / "pretrain.pth")
    backbone = nano(2)
    load_backbone(backbone, tmp_path / "pretrain.pth")
    assert same(backbone, nano(1))


def test_positions_of_another_grid_are_resampled(tmp_path: Path) -> None:
    source = nano(1)  # 4 x 4 patches
    export_backbone(source, tmp_path / "a.safetensors")
    wide = nano(2, image_size=(48, 96))
    load_backbone(wide, tmp_path / "a.safetensors")
    assert torch.equal(wide.pos_embed, resample_positions(source.pos_embed, (4, 4), (3, 6)))
    x = torch.randn(2, 3, 48, 96)
    torch.testing.assert_close(wide(x), source(x))


def test_everything_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = nano().state_dict()
    del state["cls_token"], state["blocks.1.norm1.bias"]
    state["norm.weight"] = torch.ones(7)
    state["blocks.0.ls1.gamma"] = torch.ones(96)
    save_file(state, tmp_path / "odd.safetensors")
    target = nano(4)
    message = (
        r"2 missing: blocks.1.norm1.bias, cls_token; 1 unexpected: blocks.0.ls1.gamma; "
        r"1 misshaped: norm.weight \(7,\) for \(96,\)"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(target, tmp_path / "odd.safetensors")
    assert same(target, nano(4))  # nothing was half loaded
    with pytest.raises(ValueError, match=r"24 missing.*pos_embed|misshaped"):
        load_backbone(ViT("tiny"), tmp_path / "odd.safetensors")


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch evil",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": nano().state_dict(), "args": _Evil()}, "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil(), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="holds code, which is never run"):
            load_backbone(nano(), Path(name))
    assert not Path("evil").exists()


def test_broken_files(tmp_path: Path) -> None:
    export_backbone(nano(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_backbone(nano(), tmp_path / "b.safetensors")
    (tmp_path / "c.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of weights"):
        load_backbone(nano(), tmp_path / "c.pth")
    torch.save(torch.ones(3), tmp_path / "d.pth")
    with pytest.raises(ValueError, match="holds a Tensor, not weights by name"):
        load_backbone(nano(), tmp_path / "d.pth")
    with pytest.raises(ValueError, match="no such file"):
        load_backbone(nano(), tmp_path / "none.safetensors")


def test_restore_needs_only_the_file(tmp_path: Path) -> None:
    views = ViewsConfig(global_size=48, local_size=24)
    config = Config(model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.3), views=views)
    vit = ViT("nano", patch_size=8, image_size=48)
    export_backbone(vit, tmp_path / "a.safetensors", {"config": config.to_json()})
    restored = restore_backbone(tmp_path / "a.safetensors")
    assert same(restored, vit)
    assert restored.blocks[-1].drop_path == 0
    export_backbone(vit, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="does not say which backbone"):
        restore_backbone(tmp_path / "b.safetensors")

"""Weights move between timm, DINO v1 and us, and wrong files are refused with a reason."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdino.config import Config, ConfigError, HeadConfig, ModelConfig, ViewsConfig
from fastdino.model import (
    Head,
    ViT,
    build_network,
    export_backbone,
    load_backbone,
    load_head,
    restore_backbone,
)
from fastdino.model.weights import form_of

HEAD: dict[str, Any] = {"num_prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8}


def nano(seed: int = 0, **options: Any) -> ViT:
    return ViT("nano", **{"image_size": 64, "seed": seed, **options})


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


def test_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    export_backbone(nano(), tmp_path / "new" / "a.safetensors")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "new" / "a.safetensors" / "b.safetensors", tmp_path / "pipe"):
        with pytest.raises(ConfigError, match=rf"cannot write {path}.*--out"):
            export_backbone(nano(), path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "folder",
        "new",
        "new/a.safetensors",
        "pipe",
    ]


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
    ours = Head(96, HeadConfig(**HEAD, num_layers=num_layers, freeze_prototype_norm=False), seed=5)
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


def test_the_grid_of_the_file_is_kept(tmp_path: Path) -> None:
    """Its positions are interpolated at each forward pass, and can be exported as they were."""
    source = nano(1)  # 4 x 4 patches
    export_backbone(source, tmp_path / "a.safetensors")
    wide = nano(2, image_size=(48, 96)).requires_grad_(False)
    load_backbone(wide, tmp_path / "a.safetensors")
    assert wide.grid == (4, 4)
    assert same(wide, source)
    assert not wide.pos_embed.requires_grad
    x = torch.randn(2, 3, 48, 96)
    torch.testing.assert_close(wide(x), source(x), rtol=0, atol=0)


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
        with pytest.raises(ValueError, match=r"holds code, \w+\.system, which is never run"):
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
    restored, found = restore_backbone(tmp_path / "a.safetensors")
    assert found == config
    assert same(restored, vit)
    assert restored.blocks[-1].drop_path == 0
    with pytest.raises(ValueError, match=r"holds a vit_nano, not the vit_small that was asked for: leave out --arch"):
        restore_backbone(tmp_path / "a.safetensors", "vit_small")


PREFIXES = (
    "", "module.", "backbone.", "module.backbone.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.",
    "model.module.backbone.", "teacher.backbone.", "encoder.0.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix(tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in nano(1).state_dict().items()}
    torch.save({"state_dict": state, "epoch": np.int64(3), "out": Path("x")}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        backbone = nano(2)
        load_backbone(backbone, path)
        assert same(backbone, nano(1))
        form = form_of(path)
        assert (form.arch, form.patch_size, form.image_size) == ("vit_nano", 16, 64)


AVERAGED_BESIDE = [
    *[((plain, ""), (averaged, "")) for plain in ("state_dict", "model", "student")
      for averaged in ("state_dict_ema", "model_ema", "ema", "teacher")],
    (("student", "module.backbone."), ("teacher", "backbone.")),
    (("model", "student.backbone."), ("model", "teacher.backbone.")),
    (("state_dict", "backbone."), ("state_dict", "momentum_backbone.")),
    (("state_dict", "student_backbone."), ("state_dict", "teacher_backbone.")),
    (("state_dict", "model."), ("state_dict", "ema_model.module.")),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "averaged"), AVERAGED_BESIDE)
def test_averaged_weights_come_first(tmp_path: Path, plain: tuple[str, str], averaged: tuple[str, str]) -> None:
    content: dict[str, dict[str, Tensor]] = {}
    for (key, prefix), seed in ((plain, 2), (averaged, 1)):
        content.setdefault(key, {}).update({prefix + name: x for name, x in nano(seed).state_dict().items()})
    torch.save(content, tmp_path / "a.pth")
    backbone = nano(3)
    load_backbone(backbone, tmp_path / "a.pth")
    assert same(backbone, nano(1))
    torch.save({**content, averaged[0]: {}} | {plain[0]: content[plain[0]]}, tmp_path / "b.pth")
    load_backbone(backbone, tmp_path / "b.pth")  # a place for averages that holds none
    assert same(backbone, nano(2 if plain[0] != averaged[0] else 1))


def test_a_head_of_a_released_backbone(tmp_path: Path) -> None:
    torch.save(nano().state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no projection head"):
        load_head(Head(96, HeadConfig(**HEAD)), tmp_path / "a.pth")


def test_a_network_that_starts_from_a_full_checkpoint(tmp_path: Path) -> None:
    """Backbone and head are the checkpoint's teacher's, in the student too; a resumed network reads no file."""
    path = tmp_path / "full.pth"
    head, state = v1_head(3, new_names=False)
    v1_checkpoint(path, nano(1), state)
    config = Config(
        model=ModelConfig(arch="vit_nano", weights=path),
        head=HeadConfig(**HEAD, weights=path),
        views=ViewsConfig(global_size=64, local_size=32),
    )
    for teacher in (False, True):
        network = build_network(config, teacher)
        assert same(network.backbone, nano(1))
        assert same(network.head, head)
    path.unlink()
    assert not same(build_network(config, load=False).head, head)
    with pytest.raises(ValueError, match="no such file"):
        build_network(config)


def test_a_published_file_says_by_its_shapes_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.pth"
    for size, patch, side in (("nano", 8, 48), ("tiny", 16, 224)):
        vit = ViT(size, patch_size=patch, image_size=side)
        torch.save(vit.state_dict(), path)
        restored, config = restore_backbone(path)
        assert same(restored, vit)
        assert (config.model.arch, config.model.patch_size, config.views.global_size) == (f"vit_{size}", patch, side)
    with pytest.raises(ValueError, match="holds a vit_tiny, not the vit_small"):
        restore_backbone(path, "vit_small")
    theirs = timm.create_model("resnet18", num_classes=10)
    torch.save({"state_dict": {"module." + name: x for name, x in theirs.state_dict().items()}}, path)
    with pytest.raises(ValueError, match=r"shapes are those of none of our ViTs.*--arch timm:resnet50"):
        restore_backbone(path)
    restored, config = restore_backbone(path, "timm:resnet18", 64)
    assert config.views.global_size == 64
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        restored.eval()(x), theirs.eval().forward_head(theirs.forward_features(x), pre_logits=True)
    )

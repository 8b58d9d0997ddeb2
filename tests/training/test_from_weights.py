"""A run that starts from weights: their form is the run's, and its folder knows it when the file is gone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdino
from fastdino import distributed
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.model import ViT, WeightsError, build_backbone, export_backbone
from fastdino.model.weights import files
from fastdino.model.weights.files import read
from fastdino.training.export import run_backbone
from fastdino.training.run_folder import read_config
from fastdino.training.trainer import Trainer


def config(folder: Path, weights: Path | None, epochs: int = 1, **model: Any) -> Config:
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0, weights=weights, **model),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32),
        views=ViewsConfig(global_size=32, local_size=16, num_local=1),
        data=DataConfig(root="shapes", num_images=4, image_size=32, num_workers=0),
        loss=LossConfig(patch_weight=1.0),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(name="torch", device="cpu"),
        run=RunConfig(dir=folder, epochs=epochs, local_batch=4, knn_every=0),
    )


def test_the_folder_knows_the_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"registers": 4, "layer_scale": 1e-5, "interpolation": "antialias"}
    file, run = tmp_path / "hub.pth", tmp_path / "run"
    torch.save(ViT("nano", patch_size=8, image_size=56, mask_token=True, **options).state_dict(), file)
    fastdino.train(config(run, file, layer_scale=0.1))
    assert "model.layer_scale=0.1 has no effect: model.weights have 1e-05" in caplog.text
    kept = read_config(run).model
    assert (kept.registers, kept.layer_scale, kept.interpolation, kept.image_size) == (4, 1e-5, "antialias", 56)
    file.unlink()
    assert fastdino.train(config(run, file, epochs=2)).steps == 2
    assert fastdino.train(config(run, None, epochs=3)).steps == 3, "the flag may be left out, as before"
    assert read_config(run).model == kept
    with pytest.raises(ConfigError, match="registers is 4 there, 2 here"):
        fastdino.train(config(run, file, epochs=4, registers=2))
    with pytest.raises(WeightsError, match=f"It is a run: write its backbone to a file by fastdino export {run}"):
        fastdino.train(config(tmp_path / "other", run))
    backbone, _, step = run_backbone(run)
    assert step == 3
    assert isinstance(backbone, ViT)
    assert (backbone.grid, backbone.num_prefix, backbone.interpolation) == ((7, 7), 5, "antialias")


def test_student_and_teacher_start_from_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the file's values, running statistics of BatchNorm too, and it is read for one of them alone."""
    model = ModelConfig(arch="timm:resnet10t", drop_path=0.0)
    source = build_backbone(model, 32, seed=1)
    for name, buffer in source.published.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    export_backbone(source, tmp_path / "a.safetensors")
    base = config(tmp_path / "run", None)
    changed = {"model": dataclasses.replace(model, weights=tmp_path / "a.safetensors"), "loss": LossConfig()}
    readings: list[Path] = []
    monkeypatch.setattr(files, "read", lambda path: readings.append(path) or read(path))
    with distributed.init("cpu") as ranks:
        trainer = Trainer(dataclasses.replace(base, **changed), ranks)
    assert len(readings) == 1
    for network in (trainer.engine.student_network, trainer.engine.teacher):
        found = network.backbone.published.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in source.published.state_dict().items())
    heads = (trainer.engine.student_network.head, trainer.engine.teacher.head)
    assert torch.equal(*(torch.cat([p.flatten() for p in head.parameters()]) for head in heads))


def test_weights_that_do_not_fit_leave_no_folder(tmp_path: Path) -> None:
    torch.save(ViT("nano", patch_size=16, image_size=64).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"has arch vit_nano, patch_size 16.*--model.patch-size 16"):
        fastdino.train(config(tmp_path / "run", tmp_path / "a.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]

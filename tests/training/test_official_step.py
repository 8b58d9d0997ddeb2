"""Whole steps against DINOv2's own modules: every part of the loss, every gradient's norm, the weights after three.

The numbers of dinov2_step.json were computed with facebookresearch/dinov2 (b8931f7: DinoVisionTransformer, DINOHead,
its three losses, its parameter groups, torch's AdamW, clipping by module) on the CPU in fp32, from the weights, views
and masks that are made here. With no local views its loss is divided by 3 for 2 pairs of views; here it is their mean.
"""

import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdino import distributed
from fastdino.config import (
    Config,
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PatchHeadConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.data import Batch, Masks
from fastdino.engine.shards import views_of
from fastdino.training.trainer import Trainer

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "dinov2_step.json").read_text())
HEAD = {"hidden_dim": 48, "freeze_prototype_norm": False}
CASES: dict[str, dict[str, Any]] = {
    "centering, shared head": {},
    "centering, separate heads, registers": {"separate": True, "registers": 4, "interpolation": "antialias"},
    "sinkhorn, shared head": {"targets": "sinkhorn"},
    "sinkhorn, separate heads, no local views": {"targets": "sinkhorn", "separate": True, "num_local": 0},
}
EVERY_ENGINE = "centering, separate heads, registers"
ENGINES = {
    "torch": EngineConfig(name="torch", device="cpu"),
    **{f"deepspeed {stage}": EngineConfig(zero_stage=stage, device="cpu") for stage in (0, 1, 2)},
}


def config(
    folder: Path,
    engine: EngineConfig,
    *,
    targets: str = "center",
    separate: bool = False,
    registers: int = 0,
    interpolation: str = "offset",
    num_local: int = 4,
) -> Config:
    """Two steps with frozen prototypes and one without, every loss on, every rate its own."""
    patch_head = PatchHeadConfig(num_prototypes=80, bottleneck_dim=16, **HEAD) if separate else None
    return Config(
        model=ModelConfig(
            arch="vit_nano", patch_size=8, drop_path=0, layer_scale=0.1, registers=registers,
            interpolation=interpolation,
        ),
        head=HeadConfig(num_prototypes=64, bottleneck_dim=32, **HEAD),
        patch_head=patch_head,
        views=ViewsConfig(global_size=32, local_size=16, num_local=num_local),
        data=DataConfig(root="shapes", num_images=64, num_workers=0),
        loss=LossConfig(
            targets=targets, patch_weight=1.0, koleo_weight=0.1, teacher_temp=0.07, warmup_teacher_temp_epochs=2,
            temp_warmup_by="step",
        ),
        optim=OptimConfig(
            lr=4e-3, lr_rule="sqrt_1024", warmup_epochs=0, layer_decay=0.9, patch_embed_lr=0.2, clip=0.3,
            clip_mode="module", freeze_last_layer=1, freeze_how="lr", teacher_momentum=0.9,
        ),
        engine=replace(engine, precision="fp32"),
        run=RunConfig(dir=folder / "run", epochs=4, local_batch=32, log_every=1, knn_every=0),
    )  # fmt: skip


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """What a parameter starts from: numbers that depend on its name alone."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    near_one = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "last_layer.g"))
    return 1 + 0.1 * draw if near_one else 0.05 * draw


def batch(config: Config, seed: int) -> Batch:
    """Noise, with masks on every other view."""
    generator = torch.Generator().manual_seed(seed)
    images, views = config.run.local_batch, config.views
    sizes = {"global": (2, views.global_size), "local": (views.num_local, views.local_size)}
    pixels = {
        name: torch.randint(256, (count, images, 3, size, size), generator=generator, dtype=torch.uint8)
        for name, (count, size) in sizes.items()
        if count
    }
    hidden = torch.zeros(2 * images, (views.global_size // config.model.patch_size) ** 2, dtype=torch.bool)
    for view in range(0, 2 * images, 2):
        count = int(torch.randint(1, hidden.shape[1] // 2, (), generator=generator))
        hidden[view, torch.randperm(hidden.shape[1], generator=generator)[:count]] = True
    share = 1 / (len(hidden) * hidden.sum(1, keepdim=True).clamp(min=1)).float()
    return Batch(pixels, Masks(hidden, hidden.flatten().nonzero().flatten(), share.expand_as(hidden)[hidden]))


@torch.no_grad()
def start(trainer: Trainer) -> None:
    """Gives student and teacher the weights of :func:`weights`."""
    full = {name: weights(name, p.shape) for name, p in trainer.engine.student_network.named_parameters()}
    for fragment in trainer.engine.fragments():
        piece = full[fragment.name].flatten()[fragment.start : fragment.stop]
        fragment.tensors["param"].copy_(piece)
        fragment.tensors["ema"].copy_(piece)
    trainer.engine.after_load()


@pytest.mark.parametrize(
    ("engine", "case"),
    [*(("torch", case) for case in CASES), *((engine, EVERY_ENGINE) for engine in ENGINES if engine != "torch")],
)
def test_three_steps_are_the_official_ones(engine, case, monkeypatch):
    with tempfile.TemporaryDirectory() as folder, distributed.init("cpu") as ranks:
        settings = config(Path(folder), ENGINES[engine], **CASES[case])
        trainer = Trainer(settings, ranks)
        start(trainer)
        norms: dict[str, float] = {}
        network, step = trainer.engine.student_network, trainer.engine.step

        def watched(now, loss):
            for group, flat in zip(trainer.engine.groups, getattr(trainer.engine, "_grads", ()), strict=False):
                views = views_of(flat, list(group.params.values()))
                norms.update({name: view.norm().item() for name, view in zip(group.params, views, strict=True)})
            return step(now, loss)

        monkeypatch.setattr(trainer.engine, "step", watched)
        for i, expected in enumerate(OFFICIAL[case]["steps"]):
            figures = trainer.train_step([batch(settings, seed=i)])
            found = {name: float(figures[name]) for name in expected["loss"]}
            assert found == pytest.approx(expected["loss"], rel=1e-5)
            if engine == "torch":  # where ZeRO shards the gradients the parameters have none
                assert norms == pytest.approx(expected["grad_norms"], rel=1e-4, abs=1e-6)
        trainer.engine.wait_teacher()
        for role, module in (("student", network), ("teacher", trainer.engine.teacher)):
            sums = {name: float(p.detach().double().norm()) for name, p in module.named_parameters()}
            assert sums == pytest.approx(OFFICIAL[case][role], rel=2e-5)

"""The training step as the benchmarks run it: settings and random views resident in memory."""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from bench.record import positive
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PatchHeadConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.data import Batch
from fastdino.data.masks import masks_of, sample_masks
from fastdino.data.views import groups
from fastdino.distributed import Ranks
from fastdino.training.trainer import Trainer


def step_config(
    arch: str,
    device: torch.device,
    *,
    engine: str = "deepspeed",
    precision: str = "auto",
    zero_stage: int | str = "auto",
    batch: int | None = None,
) -> Config:
    """DINO v1's settings at full size for a GPU; on a CPU 2 + 4 views of 96 and 48 pixels and 4096 prototypes.

    Set so that a peer can do the same arithmetic: clipping by the common norm, prototypes that move from the first step
    on. Set so that a peer that does not would show in a few steps: learning rate 5e-4 at once, a teacher that follows
    with momentum 0.9.
    """
    full = device.type == "cuda"
    batch = batch or (64 if full else 4)
    if precision == "auto":
        precision = "bf16" if full else "fp32"
    return Config(
        model=ModelConfig(arch=arch),
        head=HeadConfig() if full else HeadConfig(num_prototypes=4096, hidden_dim=512),
        views=ViewsConfig() if full else ViewsConfig(global_size=96, local_size=48, num_local=4),
        data=DataConfig(root="shapes", num_images=4096, num_workers=0),
        optim=OptimConfig(
            lr=5e-4 * 256 / batch, warmup_epochs=0, clip_mode="global", freeze_last_layer=0, teacher_momentum=0.9
        ),
        engine=EngineConfig(name=engine, precision=precision, zero_stage=zero_stage, device=device.type),  # type: ignore[arg-type]
        run=RunConfig(local_batch=batch),
    )


def asked_config(
    parser: argparse.ArgumentParser, flag: str, text: str, device: torch.device, batch: int | None = None
) -> Config:
    """The step of ARCH or ARCH:BATCH, which a command was given by ``flag``; without such a step the command ends."""
    arch, colon, images = text.partition(":")
    try:
        return step_config(arch, device, batch=positive(images) if colon else batch)
    except (ConfigError, argparse.ArgumentTypeError) as error:
        parser.error(f"{flag}: {error}")


def nano_config(
    *, engine: str = "deepspeed", precision: str = "fp32", zero_stage: int | str = "auto", local_batch: int = 4
) -> Config:
    """The smallest step that has everything, with the product's defaults: what CI counts."""
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=8),
        head=HeadConfig(num_prototypes=512, hidden_dim=128, bottleneck_dim=64),
        views=ViewsConfig(global_size=32, local_size=16, num_local=4),
        data=DataConfig(root="shapes", num_images=64, num_workers=0),
        optim=OptimConfig(warmup_epochs=0, freeze_last_layer=0),
        engine=EngineConfig(name=engine, precision=precision, zero_stage=zero_stage, device="cpu"),  # type: ignore[arg-type]
        run=RunConfig(local_batch=local_batch),
    )


def nano_dinov2(config: Config, *, sinkhorn: bool) -> Config:
    """The step of ``config`` with all that DINOv2 adds; ``sinkhorn``: also separate heads and Sinkhorn's targets."""
    head = {"num_prototypes": 512, "hidden_dim": 128, "bottleneck_dim": 32}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, drop_path=0.3, drop_path_rule="uniform", layer_scale=1e-5, registers=4),
        patch_head=PatchHeadConfig(**head) if sinkhorn else None,  # type: ignore[arg-type]
        loss=dataclasses.replace(
            config.loss, patch_weight=1.0, koleo_weight=0.1, targets="sinkhorn" if sinkhorn else "center"
        ),
        optim=dataclasses.replace(config.optim, layer_decay=0.9, patch_embed_lr=0.2, clip_mode="module"),
    )


def random_batch(config: Config, device: torch.device, seed: int) -> Batch:
    """Views of noise, with masks where patches are predicted, as the loader would hand them over."""
    size, channels = config.run.local_batch, config.data.channels
    shapes = {name: (count, size, channels, side, side) for name, (count, side) in groups(config.views).items()}
    generator = torch.Generator(device).manual_seed(seed)
    pixels = {
        name: torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
        for name, shape in shapes.items()
    }
    masks = None
    if config.loss.patch_weight:
        side = config.views.global_size // config.model.patch_size
        masks = masks_of(sample_masks(seed, 0, range(size), config.views, (side, side)))
    return Batch(pixels, masks).to(device)


def build_trainer(config: Config, ranks: Ranks, folder: Path) -> Trainer:
    """A trainer whose run folder is under ``folder``; it reads no image as long as nobody asks for a batch."""
    return Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder / "run")), ranks)


@torch.no_grad()
def flatten_positions(weights: dict[str, Tensor]) -> None:
    """One position embedding for all patches, in place: then every way to resample it to another grid agrees."""
    positions = weights["backbone.pos_embed"][:, 1:]
    positions.copy_(positions.mean(1, keepdim=True).expand_as(positions))

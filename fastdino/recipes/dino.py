"""DINO v1 with a vision transformer."""

from dataclasses import replace
from pathlib import Path

from fastdino.config import (
    Config,
    RunConfig,
)


def vit_small_16() -> Config:
    """ViT-S/16, 100 epochs, 2 + 8 views, global batch 512: the defaults of DINO v1's training command.

    Run: torchrun --nproc_per_node 8 -m fastdino train vit_small_16 --data.root /data/imagenet/train

    Cost: 1.75 days on 8 V100 with DINO v1's code. Score: k-NN 69.3, linear 74.0.

    Source of both: README of facebookresearch/dino, "vanilla DINO training".
    """
    return Config(run=RunConfig(dir=Path("runs/vit_small_16")))


def vit_small_16_300() -> Config:
    """ViT-S/16, 300 epochs, 2 + 8 views, global batch 1024, warmer teacher, free prototype norms.

    Run: torchrun --nnodes 2 --nproc_per_node 8 -m fastdino train vit_small_16_300 --data.root /data/imagenet/train

    Cost: 2.6 days on 16 V100 with DINO v1's code. Score: k-NN 73.3, linear 76.0.

    Source of both: README of facebookresearch/dino, "boosting DINO performance".
    """
    base = vit_small_16()
    return replace(
        base,
        head=replace(base.head, freeze_prototype_norm=False),
        loss=replace(base.loss, teacher_temp=0.07, warmup_teacher_temp_epochs=30),
        run=replace(base.run, epochs=300, dir=Path("runs/vit_small_16_300")),
    )


def vit_small_8() -> Config:
    """ViT-S/8, 800 epochs, 2 + 10 views, global batch 1024: finer patches, four times the tokens of ViT-S/16.

    Run: torchrun --nnodes 8 --nproc_per_node 8 -m fastdino train vit_small_8 --data.root /data/imagenet/train

    Cost: the authors used 64 V100 with 16 images each. Score: k-NN 78.3, linear 79.7.

    Source: README of facebookresearch/dino, pretrained models; batch from its issue 104. Settings follow the released
    ViT-S/16's arguments, not checked against the released run's own file.
    """
    base = vit_small_16_300()
    return replace(
        base,
        model=replace(base.model, patch_size=8),
        views=replace(base.views, num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
        optim=replace(base.optim, clip=0.0, min_lr=1e-5),
        run=replace(base.run, epochs=800, local_batch=16, dir=Path("runs/vit_small_8")),
    )


def vit_base_16() -> Config:
    """ViT-B/16, 400 epochs, 2 + 10 views, global batch 1024.

    Run: torchrun --nnodes 4 --nproc_per_node 8 -m fastdino train vit_base_16 --data.root /data/imagenet/train

    Cost: not published. Score: k-NN 76.1, linear 78.2 (README of facebookresearch/dino, pretrained models).
    Settings are those commonly quoted for the released run, not checked against its own file.
    """
    base = vit_small_16_300()
    return replace(
        base,
        model=replace(base.model, arch="vit_base"),
        head=replace(base.head, freeze_prototype_norm=True),
        views=replace(base.views, num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
        optim=replace(base.optim, clip=0.3, freeze_last_layer=3, min_lr=2e-6, lr=7.5e-4),
        loss=replace(base.loss, warmup_teacher_temp_epochs=50),
        run=replace(base.run, epochs=400, local_batch=32, dir=Path("runs/vit_base_16")),
    )


def vit_large_16() -> Config:
    """ViT-L/16, 100 epochs, 2 + 8 views, ZeRO 1 with a sharded teacher; no published score for DINO v1's loss.

    Run: torchrun --nnodes 4 --nproc_per_node 8 -m fastdino train vit_large_16 --data.root /data/imagenet/train
    """
    base = vit_base_16()
    return replace(
        base,
        model=replace(base.model, arch="vit_large", drop_path=0.3),
        views=replace(base.views, num_local=8),
        run=replace(base.run, epochs=100, dir=Path("runs/vit_large_16")),
    )

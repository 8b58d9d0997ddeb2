"""Named runs. A recipe is a function that returns a Config; its docstring states command, cost and expected score.

A recipe without a published score says so. Scores are ImageNet-1k top-1 with frozen features of the teacher.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
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


def resnet50() -> Config:
    """ResNet-50 by timm, 100 epochs, 2 + 8 views, SGD. Over several GPUs each batch normalization waits for its device.

    Run: torchrun --nproc_per_node 8 -m fastdino train resnet50 --data.root /data/imagenet/train
    Cost: not published for 100 epochs. Score: the released 800-epoch run at batch 4080 has k-NN 67.5, linear 75.3.
    Source: README of facebookresearch/dino, "ResNet-50 and other convnets training".
    """
    base = vit_small_16()
    return replace(
        base,
        model=ModelConfig(arch="timm:resnet50", drop_path=0.0),
        views=replace(base.views, global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        optim=replace(base.optim, name="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4),
        run=replace(base.run, dir=Path("runs/resnet50")),
    )


def demo() -> Config:
    """A nano ViT on rendered shapes of 48 pixels: minutes on two CPU cores, nothing to download.

    Batch normalisation in the head keeps so short a run from collapsing to the uniform distribution.

    Run: fastdino demo, which trains this recipe and evaluates it.
    """
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=6, drop_path=0.0, pos_embed="sincos", init="xavier"),
        head=HeadConfig(num_prototypes=256, hidden_dim=512, bottleneck_dim=128, batch_norm=True),
        views=ViewsConfig(
            global_size=36,
            global_scale=(0.5, 1.0),
            local_size=18,
            local_scale=(0.2, 0.6),
            num_local=4,
            rotate=15.0,
            jitter_strength=(0.4, 0.4, 0.2, 0.5),
            grayscale=0.3,
            blur=(0.2, 0.1, 0.1),
            solarize=0.0,
        ),
        data=DataConfig(root="shapes", num_images=10000, image_size=48, normalize="image", num_workers=1),
        optim=OptimConfig(
            lr=0.016,
            warmup_epochs=0.3,
            weight_decay_end=0.04,
            teacher_momentum=0.98,
            teacher_momentum_end=0.99,
            freeze_last_layer=0,
        ),
        engine=EngineConfig(precision="fp32", device="cpu"),
        run=RunConfig(dir=Path("runs/demo"), epochs=4, local_batch=32, knn_every=1, log_every=10),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (vit_small_16, vit_small_16_300, vit_small_8, vit_base_16, vit_large_16, resnet50, demo)
}


def get(name: str) -> Config:
    """The recipe of that name. Raises ConfigError, with the nearest name, for one that does not exist."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise ConfigError(f"no recipe {name!r}: {hint}")
    return RECIPES[name]()

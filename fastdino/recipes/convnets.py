"""DINO v1 with a convolutional network of timm."""

from dataclasses import replace
from pathlib import Path

from fastdino.config import (
    Config,
    ModelConfig,
)
from fastdino.recipes.dino import vit_small_16


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

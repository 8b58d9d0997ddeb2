"""Small pictures on little hardware."""

from pathlib import Path

from fastdino.config import (
    Config,
    DataConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.config.errors import require


def small(global_size: int = 28) -> Config:
    """A nano ViT on thousands of pictures of 28 to 96 pixels, on two CPU cores or any GPU; no published score.

    Run: fastdino train small --data.root pictures/train --run.knn-root pictures

    views.global_size alone follows the pictures: the patches are a quarter of it and the local views half, so that a
    view is 4 x 4 patches at any size. docs/small-data.md has what was tried on 10,000 pictures of Fashion-MNIST, beside
    raw pixels.

    The more pixels a patch has, the further a step of AdamW, which moves every weight alike, moves their sum: the patch
    embedding's learning rate falls with their number.

    Views cover most of a picture: its outline tells small pictures apart. KoLeo keeps the features apart, which batch
    normalisation in the head would let shrink to a few directions.
    """
    whole = global_size % 4 == 0 and global_size >= 8
    require(whole, "views.global_size", global_size, "a multiple of 4, at least 8", "a view is 4 x 4 patches in small")
    return Config(
        model=ModelConfig(
            arch="vit_nano", patch_size=global_size // 4, drop_path=0.0, pos_embed="sincos", init="xavier"
        ),
        head=HeadConfig(num_prototypes=256, hidden_dim=512, bottleneck_dim=128, batch_norm=True),
        views=ViewsConfig(
            global_size=global_size,
            global_scale=(0.7, 1.0),
            local_size=global_size // 2,
            local_scale=(0.3, 0.7),
            num_local=2,
            jitter_strength=(0.2, 0.2, 0.0, 0.0),
            grayscale=0.0,
            blur=(0.1, 0.1, 0.1),
            solarize=0.0,
        ),
        data=DataConfig(normalize="image", eval_crop=1.0, num_workers=1),
        loss=LossConfig(koleo_weight=0.1),
        optim=OptimConfig(
            lr=0.012,
            warmup_epochs=0.3,
            weight_decay_end=0.04,
            beta2=0.99,
            patch_embed_lr=(28 / global_size) ** 2,
            teacher_momentum=0.985,
            teacher_momentum_end=0.999,
            freeze_last_layer=0,
        ),
        run=RunConfig(dir=Path("runs/small"), epochs=40, local_batch=32, knn_every=5),
    )

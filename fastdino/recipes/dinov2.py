"""DINOv2: DINO's loss on views, iBOT's on hidden patches, KoLeo; layer-wise learning rates and long schedules.

An epoch is a pass over the images. DINOv2's own configs count epochs of 1,250 iterations, whatever the data: lengths
are theirs in iterations, written as passes over the images that the recipe names.
"""

from dataclasses import replace
from pathlib import Path

from fastdino.config import (
    Config,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PatchHeadConfig,
    RunConfig,
    ViewsConfig,
)


def dinov2_vit_large_16() -> Config:
    """ViT-L/16, 2 + 8 views, global batch 2048, 125,000 iterations: 200 passes over ImageNet-1k.

    Run: torchrun --nnodes 4 --nproc_per_node 8 -m fastdino train dinov2_vit_large_16 --data.root /data/imagenet/train

    Cost: about 1 day on 32 A100 with DINOv2's code. Score: k-NN 81.6, linear 82.9.

    Source of both: README of facebookresearch/dinov2, "Training". Values: its vitl16_short.yaml, which has 100 epochs
    of 1,250 iterations, 10 of them warm-up, 30 with a rising temperature, 1 with frozen prototypes.
    """
    return Config(
        model=ModelConfig(arch="vit_large", patch_size=16, drop_path=0.3, drop_path_rule="uniform", layer_scale=1e-5),
        head=HeadConfig(freeze_prototype_norm=False),
        views=ViewsConfig(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur=(0.0, 0.9, 0.5)),
        loss=LossConfig(
            patch_weight=1.0,
            koleo_weight=0.1,
            teacher_temp=0.07,
            warmup_teacher_temp_epochs=60,
            temp_warmup_by="step",
        ),
        optim=OptimConfig(
            lr=4e-3,
            lr_rule="sqrt_1024",
            warmup_epochs=20,
            layer_decay=0.9,
            patch_embed_lr=0.2,
            clip_mode="module",
            freeze_last_layer=2,
            freeze_how="lr",
            teacher_momentum=0.992,
        ),
        run=RunConfig(dir=Path("runs/dinov2_vit_large_16"), epochs=200),
    )


def dinov2_vit_base_16() -> Config:
    """ViT-B/16 as dinov2_vit_large_16, with drop path 0.2 and global batch 1024; no published score.

    Run: torchrun --nnodes 2 --nproc_per_node 8 -m fastdino train dinov2_vit_base_16 --data.root /data/imagenet/train

    Source: vitl16_short.yaml of facebookresearch/dinov2, whose backbone and drop path alone are replaced.
    """
    base = dinov2_vit_large_16()
    return replace(
        base,
        model=replace(base.model, arch="vit_base", drop_path=0.2),
        run=replace(base.run, dir=Path("runs/dinov2_vit_base_16")),
    )


def dinov2_vit_small_16() -> Config:
    """ViT-S/16 as dinov2_vit_large_16, with drop path 0.1 and global batch 1024; no published score.

    Run: torchrun --nnodes 2 --nproc_per_node 8 -m fastdino train dinov2_vit_small_16 --data.root /data/imagenet/train

    Source: vitl16_short.yaml of facebookresearch/dinov2, whose backbone and drop path alone are replaced.
    """
    base = dinov2_vit_large_16()
    return replace(
        base,
        model=replace(base.model, arch="vit_small", drop_path=0.1),
        run=replace(base.run, dir=Path("runs/dinov2_vit_small_16")),
    )


def dinov2_vit_giant_14() -> Config:
    """ViT-g/14, separate heads, Sinkhorn, global batch 3072, 625,000 iterations: 135 passes over ImageNet-22k.

    Run: srun --ntasks-per-node 8 --gpus-per-node 8 fastdino train dinov2_vit_giant_14 --data.root /data/imagenet22k

    Cost: 22,000 A100-hours with DINOv2's code. Score: k-NN 83.5, linear 86.5 on 142 million curated images that are not
    public (README of facebookresearch/dinov2); not to be expected from other data.

    Source: vitg14.yaml of facebookresearch/dinov2 and table 16 of Oquab et al. 2024: 500 epochs of 1,250 iterations, 80
    of them warm-up, 30 with a rising temperature, 1 with frozen prototypes; 256 GPUs with 12 images each. For a
    backbone like those released with registers: --model.registers 4 --model.interpolation antialias.
    """
    base = dinov2_vit_large_16()
    return replace(
        base,
        model=replace(base.model, arch="vit_giant2", patch_size=14, drop_path=0.4),
        head=replace(base.head, num_prototypes=131072, bottleneck_dim=384),
        patch_head=PatchHeadConfig(num_prototypes=131072, freeze_prototype_norm=False),
        views=replace(base.views, local_size=98),
        loss=replace(base.loss, targets="sinkhorn", warmup_teacher_temp_epochs=8.1),
        optim=replace(
            base.optim,
            lr=2e-4,
            warmup_epochs=21.6,
            layer_decay=1.0,
            weight_decay_end=0.2,
            teacher_momentum=0.994,
            freeze_last_layer=0.27,
        ),
        run=replace(base.run, dir=Path("runs/dinov2_vit_giant_14"), epochs=135, local_batch=12),
    )

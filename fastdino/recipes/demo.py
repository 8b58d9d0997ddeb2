"""A run of minutes on a CPU."""

from pathlib import Path

from fastdino.config import (
    Config,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
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

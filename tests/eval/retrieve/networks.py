"""A network whose features differ, and how it is shown images."""

import torch
from torch import nn

from fastdino.config import Config, DataConfig, ModelConfig, ViewsConfig
from fastdino.model import ViT

CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0),
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(image_size=44, num_workers=0),
)


def vit() -> ViT:
    torch.manual_seed(0)
    made = ViT("nano", patch_size=8, image_size=32)
    for parameter in made.parameters():  # so that features differ by more than rounding
        nn.init.normal_(parameter, std=0.15)
    return made.eval()

"""What a score is compared with: the pixels themselves, and a backbone that has not learned."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ModelConfig
from fastdino.model import Backbone, ViT, build_backbone

SIDE = 32  # of pixels as features, at most: 3,072 of them


class RawPixels(nn.Module):
    """Normalised images as features, (B, C, h, w) -> (B, C * s * s) with s = min(32, h), by the mean of areas."""

    def forward(self, images: Tensor) -> Tensor:
        side = min(SIDE, *images.shape[-2:])
        return F.adaptive_avg_pool2d(images, side).flatten(1)


def fresh(backbone: nn.Module, model: ModelConfig, size: int, seed: int = 0) -> Backbone:
    """Another backbone like this one, at its place, that has not learned.

    Args:
        backbone: ours or of timm.
        model: its settings.
        size: side in pixels of the images it will see.
        seed: of its values.
    """
    model = replace(model, weights=None, attention="auto", drop_path=0.0)
    image_size: int | tuple[int, int] = size
    mask_token = False
    if isinstance(backbone, ViT):
        rows, columns = backbone.grid
        image_size = rows * backbone.patch_size, columns * backbone.patch_size
        mask_token = backbone.mask_token is not None
    channels = getattr(backbone, "channels", 3)
    made = build_backbone(model, image_size, mask_token=mask_token, channels=channels, seed=seed)
    parameter = next(backbone.parameters(), torch.empty(0))
    return made.to(parameter.device, parameter.dtype).eval()

"""What the CLS token looks at: attention per head, pictures of it, and how well it covers the objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdino.data.decode import BadImage
from fastdino.data.sources import Source
from fastdino.data.views import normalize
from fastdino.eval.features import EvaluationError, Protocol, evaluating, home
from fastdino.model.vit import ViT

SHEET_ROWS = 8  # images on a sheet


def head_maps(backbone: ViT, images: Tensor) -> Tensor:
    """CLS-to-patch attention of the last block: (B, 3, h, w) normalised images -> (B, H, rows, columns) fp32."""
    device, dtype = home(backbone)
    with evaluating(backbone):
        maps = backbone.attention_maps(images.to(device, dtype))
    return maps.unflatten(-1, (images.shape[-2] // backbone.patch_size, -1))


def keep_mass(maps: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches that holds at least ``mass`` of each map, (.., rows, columns) -> the same, bool.

    Source: visualize_attention.py of DINO v1; the paper's figure 4 keeps 60 %.
    """
    value, index = maps.flatten(-2).sort(dim=-1)  # least first
    below = value.cumsum(dim=-1) / value.sum(dim=-1, keepdim=True)
    kept = torch.zeros_like(below, dtype=torch.bool).scatter_(-1, index, below > 1 - mass)
    return kept.unflatten(-1, maps.shape[-2:])


def best_head_iou(maps: Tensor, masks: Tensor, mass: float = 0.6) -> float:
    """Mean intersection over union of one head's attention, keeping ``mass`` of it, with the object masks.

    Args:
        maps: (n, H, rows, columns) attention.
        masks: (n, h, w) bool, true on the object; maps are enlarged to them by nearest neighbour, as in DINO v1.

    The head is the one with the highest mean over all n images: one head for the whole set. To pick the best head
    image by image, as is also done, lets the masks choose each answer: the more heads, the higher it scores, even
    with random attention. An image without an object in it counts as 0.
    """
    kept = F.interpolate(keep_mass(maps, mass).float(), size=masks.shape[-2:], mode="nearest").bool()
    objects = masks.to(kept.device).unsqueeze(1)  # (n, 1, h, w)
    intersection = (kept & objects).sum(dim=(-2, -1))
    union = (kept | objects).sum(dim=(-2, -1)).clamp(min=1)
    return (intersection / union).mean(dim=0).max().item()


def draw_sheet(path: Path, images: Sequence[Image.Image], maps: Tensor, mass: float = 0.6) -> None:
    """Writes a PNG with a row per image: the image, each head's attention, the best-covered patches of their mean.

    Args:
        path: where to.
        images: n pictures.
        maps: (n, H, rows, columns) attention.
        mass: share of the heads' mean attention that the last column keeps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_heads = maps.shape[1]
    figure = Figure(figsize=(1.6 * (num_heads + 2), 1.7 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), num_heads + 2, squeeze=False)
    kept = keep_mass(maps.mean(dim=1), mass)
    for image, row, heads, patches in zip(images, axes, maps.cpu().numpy(), kept.cpu(), strict=True):
        pixels = np.asarray(image)
        row[0].imshow(pixels)
        for ax, head in zip(row[1:-1], heads, strict=True):
            ax.imshow(head, cmap="inferno")
        mask = F.interpolate(patches[None, None].float(), size=pixels.shape[:2], mode="nearest")[0, 0].bool().numpy()
        row[-1].imshow(np.where(mask[..., None], pixels, pixels // 4))
    titles = ["image", *(f"head {i}" for i in range(num_heads)), f"{mass:.0%} of the mean"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    for ax in axes.flat:
        ax.set_axis_off()
    FigureCanvasAgg(figure).print_png(path)


def evaluate_attention(
    backbone: ViT,
    source: Source,
    protocol: Protocol | None = None,
    *,
    num_images: int = 100,
    mass: float = 0.6,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Attention of the first ``num_images`` of ``source``, the whole of each image squeezed to protocol.size.

    Returns {"attention_iou": :func:`best_head_iou`} when the source has masks, else nothing. ``sheet`` is a PNG to
    write with the first SHEET_ROWS. Raises EvaluationError when the backbone has no CLS attention or an image
    cannot be read.
    """
    if not isinstance(backbone, ViT):
        raise EvaluationError(
            f"attention maps need one of our ViTs (model.arch=vit_...), not {type(backbone).__name__}"
        )
    protocol = protocol or Protocol()
    try:
        images = [_resized(source.read(i)[0], protocol.size) for i in range(min(num_images, len(source)))]
    except BadImage as error:
        raise EvaluationError(f"{error}: mend or delete it") from error
    maps = torch.cat([head_maps(backbone, batch) for batch in _batches(images, protocol)])
    if sheet is not None:
        draw_sheet(sheet, images[:SHEET_ROWS], maps[:SHEET_ROWS], mass)
    mask_of: Any = getattr(source, "mask", None)
    if mask_of is None:
        return {}
    masks = torch.stack([torch.as_tensor(np.asarray(mask_of(i))) for i in range(len(images))])
    return {"attention_iou": best_head_iou(maps, masks, mass)}


def _resized(image: Image.Image, size: int) -> Image.Image:
    """The whole image at size x size, so that its mask still fits."""
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def _batches(images: list[Image.Image], protocol: Protocol) -> list[Tensor]:
    """Normalised (B, 3, s, s) batches."""
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    return [normalize(batch, protocol.normalize) for batch in pixels.split(protocol.batch_size)]

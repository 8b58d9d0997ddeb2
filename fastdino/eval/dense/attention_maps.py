"""What the CLS token looks at: attention per head, pictures of it, and how well it covers the objects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.data.views.reference import joined, pictures
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Reading, check_size, device_and_dtype, evaluating, our_vit
from fastdino.eval.intervals import Score
from fastdino.eval.pictures import SHEET_ROWS, new_figure
from fastdino.eval.result import Found, Picture
from fastdino.model.vit import ViT


def head_maps(backbone: ViT, images: Tensor) -> Tensor:
    """CLS-to-patch attention of the last block: (B, C, h, w) normalised images -> (B, H, rows, columns) fp32."""
    device, dtype = device_and_dtype(backbone)
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


def head_ious(maps: Tensor, masks: Tensor, mass: float = 0.6) -> Tensor:
    """(H,) mean intersection over union of each head's attention, keeping ``mass`` of it, with the object masks.

    Args:
        maps: (n, H, rows, columns) attention.
        masks: (n, h, w) bool, true on the object; maps are enlarged to them by nearest neighbour, as in DINO v1.

    An image without an object in it counts as 0.
    """
    kept = F.interpolate(keep_mass(maps, mass).float(), size=masks.shape[-2:], mode="nearest").bool()
    objects = masks.to(kept.device).unsqueeze(1)  # (n, 1, h, w)
    intersection = (kept & objects).sum(dim=(-2, -1))
    union = (kept | objects).sum(dim=(-2, -1)).clamp(min=1)
    return (intersection / union).mean(dim=0)


def best_head_iou(maps: Tensor, masks: Tensor, mass: float = 0.6) -> float:
    """:func:`head_ious` of the head with the highest mean over all n images: one head for the whole set.

    To pick the best head image by image, as is also done, lets the masks choose each answer: the more heads, the
    higher it scores, even with random attention.
    """
    return head_ious(maps, masks, mass).max().item()


def draw_sheet(
    path: Path, images: Sequence[Image.Image], maps: Tensor, mass: float = 0.6, masks: Tensor | None = None
) -> None:
    """Writes a PNG with a row per image: the image, each head's attention, and the patches that hold ``mass`` of it.

    Args:
        path: where to.
        images: n pictures.
        maps: (n, H, rows, columns) attention.
        mass: share of the attention that the last column keeps: that of the heads' mean, or with masks that of the
            head with the highest mean overlap over these n images.
        masks: (n, h, w) bool, true on the object, whose outline is drawn on every picture.
    """
    titles = ["image", *(f"head {i}" for i in range(maps.shape[1])), f"{mass:.0%} of the mean"]
    shown = maps.mean(dim=1)
    if masks is not None:
        best = int(head_ious(maps, masks, mass).argmax())
        shown, titles[-1] = maps[:, best], f"{mass:.0%} of head {best}"
    figure = new_figure(1.3 * len(titles), 1.3 * len(images) + 0.3, dpi=110)
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for i, (image, row, kept) in enumerate(zip(images, axes, keep_mass(shown, mass).cpu(), strict=True)):
        pixels = np.asarray(image)
        extent = (0, image.width, image.height, 0)
        patches = F.interpolate(kept[None, None].float(), size=pixels.shape[:2], mode="nearest")[0, 0].bool().numpy()
        pictures = [pixels, *maps[i].cpu().numpy(), np.where(patches[..., None], pixels, pixels // 4)]
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture, cmap="inferno", extent=extent)
            if masks is not None:
                outline = masks[i].cpu().numpy()
                ax.contour(outline, levels=[0.5], colors="cyan", linewidths=0.8, extent=extent, origin="upper")
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    figure.canvas.print_png(path)


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Evaluation):
    """A sheet of images with the attention of each head of the last block, as PNG.

    Images are not cropped: the whole of each is squeezed to --size, a multiple of the patch. --data is a folder of
    images in any nesting. Of more than three channels the first three are shown as red, green and blue. With --data
    shapes, whose objects are known, attention_iou is printed too: how well the best head covers them.
    """

    kind: ClassVar[str] = "attention"
    needs: ClassVar[str] = "images, best with masks"
    controls: ClassVar[tuple[str, ...]] = ("random_init",)

    num_images: int = 100
    """Images over which the best head is found; the sheet shows the first eight."""
    mass: float = 0.6
    """Share of the attention that the last column keeps; DINO's value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images >= 1, "--num-images", self.num_images, "at least 1", "a count of images")
        require(0 < self.mass < 1, "--mass", self.mass, "between 0 and 1", "a share of the attention")

    def open(self, subject: Subject) -> Source:
        """The images."""
        vit = our_vit(subject.backbone, "attention maps")
        check_size(vit, self.reading(subject.config))
        if self.data == "shapes":
            return bank_and_test(self.data, subject.config.data).test
        return open_part(self.data, subject.config.data)

    def judge(self, subject: Subject, data: Source) -> Found:
        """attention_iou in percent when the images have masks, and a sheet."""
        reading = self.reading(subject.config)
        found = self.overlap(subject.backbone, data, reading)
        scores = {name: Score(100 * x, math.nan, math.nan, "none") for name, x in found.items()}
        protocol = {"size": reading.size, "normalize": reading.normalize, "mass": self.mass}

        def draw(path: Path) -> None:
            self.overlap(subject.backbone, data, reading, path)

        return Found(
            scores=scores,
            protocol=protocol,
            data={"images": min(self.num_images, len(data))},
            pictures=[Picture("", draw)],
        )

    def overlap(
        self, backbone: nn.Module, source: Source, reading: Reading, sheet: Path | None = None
    ) -> dict[str, float]:
        """{"attention_iou": :func:`best_head_iou`} of the first num_images of ``source`` if it has masks, else nothing.

        ``sheet`` is a PNG to write with the first SHEET_ROWS. Raises EvaluationError when the backbone has no CLS
        attention or an image cannot be read.
        """
        vit = our_vit(backbone, "attention maps")
        check_size(vit, reading)
        try:
            images = [_resized(source.read(i)[0], reading.size) for i in range(min(self.num_images, len(source)))]
        except BadImage as error:
            raise EvaluationError(f"{error}: mend or delete it") from error
        pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
        maps = torch.cat([head_maps(vit, normalize(x, reading.normalize)) for x in pixels.split(self.batch)])
        mask_of: Any = getattr(source, "mask", None)
        masks = torch.stack([torch.as_tensor(np.asarray(mask_of(i))) for i in range(len(images))]) if mask_of else None
        if sheet is not None:
            shown = [_in_colour(image) for image in images[:SHEET_ROWS]]
            draw_sheet(sheet, shown, maps[:SHEET_ROWS], self.mass, None if masks is None else masks[:SHEET_ROWS])
        return {} if masks is None else {"attention_iou": best_head_iou(maps, masks, self.mass)}


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image at (size, size, C), so that its mask still fits."""
    return joined([band.resize((size, size), Image.Resampling.BICUBIC) for band in pictures(image)])


def _in_colour(image: np.ndarray) -> Image.Image:
    """The first three of its channels as red, green and blue; of one or two the first as gray."""
    if image.shape[2] < 3:
        return Image.fromarray(image[..., 0]).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(image[..., :3]))

"""What the CLS token looks at: attention per head, pictures of it, and how well it covers the objects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdino.config.errors import require
from fastdino.data.benchmarks.masks import VOID, Masked, open_objects
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.data.views.evaluation import nearest, whole_view
from fastdino.eval.dense.pictures.sheets import Cell, draw_cells, heat, in_colour, over
from fastdino.eval.dense.tokens import Dense, Shown, open_images, shown
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import EvaluationError, Reading, device_and_dtype, evaluating
from fastdino.eval.intervals import Shares
from fastdino.eval.pictures import SHEET_ROWS
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


def object_ious(maps: Tensor, mask: np.ndarray, mass: float = 0.6) -> Tensor:
    """(H, 1 + K) fp64 intersection over union of each head's attention with all K objects together, then with each.

    Args:
        maps: (H, rows, columns) attention, of which ``mass`` is kept, and enlarged to the mask by the nearest patch.
        mask: uint8 (h, w): 0 is no object, any other value an object. VOID pixels are of none.
        mass: share of the attention.
    """
    ids = [value for value in np.unique(mask).tolist() if value not in (0, VOID)]
    kept = np.stack([nearest(head, *mask.shape) for head in keep_mass(maps, mass).cpu().numpy()])
    area = np.bincount(mask.ravel(), minlength=256)[ids]
    both = np.stack([np.bincount(mask[head], minlength=256)[ids] for head in kept])  # (H, K)
    of_head = kept.sum(axis=(1, 2))[:, None]
    both, area = (np.concatenate([x.sum(-1, keepdims=True), x], axis=-1) for x in (both, area))
    return torch.from_numpy(both / np.maximum(of_head + area - both, 1))


class Jaccard(NamedTuple):
    """How well attention covers the objects of n images, under two conventions."""

    names: list[str]  # of the images
    one_head: Tensor  # (n,) fp64: of the head with the highest mean over the images, with all objects of each
    best_head_per_object: Tensor  # (n,) fp64: mean over the objects of an image, each with the head that covers it best
    head: int  # that is taken by the first
    without_object: int  # images that are left out


def jaccard(vit: ViT, source: Masked, reading: Reading, mass: float = 0.6, batch: int = 64) -> Jaccard:
    """Intersection over union of the attention that is kept with the objects of every image of ``source``.

    ``best_head_per_object`` lets the masks choose each answer: the more heads, the higher it scores, even with random
    attention. It is what papers after DINO's report (evaluate_segmentation.py of Naseer et al. 2021).

    Raises EvaluationError where an image cannot be read, or none shows an object.
    """
    names, together, best = [], [], []
    for images, maps in attend(vit, source, reading, batch, masks=True):
        for index, of_heads, mask in zip(images.indices, maps, images.masks, strict=True):
            found = object_ious(of_heads, mask, mass)
            if found.shape[1] > 1:
                names.append(source.name(index))
                together.append(found[:, 0])
                best.append(found[:, 1:].amax(0).mean())
    if not names:
        raise EvaluationError(f"none of the {len(source)} masks shows an object")
    heads = torch.stack(together)
    head = int(heads.mean(0).argmax())
    return Jaccard(names, heads[:, head], torch.stack(best), head, len(source) - len(names))


def attend(
    vit: ViT,
    source: Source | Masked,
    reading: Reading,
    batch: int,
    indices: Sequence[int] | None = None,
    masks: bool = False,
) -> Iterator[tuple[Shown, Tensor]]:
    """Images in batches, and the attention of each head, (B, H, rows, columns) fp32."""
    for images in shown(source, reading.size, batch, indices, masks):
        yield images, _maps(vit, images.pixels, reading)


def _maps(vit: ViT, pixels: Tensor, reading: Reading) -> Tensor:
    """(B, C, s, s) uint8 -> (B, H, rows, columns) fp32."""
    device, _ = device_and_dtype(vit)
    with torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
        return head_maps(vit, normalize(pixels, reading.normalize)).float()


def draw_sheet(
    path: Path, images: Shown, maps: Tensor, mass: float = 0.6, head: int | None = None, overlay: bool = False
) -> None:
    """Writes a PNG with a row per image: the image, each head's attention, and the patches that hold ``mass`` of it.

    Args:
        path: where to.
        images: n images. The outline of the objects of their masks, if they have any, is drawn on every picture.
        maps: (n, H, rows, columns) attention.
        mass: share of the attention that the last column keeps.
        head: of which it keeps it; without, of the heads' mean.
        overlay: attention is drawn over the image.
    """
    titles = ["image", *(f"head {i}" for i in range(maps.shape[1]))]
    titles.append(f"{mass:.0%} of " + ("the mean" if head is None else f"head {head}"))
    kept = keep_mass(maps.mean(dim=1) if head is None else maps[:, head], mass).cpu().numpy()
    rows = []
    for i, size in enumerate(images.sizes):
        pixels = in_colour(images.pixels[i].permute(1, 2, 0).numpy())
        heads = [heat(x) for x in maps[i].cpu().numpy()]
        if overlay:
            heads = [over(pixels, x) for x in maps[i].cpu().numpy()]
        outline = (images.masks[i] > 0) & (images.masks[i] != VOID) if images.masks else None
        cells = [pixels, *heads, lit(pixels, kept[i])]
        named = titles if i == 0 else [""] * len(titles)
        rows.append([Cell(x, size, title, outline=outline) for x, title in zip(cells, named, strict=True)])
    draw_cells(path, rows, inches=1.3)


def lit(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3), whose patches that are not ``kept`` (rows, columns) are darkened."""
    return np.where(nearest(kept, *pixels.shape[:2])[..., None], pixels, pixels // 4)


def draw_frame(path: Path, frames: Source, index: int, vit: ViT, reading: Reading, mass: float = 0.6) -> None:
    """Writes a frame as a PNG of its own size: what holds ``mass`` of the heads' mean is lit, under the attention.

    Raises EvaluationError where the frame cannot be read. Source: video_generation.py of DINO v1.
    """
    try:
        image = frames.read(index)[0]
    except BadImage as error:
        raise EvaluationError(f"{error}: mend or delete it") from error
    mean = _maps(vit, whole_view(image, reading.size).unsqueeze(0), reading)[0].mean(0)
    kept = keep_mass(mean, mass)
    seen = over(lit(in_colour(image), kept.cpu().numpy()), torch.where(kept, mean, 0).cpu().numpy())
    Image.fromarray(seen).save(path, "PNG")


Opened = tuple[Source | Masked, Masked | None, Source | None]  # images, the same with masks if any, frames


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Dense):
    """How well the attention of the last block covers the objects, and a sheet of it, head by head.

    --data is an image, a folder of images in any nesting, or one with masks: images/ and masks/ with equal stems,
    masks beside their images, PASCAL VOC; or shapes. Images are squeezed to --size, and drawn at random where there are
    more than --num-images. Of more than three channels the first three are shown as red, green and blue.

    With masks it finds the Jaccard index (intersection over union) in percent: jaccard_one_head, of the head with the
    highest mean over all images, and jaccard_best_head_per_object, which lets the masks choose a head for each object.
    """

    kind: ClassVar[str] = "attention"
    needs: ClassVar[str] = "images, best with masks"

    num_images: int = 100
    """Images that are looked at; the sheet shows eight of them."""
    mass: float = 0.6
    """Share of the attention that is kept; DINO's value."""
    overlay: bool = False
    """Draw the attention over the images."""
    video: Path | None = None
    """Folder of frames. Each becomes a PNG in attention-video/ that shows what the heads' mean keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images >= 1, "--num-images", self.num_images, "at least 1", "a count of images")
        require(0 < self.mass < 1, "--mass", self.mass, "between 0 and 1", "a share of the attention")

    def open(self, subject: Subject) -> Opened:
        """The images, with masks where there are any, and the frames of --video."""
        self.network(subject)
        config = subject.config.data
        frames = None if self.video is None else open_part(self.video, config)
        masked = open_objects(self.data, config, self.num_images, self.seed)
        return masked or open_images(self.data, config, self.num_images, self.seed), masked, frames

    def judge(self, subject: Subject, data: Opened) -> Found:
        """The Jaccard index under both conventions where there are masks, and the pictures."""
        vit, reading = self.network(subject)
        source, masked, frames = data
        protocol = {**self.read_by(subject), "mass": self.mass}
        told: dict[str, Any] = {"images": len(source), "fingerprint": source.fingerprint()}
        notes = self.remarks(subject)
        head: int | None = None
        scores, arrays, shares = {}, {}, None

        def sheet(path: Path) -> None:
            some = sample(self.seed, SHEET_ROWS, len(source))
            (images, maps), *_ = attend(vit, source, reading, SHEET_ROWS, some, masks=masked is not None)
            draw_sheet(path, images, maps, self.mass, head, self.overlay)

        if masked is not None:
            found = jaccard(vit, masked, reading, self.mass, self.batch)
            shares = Shares.mean(found.names, found.one_head.numpy())
            best = Shares.mean(found.names, found.best_head_per_object.numpy())
            scores = {"jaccard_one_head": shares.score(), "jaccard_best_head_per_object": best.score()}
            arrays = {"best_head_per_object": found.best_head_per_object.numpy()}
            head = found.head
            if found.without_object:
                notes.append(f"{found.without_object} images without an object are left out")
        return Found(
            scores=scores,
            also={} if head is None else {"head": head},
            protocol=protocol,
            data=told,
            notes=notes,
            shares=shares,
            arrays=arrays,
            pictures=[Picture("", sheet), *self._film(vit, reading, frames)],
        )

    def _film(self, vit: ViT, reading: Reading, frames: Source | None) -> list[Picture]:
        """A picture per frame, drawn one after the other."""
        if frames is None:
            return []

        def ticks() -> Iterator[int]:  # none until the first frame is drawn
            yield from tqdm(range(len(frames)), desc="frames", unit="frame", leave=False, disable=None)

        bar = ticks()

        def draw(path: Path, index: int) -> None:
            next(bar)
            draw_frame(path, frames, index, vit, reading, self.mass)

        return [Picture(f"-video/{i:05d}", partial(draw, index=i)) for i in range(len(frames))]

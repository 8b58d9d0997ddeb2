"""Objects that are found without a label: one box and one mask per image, by LOST, TokenCut or attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks import boxes as benchmarks
from fastdino.data.benchmarks import masks
from fastdino.data.benchmarks.masks import VOID, Masked
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage
from fastdino.data.views import normalize
from fastdino.data.views.reference import joined, pictures, resize
from fastdino.eval.dense.attention_maps import head_maps, keep_mass
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import Reading, device_and_dtype, evaluating, our_vit
from fastdino.eval.intervals import Score, Shares, wilson
from fastdino.eval.objects.boxes import box_around, enlarged, ious, is_hit, largest_component
from fastdino.eval.objects.contours import Saliency, saliency
from fastdino.eval.objects.each import check_scipy, each
from fastdino.eval.objects.lost import LOWEST, lost
from fastdino.eval.objects.pictures import Discovered, draw_discovered
from fastdino.eval.objects.token_cut import TAU, token_cut
from fastdino.eval.pictures import SHEET_ROWS
from fastdino.eval.result import Found, Picture
from fastdino.model.vit import ViT

Method = Literal["tokencut", "lost", "attention"]
PAPERS_HEAD = 4  # of ViT-S/16, whose attention finds most


class Objects(Protocol):
    """Images whose objects are known."""

    rule: str
    """By which they were listed."""
    bare: int
    """How many without an object were left out."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """uint8 (h, w, channels). Raises BadImage."""

    def boxes(self, index: int) -> np.ndarray:
        """(m, 4); there may be none. Raises BadImage."""

    def mask(self, index: int) -> np.ndarray | None:
        """uint8 (h, w): 0 is no object, VOID not known; None where only boxes are known. Raises BadImage."""

    def name(self, index: int) -> str:
        """What to call the image."""


class MaskedObjects:
    """Images with masks, whose objects have the boxes around their values."""

    rule, bare = "masks", 0

    def __init__(self, source: Masked) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray:
        """uint8 (h, w, channels)."""
        return self.source.read(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """As of the source."""
        return self.source.mask(index)

    def boxes(self, index: int) -> np.ndarray:
        """(m, 4), one for each value."""
        mask = self.mask(index)
        values = [value for value in np.unique(mask) if value not in (0, VOID)]
        return np.array([box_around(mask == value) for value in values], np.float64).reshape(-1, 4)

    def name(self, index: int) -> str:
        """As of the source."""
        return self.source.name(index)


class Finding(NamedTuple):
    """What one method finds in an image."""

    box: np.ndarray  # (4,) fp64 pixels of the image
    hit: bool
    saliency: Saliency | None


@dataclass(frozen=True, kw_only=True)
class Discover(Evaluation):
    """Finds one object per image without labels: CorLoc, the share of images where its box is right.

    A box is right when its IoU with any true box is at least 0.5. With masks, it is also told how well the object's
    mask covers all objects (IoU, accuracy, F). --data is a folder of VOC (Annotations/) or COCO (annotations/), or of
    images and masks. Images are seen at their own size. TokenCut's time grows with the third power of the number of
    patches: give --size for large images, or --methods lost.
    """

    kind: ClassVar[str] = "discover"
    needs: ClassVar[str] = "boxes of VOC or COCO, or masks"
    controls: ClassVar[tuple[str, ...]] = ("random_init",)

    size: int | None = None
    """Pixels of the shorter side that the backbone sees, or about so many; default: the image's own."""
    methods: tuple[Method, ...] = ("tokencut", "lost", "attention")
    """By which objects are found; the first makes the headline and the picture."""
    num_images: int | None = None
    """Judge so many images, drawn at random; default: all."""
    listed: Path | None = None
    """File with the names of the images to judge, one a line, as of COCO20k; default: trainval.txt of VOC, else all."""
    tau: float = TAU
    """Of tokencut: the cosine above which patches are joined."""
    lowest: int = LOWEST
    """Of lost: how many patches of the lowest degree may join the seed."""
    head: int | None = None
    """Of attention: the head of the last block; default: 4, LOST's for ViT-S, or the last of fewer."""
    mass: float = 0.6
    """Of attention: the share that is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several = len(self.methods) > 0 and len({*self.methods}) == len(self.methods)
        require(several, "--methods", self.methods, "different ones", "each is judged once")
        count = self.num_images
        require(count is None or count >= 1, "--num-images", count, "at least 1", "a count of images")
        require(-1 <= self.tau < 1, "--tau", self.tau, "in [-1, 1)", "a cosine")
        require(self.lowest >= 1, "--lowest", self.lowest, "at least 1", "the seed is one of them")
        require(self.head is None or self.head >= 0, "--head", self.head, "0 or more", "the first is 0")
        require(0 < self.mass < 1, "--mass", self.mass, "between 0 and 1", "a share of the attention")

    def open(self, subject: Subject) -> Objects:
        """Images with boxes or masks."""
        check_scipy(self.kind)
        vit = our_vit(subject.backbone, "keys of patches")
        self.reading(subject.config)
        if self.head is not None and self.head >= (heads := _num_heads(vit)):
            raise ConfigError(f"--head {self.head}: the backbone has {heads}, the last is {heads - 1}")
        data, found = subject.config.data, None
        if self.data != "shapes":
            found = benchmarks.open_boxes(self.data, data, self.listed)
        if found is not None:
            if self.num_images is not None:
                found.items = [found.items[i] for i in sample(self.seed, self.num_images, len(found))]
                found.rule += f", {len(found)} drawn"
            return found
        if self.listed is not None:
            raise ConfigError(f"--listed is for VOC and COCO, and {self.data} is neither: leave it out")
        source = masks.open_objects(self.data, data, self.num_images or 2**31, self.seed)
        if source is None:
            raise ConfigError(
                f"{self.data} has neither boxes nor masks of objects: looked for {benchmarks.LAYOUTS}; {masks.LAYOUTS}"
            )
        masked = MaskedObjects(source)
        try:
            if any(len(masked.boxes(i)) for i in range(len(source))):  # the first tells, in most
                return masked
        except BadImage as error:
            raise ConfigError(f"{error}: mend or delete it") from error
        raise ConfigError(f"no mask of {self.data} shows an object: there is nothing to discover")

    def judge(self, subject: Subject, data: Objects) -> Found:
        """corloc_METHOD of each method; with masks iou_METHOD, accuracy_METHOD and f_METHOD too."""
        vit, reading = our_vit(subject.backbone, "keys of patches"), self.reading(subject.config)
        found = each(subject.ranks, len(data), partial(self._judge_one, vit, reading, data), "image")
        judged = [one for one in found if one is not None]  # the others show no object
        places = [place for place, one in enumerate(found) if one is not None]
        names = [data.name(place) for place in places]
        hits = np.array([[one[method].hit for method in self.methods] for one in judged])
        scores = {f"corloc_{x}": wilson(int(hits[:, i].sum()), len(hits)) for i, x in enumerate(self.methods)}
        if judged[0][self.methods[0]].saliency is not None:
            scores |= self._saliency(names, judged)
        arrays = {"names": np.array(names), "hits": hits}
        arrays |= {f"boxes_{method}": np.stack([one[method].box for one in judged]) for method in self.methods}
        return Found(
            scores=scores,
            protocol=self._protocol(vit, reading),
            data={"name": data.rule, "images": len(judged), "without_objects": data.bare + len(found) - len(judged)},
            shares=Shares.mean(names, hits[:, 0].astype(np.float64)),
            arrays=arrays,
            pictures=[Picture("", partial(self._draw, vit, reading, data, places[:SHEET_ROWS]))],
        )

    def find(self, vit: ViT, reading: Reading, image: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By each method: the box (4,) in pixels of ``image``, uint8 (h, w, channels), and the mask (h, w) bool."""
        seen = image if self.size is None else _resized(image, self.size)
        height, width = seen.shape[:2]
        keys, attention = self._read(vit, reading, seen)
        ways: dict[str, Callable[[], np.ndarray]] = {
            "tokencut": lambda: token_cut(keys, self.tau),
            "lost": lambda: lost(keys, self.lowest),
            "attention": lambda: largest_component(keep_mass(attention, self.mass).cpu().numpy()),
        }
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        scale = np.tile([image.shape[1] / width, image.shape[0] / height], 2)
        for method in self.methods:
            mask = enlarged(ways[method](), vit.patch_size, height, width)
            found[method] = box_around(mask) * scale, _to_size(mask, *image.shape[:2])
        return found

    def _read(self, vit: ViT, reading: Reading, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Keys (rows, columns, D) and one head's attention (rows, columns) of an image padded to whole patches."""
        device, dtype = device_and_dtype(vit)
        pixels = torch.tensor(image).permute(2, 0, 1).to(device)
        beyond = [-side % vit.patch_size for side in image.shape[1::-1]]  # on the right and below
        x = F.pad(normalize(pixels, reading.normalize), (0, beyond[0], 0, beyond[1])).unsqueeze(0).to(dtype)
        with evaluating(vit), torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            keys = vit.last_keys(x)[0]
            maps = head_maps(vit, x)[0, self._head(vit)] if "attention" in self.methods else keys[..., 0]
        return keys, maps

    def _judge_one(self, vit: ViT, reading: Reading, data: Objects, index: int) -> dict[str, Finding] | None:
        """By method; None of an image without an object."""
        true = data.boxes(index)
        if not len(true):
            return None
        mask, found = data.mask(index), {}
        for method, (box, of_object) in self.find(vit, reading, data.read(index)).items():
            agreed = None if mask is None else saliency(of_object[mask != VOID], mask[mask != VOID] > 0)
            found[method] = Finding(box, is_hit(box, true), agreed)
        return found

    def _saliency(self, names: list[str], judged: list[Any]) -> dict[str, Score]:
        scores = {}
        for method in self.methods:
            values = np.array([one[method].saliency for one in judged])  # (n, 3)
            for name, column in zip(Saliency._fields, values.T, strict=True):
                scores[f"{name}_{method}"] = Shares.mean(names, column).score()
        return scores

    def _protocol(self, vit: ViT, reading: Reading) -> dict[str, Any]:
        told = {"size": self.size or "original", "normalize": reading.normalize, "precision": reading.precision}
        settings = {"tokencut": {"tau": self.tau}, "lost": {"lowest": self.lowest}}
        settings["attention"] = {"head": self._head(vit), "mass": self.mass}
        return told | {method: settings[method] for method in self.methods}

    def _head(self, vit: ViT) -> int:
        return min(PAPERS_HEAD, _num_heads(vit) - 1) if self.head is None else self.head

    def _draw(self, vit: ViT, reading: Reading, data: Objects, places: list[int], path: Path) -> None:
        """The first images again, for what is drawn is not kept."""
        shown = []
        for place in places:
            image, true = data.read(place), data.boxes(place)
            box, mask = self.find(vit, reading, image)[self.methods[0]]
            title = f"{self.methods[0]}: IoU {ious(box, true).max():.2f}"
            shown.append(Discovered(image, mask, box, true, title))
        draw_discovered(path, shown)


def _num_heads(vit: ViT) -> int:
    return vit.num_features // vit.head_width


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, channels), bicubic, so that the shorter side has ``size`` pixels."""
    height, width = (max(1, round(side * size / min(image.shape[:2]))) for side in image.shape[:2])
    return joined([resize(band, width, height) for band in pictures(image)])


def _to_size(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w) bool -> (height, width), by the nearest."""
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return mask[rows.astype(int)[:, None], columns.astype(int)]

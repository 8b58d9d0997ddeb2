"""Objects followed through a video: their masks in the first frame are spread to the others, judged by J and F."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.davis import LAYOUTS, Video, mask_of_png, mask_png, open_videos
from fastdino.data.views import normalize
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import Reading, device_and_dtype, evaluating, our_vit
from fastdino.eval.intervals import Shares
from fastdino.eval.objects.contours import Course, course, outline_f, region
from fastdino.eval.objects.each import check_scipy, each
from fastdino.eval.objects.pictures import Followed, draw_followed
from fastdino.eval.objects.propagation import follow, hard_labels
from fastdino.eval.result import Found, Picture
from fastdino.files import whole_file
from fastdino.model.vit import ViT

SHORT, MULTIPLE = 480, 64  # DINO's: of the shorter side, and what the other is a multiple of
RED, V1_RED = 0.229, 0.228  # ImageNet's deviation of red, and what DINO's script divides by
DAVIS_NAME, DAVIS_VAL = "DAVIS-2017 val", (30, 1999)  # videos and frames
SHOWN_VIDEOS, SHOWN_FRAMES = 4, 6


class Tracked(NamedTuple):
    """What was found in one video."""

    masks: list[bytes]
    """PNGs of every frame, at the video's size."""
    objects: dict[str, tuple[Course, Course]]
    """J and F of each object; of none where no frame in the middle has a mask."""
    lost: list[str]
    """Objects that are on no patch of the first frame."""


@dataclass(frozen=True, kw_only=True)
class VideoObjects(Evaluation):
    """J&F of objects that are followed through videos by the patches' features, without training.

    The masks of the first frame are spread from frame to frame: a patch takes the labels of the patches in the first
    frame and in the frames before that look most alike and lie near. --data is a folder of DAVIS, or one of frames with
    --masks. As in the DAVIS challenge, the first and the last frame are not judged. Every frame's mask is written to
    video-masks/ in --out, as a PNG with a palette; without masks to compare with, that is all.
    """

    kind: ClassVar[str] = "video"
    needs: ClassVar[str] = "DAVIS, or frames with a mask of the first"
    controls: ClassVar[tuple[str, ...]] = ("random_init",)

    size: int | None = None
    """Pixels of the shorter side, cut to whole patches as the other is; default: 480, with the other cut to a multiple
    of 64, as DINO does."""
    masks: Path | None = None
    """Of a folder of frames: the mask of the first, a PNG whose values are the objects; or a folder of masks that are
    called as their frames."""
    context: int = 7
    """Frames before that are looked at, beside the first."""
    radius: int = 12
    """How many rows and columns of patches away the same object is looked for."""
    k: int = 5
    """How many patches, over all frames that are looked at, tell a patch's label."""
    temperature: float = 0.1
    """Their weight is exp(cosine / temperature)."""
    published: Literal["no", "v1"] = "no"
    """v1: red is divided by 0.228 rather than 0.229, as DINO's script has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.context >= 0, "--context", self.context, "0 or more", "a count of frames")
        require(self.radius >= 0, "--radius", self.radius, "0 or more", "a count of patches")
        require(self.k >= 1, "--k", self.k, "at least 1", "a count of patches")
        require(self.temperature > 0, "--temperature", self.temperature, "positive", "it divides the cosines")

    def open(self, subject: Subject) -> list[Video]:
        """The videos, whose frames fit the patches."""
        check_scipy(self.kind)
        vit = our_vit(subject.backbone, "tokens of patches")
        if self.reading(subject.config).normalize != "imagenet" and self.published == "v1":
            raise ConfigError("--published v1 is about --normalize imagenet: leave one of them out")
        if self.data == "shapes":
            raise ConfigError(f"--data has to hold videos: {LAYOUTS}")
        videos = open_videos(self.data, subject.config.data, self.masks)
        for video in videos:
            self.sides(vit, *video.size)
        return videos

    def judge(self, subject: Subject, data: list[Video]) -> Found:
        """j_and_f, and both by themselves, over all objects."""
        vit, reading = our_vit(subject.backbone, "tokens of patches"), self.reading(subject.config)
        tracked = each(subject.ranks, len(data), lambda i: self._judge_one(vit, reading, data[i]), "video")
        objects = {name: pair for one in tracked for name, pair in one.objects.items()}
        names, (js, fs) = list(objects), np.array([*objects.values()]).reshape(-1, 2, 3).transpose(1, 0, 2)
        each_object = {"j_and_f": (js[:, 0] + fs[:, 0]) / 2, "j": js[:, 0], "f": fs[:, 0]}
        shares = {name: Shares.mean(names, values) for name, values in each_object.items() if names}
        also: dict[str, Any] = {"masks": "video-masks/VIDEO/FRAME.png"}
        for name, measured in (("j", js), ("f", fs)) if names else ():
            also |= {f"{name}_{what}": 100 * float(measured[:, i].mean()) for i, what in ((1, "recall"), (2, "decay"))}
        lost = [name for one in tracked for name in one.lost]
        notes = [f"smaller than a patch in the first frame, and so never found: {', '.join(lost)}"] if lost else []
        if not names:
            notes.append("no frame between the first and the last has a mask: nothing is judged")
        return Found(
            scores={name: share.score() for name, share in shares.items()},
            protocol=self._protocol(reading),
            data={"name": name_of(data), "videos": len(data), "images": sum(map(len, data)), "objects": len(names)},
            also=also,
            notes=notes,
            shares=shares.get("j_and_f"),
            arrays={"objects": np.array(names), **each_object} if names else {},
            pictures=[Picture("", partial(_write, data, tracked))],
        )

    def baseline_subjects(self, subject: Subject, found: Found) -> Iterator[tuple[str, Subject]]:
        """None where there is no score to compare."""
        if found.scores:
            yield from super().baseline_subjects(subject, found)

    def sides(self, vit: ViT, height: int, width: int) -> tuple[int, int]:
        """Height and width at which frames of ``height`` and ``width`` are seen. Raises ConfigError for too small a
        --size."""
        patch, short = vit.patch_size, min(height, width)
        multiple = MULTIPLE if self.size is None and MULTIPLE % patch == 0 else patch
        small = (self.size or SHORT) // patch * patch
        large = (self.size or SHORT) * max(height, width) // short // multiple * multiple
        if not small or not large:
            raise ConfigError(f"--size {self.size} is less than a patch of {patch}: give a larger one")
        return (small, large) if height <= width else (large, small)

    def first_labels(self, vit: ViT, video: Video) -> tuple[Tensor, Tensor]:
        """The C values of the first mask, 0 the first of them, and which each patch has there: one-hot fp32 (rows,
        columns, C)."""
        mask = torch.from_numpy(video.mask(0)).to(device_and_dtype(vit)[0])
        values = torch.unique(torch.cat([mask.new_zeros(1), mask.flatten()]))
        height, width = self.sides(vit, *video.size)
        patches = _nearest(mask, (height // vit.patch_size, width // vit.patch_size))
        return values, (patches.unsqueeze(-1) == values).float()

    def spread(self, vit: ViT, reading: Reading, video: Video) -> Iterator[np.ndarray]:
        """uint8 (h, w) masks of every frame but the first, as they come. Raises BadImage."""
        seen = self.sides(vit, *video.size)
        values, first = self.first_labels(vit, video)
        frames = self._features(vit, reading, video, seen)
        for soft in follow(frames, first, self.context, self.radius, self.k, self.temperature):
            yield _nearest(values[hard_labels(soft, seen)], video.size).cpu().numpy()

    def _features(self, vit: ViT, reading: Reading, video: Video, seen: tuple[int, int]) -> Iterator[Tensor]:
        """(rows, columns, D) fp32 of each frame, of --batch at once."""
        device, dtype = device_and_dtype(vit)
        for start in range(0, len(video), self.batch):
            frames = np.stack([video.read(i) for i in range(start, min(start + self.batch, len(video)))])
            pixels = torch.from_numpy(frames).to(device).movedim(-1, 1).float()
            pixels = F.interpolate(pixels, size=seen, mode="bilinear", align_corners=False).round()
            x = normalize(pixels, reading.normalize)
            if self.published == "v1":
                x[:, 0] *= RED / V1_RED
            with evaluating(vit), torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
                yield from vit.patch_tokens(x.to(dtype)).float()

    def _judge_one(self, vit: ViT, reading: Reading, video: Video) -> Tracked:
        values, first = self.first_labels(vit, video)
        names = [f"{video.name}/{value}" for value in values[1:].tolist()]
        masks, measured = [mask_png(video.mask(0))], []
        for index, found in enumerate(self.spread(vit, reading, video), 1):
            masks.append(mask_png(found))
            if index in video.masks and index < len(video) - 1:
                measured.append([measures(found == x, video.mask(index) == x) for x in values[1:].tolist()])
        objects = {}
        if measured:
            for name, (j, f) in zip(names, np.array(measured).transpose(1, 2, 0), strict=True):  # over the frames
                objects[name] = course(j), course(f)
        there = first.flatten(0, 1).any(dim=0)[1:].tolist()
        return Tracked(masks, objects, [name for name, seen in zip(names, there, strict=True) if not seen])

    def _protocol(self, reading: Reading) -> dict[str, Any]:
        told = {"size": self.size or f"{SHORT}, the other a multiple of {MULTIPLE}", "interpolation": "bilinear"}
        told |= {"normalize": reading.normalize, "precision": reading.precision, "published": self.published}
        return told | {name: getattr(self, name) for name in ("context", "radius", "k", "temperature")}


def name_of(videos: list[Video]) -> str:
    """DAVIS's, where there are as many videos and frames; else empty."""
    return DAVIS_NAME if (len(videos), sum(map(len, videos))) == DAVIS_VAL else ""


def measures(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """J and F of two (h, w) bool masks."""
    return region(found, true), outline_f(found, true)


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (h, w) -> the same of another size, as Pillow has the nearest."""
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(labels.dtype)


def _write(videos: list[Video], tracked: list[Tracked], path: Path) -> None:
    """The masks beside ``path``, and a strip of the first videos to it."""
    shown = []
    for video, found in zip(videos, tracked, strict=True):
        for frame, png in zip(video.frames, found.masks, strict=True):
            with whole_file(path.parent / "video-masks" / video.name / f"{frame.stem}.png") as file:
                file.write_bytes(png)
    for video, found in [*zip(videos, tracked, strict=True)][:SHOWN_VIDEOS]:
        places = np.unique(np.linspace(0, len(video) - 1, SHOWN_FRAMES).round().astype(int)).tolist()
        frames, masks = [video.read(i) for i in places], [mask_of_png(found.masks[i]) for i in places]
        shown.append(Followed(video.name, frames, masks, [f"frame {i}" for i in places]))
    draw_followed(path, shown)

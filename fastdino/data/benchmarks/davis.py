"""Videos whose objects are known in the first frame, or in more: DAVIS, and a folder of frames with a mask."""

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.masks import VOID, read_mask
from fastdino.data.sources.decode import BadImage, decode, file_bytes, image_endings
from fastdino.data.sources.folder import check_folder, scan

LAYOUTS = (
    "JPEGImages/480p/VIDEO/ and Annotations/480p/VIDEO/ of DAVIS (also without 480p/), or a folder of frames with the "
    "objects of its first in --masks"
)
"""How videos may lie, for a message about what does not."""

_FOLDERS, _RESOLUTIONS = ("JPEGImages", "Annotations"), ("480p", ".")


@dataclass(frozen=True)
class Video:
    """Frames in the order of the numbers in their names, and the masks that are there, by the frame."""

    name: str
    frames: Sequence[Path]
    masks: dict[int, Path]
    config: DataConfig

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame. Raises BadImage."""
        return _size(self.frames[0])

    def read(self, index: int) -> np.ndarray:
        """uint8 (height, width, channels). Raises BadImage."""
        name = f"{self.name}/{self.frames[index].name}"
        return decode(file_bytes(self.frames[index], name), name, self.config)

    def mask(self, index: int) -> np.ndarray:
        """uint8 (height, width) of a frame in masks: 0 where there is no object, else its number. Raises BadImage.

        255 is no object, unless the first mask has no other: then it is the object 1, as in DAVIS 2016.
        """
        values = self._values(index)
        return np.where(values == VOID, np.uint8(self._only_void), values)

    @cached_property
    def _only_void(self) -> bool:
        return np.unique(self._values(0)).tolist() in ([VOID], [0, VOID])

    def _values(self, index: int) -> np.ndarray:
        return read_mask(self.masks[index], f"{self.name}/{self.masks[index].name}")


def open_videos(root: str, config: DataConfig, masks: Path | None = None) -> list[Video]:
    """Every video below ``root``, checked so that objects can be followed through it.

    Of DAVIS the videos in ImageSets/2017/val.txt, or without it all.

    Args:
        root: a folder of one of LAYOUTS.
        config: how frames are decoded.
        masks: for a folder of frames: the mask of the first, or a folder of masks that are called as their frames.

    Raises ConfigError for an unknown layout; for a video of one frame, without a mask of the first frame, or with
    frames or masks of several sizes; and for a mask of no object, or with one that the first frame has not.
    """
    folder = Path(os.path.expanduser(root))
    check_folder(os.fsencode(folder))
    at = next((x for x in (folder, folder / "DAVIS") if all(os.path.isdir(x / name) for name in _FOLDERS)), None)
    if at is None:
        videos = [_plain(folder, config, masks)]
    elif masks is None:
        videos = _davis(at, config)
    else:
        raise ConfigError(f"{root} has the masks of its videos in Annotations/: leave --masks out")
    for video in tqdm(videos, desc="masks", unit="video", leave=False, disable=None):
        _check(video)
    return videos


def mask_png(mask: np.ndarray) -> bytes:
    """A PNG of an (h, w) mask that keeps its values, coloured by :func:`palette`, as DAVIS has them."""
    image, buffer = Image.fromarray(mask.astype(np.uint8), "P"), io.BytesIO()
    image.putpalette(palette().ravel().tolist())
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mask_of_png(png: bytes) -> np.ndarray:
    """uint8 (h, w): what :func:`mask_png` was given."""
    return np.asarray(Image.open(io.BytesIO(png)))


@lru_cache
def palette() -> np.ndarray:
    """uint8 (256, 3), PASCAL VOC's colours, which DAVIS has too: from the bits of a value, three to a level."""
    value, bits = np.arange(256)[:, None], np.arange(3)
    levels = [((value >> (3 * i + bits)) & 1) << (7 - i) for i in range(3)]
    return np.sum(levels, axis=0).astype(np.uint8)


def _davis(folder: Path, config: DataConfig) -> list[Video]:
    below = next(x for x in _RESOLUTIONS if os.path.isdir(folder / "JPEGImages" / x))
    images, annotations = (folder / name / below for name in _FOLDERS)
    listed = folder / "ImageSets" / "2017" / "val.txt"
    names = listed.read_text().split() if listed.exists() else sorted(x.name for x in images.iterdir() if x.is_dir())
    if not names:
        raise ConfigError(f"{listed if listed.exists() else images} names no video: looked for {LAYOUTS}")
    return [_video(name, images / name, annotations / name, config) for name in names]


def _plain(folder: Path, config: DataConfig, masks: Path | None) -> Video:
    if masks is None:
        found = ", ".join(sorted(x.name + "/" * x.is_dir() for x in folder.iterdir())[:5]) or "nothing"
        raise ConfigError(f"{folder} holds no videos with masks. Found in it: {found}. Looked for {LAYOUTS}")
    return _video(folder.name, folder, masks.expanduser(), config)


def _video(name: str, images: Path, masks: Path, config: DataConfig) -> Video:
    """Of the images directly in a folder, but for the mask."""
    check_folder(os.fsencode(images))
    listed = scan(os.fsencode(images), image_endings(config.takes_arrays), Counter())
    frames = [images / os.fsdecode(path) for path in sorted(listed, key=_by_number) if b"/" not in path]
    if os.path.isdir(masks):
        known = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
        return Video(name, frames, {i: known[x.stem] for i, x in enumerate(frames) if x.stem in known}, config)
    frames = [path for path in frames if not os.path.exists(masks) or not path.samefile(masks)]
    return Video(name, frames, {0: masks} if os.path.isfile(masks) else {}, config)


def _by_number(path: bytes) -> list[tuple[int, bytes]]:
    """A key by which 2.jpg comes before 10.jpg."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(rb"(\d+)", path)]


def _check(video: Video) -> None:
    """Raises ConfigError for a video that cannot be followed."""
    if len(video) < 2:
        raise ConfigError(f"video {video.name} needs two frames or more, it has {len(video)}")
    if 0 not in video.masks:
        raise ConfigError(f"video {video.name} has no mask of its first frame, {video.frames[0].name}: add one")
    try:
        sizes = {path: _size(path) for path in (*video.frames, *video.masks.values())}
        objects = {index: {*np.unique(video.mask(index)).tolist()} - {0} for index in video.masks}
    except BadImage as error:
        raise ConfigError(f"video {video.name}: {error}") from error
    first = sizes[video.frames[0]]
    if other := next((path for path, size in sizes.items() if size != first), None):
        (height, width), (others_height, others_width) = first, sizes[other]
        raise ConfigError(
            f"video {video.name}: {other} is of {others_width} x {others_height} pixels, and the first frame of "
            f"{width} x {height}: all frames and masks of a video have one size"
        )
    if not objects[0]:
        raise ConfigError(f"video {video.name}: the mask of the first frame, {video.masks[0].name}, shows no object")
    for index, found in objects.items():
        if new := sorted(found - objects[0]):
            raise ConfigError(
                f"video {video.name}: {video.masks[index].name} has an object {new[0]}, which the mask of the first "
                f"frame has not (it has {sorted(objects[0])}): what is followed is what is there at first"
            )


def _size(path: Path) -> tuple[int, int]:
    """Height and width by the file's header. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(file_bytes(path, path.name))) as image:
            return image.height, image.width
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(path.name, f"{type(error).__name__}: {error}") from error

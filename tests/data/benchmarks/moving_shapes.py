"""A short video: two rendered objects that move over a still background, with their masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastdino.data.benchmarks.davis import mask_png
from fastdino.data.sources.shapes import SILHOUETTES, TEXTURES, ShapesSource

# Silhouette, texture, colour, radius in shares of the height; where it begins and how far it goes in shares of a side.
OBJECTS = (
    ("star", "plain", (235, 80, 60), 0.28, (0.22, 0.35), (0.5, 0.05)),
    ("square", "checked", (70, 160, 240), 0.2, (0.75, 0.7), (-0.4, -0.05)),
)


def frame(share: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (height, width, 3) and its mask at a time from 0 to 1. The first object is in front."""
    side = max(height, width)
    image = ShapesSource(1, side, seed=5).read(0)[0][:height, :width] // 2
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for number, (silhouette, texture, colour, radius, start, path) in reversed([*enumerate(OBJECTS, 1)]):
        centre = [(a + share * b) * side for a, b, side in zip(start, path, (width, height), strict=True)]
        px, py = (x - centre[0]) / (radius * height), (y - centre[1]) / (radius * height)
        inside = SILHOUETTES[silhouette](px, py) < 0
        shade = 1 - 0.4 * TEXTURES[texture](px, py, 1 / (radius * height))
        image[inside] = (np.array(colour) * shade[..., None])[inside].astype(np.uint8)
        mask[inside] = number
    return image, mask


def write_video(frames: Path, masks: Path, num_frames: int = 6, height: int = 48, width: int = 64) -> None:
    """PNGs of the frames and of their masks, 00000.png and so on, in two folders."""
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    for index in range(num_frames):
        image, mask = frame(index / (num_frames - 1), height, width)
        Image.fromarray(image).save(frames / f"{index:05d}.png")
        (masks / f"{index:05d}.png").write_bytes(mask_png(mask))


def write_davis(root: Path, names: tuple[str, ...] = ("one", "two"), listed: bool = True, **size: int) -> None:
    """Such videos in the folders of DAVIS."""
    for name in names:
        write_video(root / "JPEGImages/480p" / name, root / "Annotations/480p" / name, **size)
    if listed:
        (root / "ImageSets/2017").mkdir(parents=True)
        (root / "ImageSets/2017/val.txt").write_text("\n".join(names) + "\n")

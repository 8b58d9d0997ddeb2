"""Small images in class folders, a small backbone, and a source whose labels can be poisoned."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdino.config import Config, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.source import Room
from fastdino.eval import Subject
from fastdino.model import build_backbone

SIZE, WIDTH = 16, 96
CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8),
    views=ViewsConfig(global_size=SIZE, local_size=8),
    data=DataConfig(num_workers=0, image_size=SIZE, normalize="imagenet", eval_crop=1.0),
)
HUES = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


def folders(root: Path, train: tuple[int, ...] = (12, 12, 12), test: int = 6, noise: int = 140) -> Path:
    """train/ and val/ of three colours that noise hides more or less, with so many images of each in train/."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", train), ("val", (test,) * 3)):
        for (name, hue), count in zip(HUES.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = 60 + 40 * np.array(hue) + rng.integers(0, noise, (SIZE, SIZE, 3)) * rng.random(3)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i:02}.png")
    return root


def subject(folder: Path) -> Subject:
    """A ViT that has not learned."""
    return Subject(build_backbone(CONFIG.model, SIZE, seed=5).eval(), CONFIG, folder, {"path": "here"})


class Poisoned(Subset):
    """All images of a source with the classes of the labels turned round."""

    def __init__(self, source: Any) -> None:
        super().__init__(source, range(len(source)))

    def label(self, index: int) -> int:
        return (super().label(index) + 1) % len(self.labels)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        return super().read(index, room)[0], self.label(index)

"""Images that the tests of this room make."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int = 0, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write(path: Path, image: Image.Image | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise()).save(path, **options)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise: every operation changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))


def photos(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 10) -> Path:
    """A folder of class folders with JPEG and PNG files."""
    for c, name in enumerate(classes):
        for i in range(each):
            image = photo(30 + i, 40 - i, 100 * c + i)
            write(root / name / f"{i:02d}.{'png' if i % 3 == 0 else 'jpg'}", image)
    return root

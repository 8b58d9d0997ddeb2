"""Settings of images and of the views that are made of them."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdino.config.errors import ConfigError
from fastdino.config.group import Group

MAX_VIEWS = 32  # S, student views of one image that the fused loss takes
MAX_CHANNELS = 256  # more than a hyperspectral camera has


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Group):
    """Multi-crop: an image becomes 2 global and L local views. Probabilities are DINO v1's."""

    global_size: int = 224
    """Side of a global view in pixels."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global view covers. With no local views use 0.14 1."""
    local_size: int = 96
    """Side of a local view in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local view covers."""
    num_local: int = 8
    """L, local views per image; 0 trains on the two global views alone."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Largest rotation in degrees, either way."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Colour jitter of brightness, contrast, saturation and hue (hue at most 0.5, the whole circle)."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur in the first global, second global and local views."""
    solarize: float = 0.2
    """Probability of solarization in the second global view."""
    mask_share: float = 0.5
    """Share of the global views of which patches are hidden from the student; needs loss.patch_weight."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of the patches that is hidden in a masked view."""

    def check(self) -> None:
        for name in ("global_size", "local_size"):
            self.require(getattr(self, name) >= 1, name, "a positive number of pixels")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            self.require(
                0 < low <= high <= 1, name, "two numbers with 0 < low <= high <= 1", "shares of the image's area"
            )
        self.require(
            0 <= self.num_local <= MAX_VIEWS - 2, "num_local", f"in [0, {MAX_VIEWS - 2}]",
            f"the fused loss holds at most {MAX_VIEWS} views of an image, two of them global",
        )  # fmt: skip
        for name in ("flip", "jitter", "grayscale", "solarize"):
            self.require(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]")
        self.require(all(0 <= p <= 1 for p in self.blur), "blur", "three probabilities in [0, 1]")
        self.require(0 <= self.rotate <= 180, "rotate", "in [0, 180] degrees")
        self.require(
            min(self.jitter_strength) >= 0 and self.jitter_strength[3] <= 0.5, "jitter_strength",
            "four numbers >= 0, the last at most 0.5", "a hue shift of 0.5 is the whole circle",
        )  # fmt: skip

        self.require(
            0 < self.mask_share <= 1, "mask_share", "in (0, 1]",
            "a share of the global views; to train with no masks leave loss.patch_weight at 0",
        )  # fmt: skip
        low, high = self.mask_ratio
        self.require(
            0 < low <= high < 1, "mask_ratio", "two numbers with 0 < low <= high < 1",
            "shares of a view's patches; of a view that is hidden whole nothing can be learned",
        )  # fmt: skip

    @property
    def num_views(self) -> int:
        """S, student views per image."""
        return 2 + self.num_local


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """Where images come from."""

    root: str = ""
    """A folder of images, in any nesting; .tar shards or .parquet files (a folder, a glob, shards/{000..099}.tar), also
    behind a URL; a folder of datasets.save_to_disk; a .csv or .jsonl with paths; the word shapes: rendered objects.
    Several with weights, a:0.7 b:0.3, are mixed: shares of the images that are seen."""
    image_column: str = ""
    """Column of a table that holds images, or their paths. Default: image, path, file or a like name that is there."""
    label_column: str = ""
    """Column that holds classes. Default: label, class or a like name, if there is one."""
    cache: Path = Path("~/.cache/fastdino")
    """A folder for what is made once and read again: indexes of shards, shards from a URL, parquet unpacked."""
    cache_gb: float = 100.0
    """Size of the cache in GB, for all runs that share it; above it the least recently used files are removed."""
    num_images: int = 10000
    """Images per epoch of shapes; a folder has as many as it holds."""
    image_size: int = 256
    """Side in pixels at which shapes are rendered."""
    normalize: Literal["imagenet", "image"] = "imagenet"
    """Subtract ImageNet's mean and divide by its deviation, or those of each channel of each view (short runs)."""
    eval_crop: float = 0.875
    """Share of an image's shorter side that evaluations see, in the middle. DINO v1: 224 / 256; 1 sees it all."""
    views: Literal["auto", "reference", "fast", "device"] = "auto"
    """What makes the views: Pillow (reference); our C with the same pixels (fast); kernels on the GPU, within 0.25 gray
    levels on average, which leave the workers decoding alone (device). auto: fast where it is built, or reference."""
    max_side: int = 1024
    """Pixels of an image's longer side that views=device takes; larger images are reduced to it first. The workers hold
    3 batches of squares of this side in memory: as they need it, for a GPU all at once."""
    num_workers: int = 10
    """What reads, decodes and makes views, per rank: threads of one process where views are fast, else a process each;
    0 works in the training process."""
    max_bad: float = 0.01
    """Largest share of an epoch's images that may be unreadable; above it the run stops."""
    max_pixels: int = 178956970
    """Largest image that is decoded, in pixels; a larger one counts as unreadable. Default: Pillow's limit."""
    bits: int = 16
    """Bits that 16-bit values use: 12 for the files of many cameras and microscopes. Of 16-bit colour that Pillow reads
    the high bytes are kept whatever this says; see data.range."""
    channels: int = 3
    """C, channels of an image: 3, to which gray is repeated; 1, to which colour becomes its luma; or any other number,
    which the images must have: .npy, multispectral TIFF (pip install 'fastdino[tiff]'), PNG with alpha."""
    range: tuple[float, float] | None = None
    """Values that become 0 and 255; between them linearly, to the nearest level (halves up), beyond them the end, NaN
    the low one. It makes images of float, signed and 32-bit values readable and takes the place of data.bits. 8-bit
    images stay as they are. With it, or with channels other than 3, .npy files count as images."""

    def check(self) -> None:
        self.require(self.num_images >= 1, "num_images", "at least 1")
        self.require(self.image_size >= 8, "image_size", "at least 8 pixels", "objects must show")
        self.require(self.num_workers >= 0, "num_workers", "0 or more")
        self.require(0 < self.eval_crop <= 1, "eval_crop", "a share in (0, 1]")
        self.require(self.cache_gb >= 0, "cache_gb", "0 or more")
        self.require(0 <= self.max_bad <= 1, "max_bad", "a share in [0, 1]")
        self.require(self.max_pixels >= 1, "max_pixels", "at least 1")
        self.require(16 <= self.max_side <= 16384, "max_side", "in [16, 16384] pixels")
        self.require(8 <= self.bits <= 16, "bits", "in [8, 16]", "8 of them are kept")
        self.require(1 <= self.channels <= MAX_CHANNELS, "channels", f"in [1, {MAX_CHANNELS}]")
        if self.range is not None:
            low, high = self.range
            self.require(0 < high - low < float("inf"), "range", "two numbers with low < high", "they become 0 and 255")
            reason = f"data.range={low:g} {high:g} says what becomes 0 and 255; 0 4095 is what 12 bits mean"
            self.require(self.bits == 16, "bits", "left out", reason)

    @property
    def takes_arrays(self) -> bool:
        """True when .npy files are images. With three channels of bytes they are not: they lie beside many images, and
        hold labels or features."""
        return self.channels != 3 or self.range is not None

    @property
    def renders(self) -> bool:
        """True when shapes are trained on, alone or in a mixture."""
        return "shapes" in (self.root, *(root for root, _ in mixture(self.root)))


def mixture(root: str) -> list[tuple[str, float]]:
    """Roots and weights of ``a:0.7 b:0.3``, split as by a shell; none for what names one source.

    Raises ConfigError for weights that cannot be, and when only some have one.
    """
    try:
        words = shlex.split(root)
    except ValueError:  # a quote in the name of a folder
        return []
    parts = [(word.rpartition(":")[0], _number(word.rpartition(":")[2])) for word in words]
    weights = [weight for _, weight in parts if weight is not None]
    if len(parts) < 2 or not weights:
        return []
    if len(weights) < len(parts):
        without = next(word for word, (_, weight) in zip(words, parts, strict=True) if weight is None)
        raise ConfigError(f"data.root={root!r} mixes sources, and {without} has no weight: write a:0.7 b:0.3")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"data.root={root!r} mixes sources: their weights must be positive")
    return list(zip((part for part, _ in parts), weights, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

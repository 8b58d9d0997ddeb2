"""Images become the tokens of their patches, a batch at a time: what every dense evaluation reads."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdino.config import Config, DataConfig
from fastdino.data.benchmarks.class_folders import NUM_SHAPES, TEST_SEED
from fastdino.data.benchmarks.masks import Masked, images_alone
from fastdino.data.draws import sample
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.decode import BadImage, image_endings
from fastdino.data.sources.folder import FileSource
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.shapes import ShapesSource, check_shows_shapes
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.data.views.evaluation import whole_view
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import (
    EvaluationError,
    Reading,
    Tokens,
    check_size,
    device_and_dtype,
    evaluating,
    our_vit,
)
from fastdino.model.vit import ViT

T = TypeVar("T")

Read = Callable[[Tensor], Tensor]  # uint8 (B, C, s, s) -> (B, rows, columns, D)


class Shown(NamedTuple):
    """Images as the network sees them: the whole of each, squeezed to a square."""

    indices: list[int]
    """Places in the source."""
    pixels: Tensor
    """uint8 (B, C, s, s)."""
    sizes: list[tuple[int, int]]
    """Width and height of each before."""
    masks: list[np.ndarray]
    """uint8 (height, width) of each; none where the source has none."""


def tokens_of(vit: ViT, reading: Reading) -> Read:
    """Its patches after the final norm, on its device."""
    device, dtype = device_and_dtype(vit)

    def read(images: Tensor) -> Tensor:
        x = normalize(images.to(device), reading.normalize).to(dtype)
        with evaluating(vit), torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            return vit.patch_tokens(x)

    return read


@dataclass(frozen=True, kw_only=True)
class Dense(Evaluation):
    """The base of the evaluations of patches: the whole image is squeezed to a square of whole patches."""

    controls: ClassVar[tuple[str, ...]] = ("random_init",)
    zoom: ClassVar[int] = 1
    """The default of --size, in sides of a global view."""

    def reading(self, config: Config, tokens: Tokens = "cls") -> Reading:
        """As of every evaluation, but at the nearest size that patches tile."""
        reading, patch = super().reading(config, tokens), config.model.patch_size
        return replace(reading, size=max(1, round(self.asked(config) / patch)) * patch)

    def asked(self, config: Config) -> int:
        """The size before it is rounded."""
        return self.size or self.zoom * config.views.global_size

    def network(self, subject: Subject) -> tuple[ViT, Reading]:
        """The backbone, and how it is shown images. Raises EvaluationError where it has no patches."""
        vit, reading = our_vit(subject.backbone, f"eval {self.kind}"), self.reading(subject.config)
        check_size(vit, reading)
        return vit, reading

    def read_by(self, subject: Subject) -> dict[str, Any]:
        """The protocol's beginning."""
        reading = self.reading(subject.config)
        return {"size": reading.size, "normalize": reading.normalize, "precision": reading.precision}

    def remarks(self, subject: Subject) -> list[str]:
        """Notes where images are shown otherwise than was asked for."""
        asked, size = self.asked(subject.config), self.reading(subject.config).size
        patch = subject.config.model.patch_size
        cropped = ["--crop-ratio has no effect: the whole of an image is shown"] * (self.crop_ratio is not None)
        return cropped + [f"size {size}: {asked} does not divide into patches of {patch}"] * (asked != size)


def open_images(data: str, config: DataConfig, num_images: int, seed: int) -> Source:
    """At most ``num_images`` images, drawn, of :func:`all_images`."""
    source = all_images(data, config)
    return Subset(source, sample(seed, num_images, len(source)))


def all_images(data: str, config: DataConfig) -> Source:
    """What --data names: shapes, an image, the images of a folder with masks, or what else :func:`open_part` opens.

    Raises ConfigError as it does.
    """
    if data == "shapes":
        check_shows_shapes(config)
        return ShapesSource(NUM_SHAPES, config.image_size, TEST_SEED)
    path = Path(os.path.expanduser(data))
    if os.path.isfile(path) and os.fsencode(path.suffix.lower()) in image_endings(config.takes_arrays):
        source = FileSource(os.fsencode(path.parent), [os.fsencode(path.name)], np.full(1, -1, np.int32), config)
        source.labels = []
        return source
    return images_alone(path, config) or open_part(data, config)


def shown(
    source: Source | Masked, size: int, batch: int, indices: Sequence[int] | None = None, masks: bool = False
) -> Iterator[Shown]:
    """The images of ``source``, all or those at ``indices``, in batches; with ``masks`` also these.

    One batch is read while another is worked on, and no more are held. Raises EvaluationError that names an image or a
    mask that cannot be read.
    """
    mask_of: Any = getattr(source, "mask", None)

    def load(index: int) -> tuple[Tensor, tuple[int, int], np.ndarray | None]:
        image = source.read(index)[0]
        mask = mask_of(index) if masks else None
        return whole_view(image, size), (image.shape[1], image.shape[0]), mask

    places = list(range(len(source)) if indices is None else indices)
    chunks = [places[start : start + batch] for start in range(0, len(places), batch)]
    loaded = _ahead(lambda chunk: [load(index) for index in chunk], chunks)
    bar = tqdm(chunks, desc="images", unit="batch", leave=False, disable=None)
    try:
        for chunk, rows in zip(bar, loaded, strict=True):
            pixels, sizes, found = zip(*rows, strict=True)
            yield Shown(chunk, torch.stack(pixels), list(sizes), [mask for mask in found if mask is not None])
    except BadImage as error:
        raise EvaluationError(f"{error}: mend or delete it") from error


def _ahead(work: Callable[[list[int]], T], chunks: list[list[int]]) -> Iterator[T]:
    """``work`` of each chunk, of the next one meanwhile. One thread: a source need not be read by two at once."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Future[T]] = deque()
        for chunk in chunks:
            coming.append(pool.submit(work, chunk))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

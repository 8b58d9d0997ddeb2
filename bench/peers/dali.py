"""DINO v1's views by NVIDIA DALI on a CPU, by its threads and its operators; where it is installed."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.views import BLUR_RADIUS
from fastdino.config import ViewsConfig
from fastdino.data.views.params import SOLARIZE_THRESHOLD

RATIO = (3 / 4, 4 / 3)


def why_not() -> str:
    """Why DALI cannot be measured here; empty when it can."""
    try:
        return "" if importlib.util.find_spec("nvidia.dali") else "it is not installed"
    except ModuleNotFoundError:
        return "it is not installed"


def loader(paths: list[Path], config: ViewsConfig, batch: int, threads: int) -> Iterator[list[Tensor]]:
    """Batches of random images without end: (batch, 3, size, size) uint8 for each view, as they leave DALI."""
    dali = importlib.import_module("nvidia.dali")
    pipeline = dali.pipeline_def(enable_conditionals=True)(_views)(
        dali, paths, config, batch_size=batch, num_threads=threads, device_id=None, seed=0
    )
    pipeline.build()
    while True:
        yield [torch.from_numpy(views.as_array()) for views in pipeline.run()]


def _views(dali: Any, paths: list[Path], config: ViewsConfig) -> Any:
    encoded, _ = dali.fn.readers.file(files=[str(path) for path in paths], random_shuffle=True)
    image = dali.fn.decoders.image(encoded, output_type=dali.types.RGB)
    kinds = [
        (config.global_size, config.global_scale, config.blur[0], 0.0),
        (config.global_size, config.global_scale, config.blur[1], config.solarize),
        *[(config.local_size, config.local_scale, config.blur[2], 0.0)] * config.num_local,
    ]
    return tuple(_view(dali, image, config, *kind) for kind in kinds)


def _view(
    dali: Any, image: Any, config: ViewsConfig, size: int, scale: tuple[float, float], blurred: float, solarized: float
) -> Any:
    fn, types = dali.fn, dali.types

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def strength(by: float, around: float) -> Any:
        return fn.random.uniform(range=[around - by, around + by])

    brightness, contrast, saturation, hue = config.jitter_strength
    view = fn.random_resized_crop(
        image, size=[size, size], random_area=list(scale), random_aspect_ratio=list(RATIO),
        interp_type=types.INTERP_CUBIC, antialias=True,
    )  # fmt: skip
    view = fn.flip(view, horizontal=fn.random.coin_flip(probability=config.flip))
    if chance(config.jitter):
        view = fn.color_twist(
            view, brightness=strength(brightness, 1), contrast=strength(contrast, 1),
            saturation=strength(saturation, 1), hue=360 * strength(hue, 0),
        )  # fmt: skip
    if chance(config.grayscale):
        view = fn.saturation(view, saturation=0.0)
    if chance(blurred):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=list(BLUR_RADIUS)))
    if chance(solarized):
        bright = view >= SOLARIZE_THRESHOLD
        view = dali.fn.cast(bright * (255 - view) + (1 - bright) * view, dtype=types.UINT8)
    return fn.transpose(view, perm=[2, 0, 1])

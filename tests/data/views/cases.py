"""Parameters that do one thing, and images and draws at random: what both implementations of the views make."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data.views import Column, sample_params

NEUTRAL = {Column.WIDTH: 1, Column.HEIGHT: 1, Column.BRIGHTNESS: 1, Column.CONTRAST: 1, Column.SATURATION: 1}
ONE_STEP = {
    "crop": {Column.LEFT: 0.25, Column.TOP: 0.1, Column.WIDTH: 0.5, Column.HEIGHT: 0.4},
    "flip": {Column.FLIP: 1},
    "brighter": {Column.BRIGHTNESS: 1.37},
    "darker": {Column.BRIGHTNESS: 0.61},
    "contrast": {Column.CONTRAST: 1.4},
    "less contrast": {Column.CONTRAST: 0.6},
    "saturation": {Column.SATURATION: 1.2},
    "less saturation": {Column.SATURATION: 0.8},
    "hue": {Column.HUE: 0.1},
    "hue back": {Column.HUE: -0.45},
    "hue by less than a step": {Column.HUE: 0.001},
    "grayscale": {Column.GRAYSCALE: 1},
    "blur": {Column.BLUR: 1.7},
    "gray blur": {Column.GRAYSCALE: 1, Column.BLUR: 0.4},
    "solarize": {Column.SOLARIZE: 1},
    "gray solarize": {Column.GRAYSCALE: 1, Column.SOLARIZE: 1},
}


def one_step(steps: dict[Column, float], num_views: int = 1) -> Tensor:
    """(num_views, len(Column)) parameters that leave all alone but what ``steps`` says."""
    params = torch.zeros(num_views, len(Column))
    for column, value in {**NEUTRAL, **steps}.items():
        params[:, column] = value
    return params


def random_cases(seed: int, count: int, longest: int) -> Iterator[tuple[np.ndarray, Tensor, ViewsConfig]]:
    """Pixels (h, w, 3) with sides of 1 to ``longest``, most of them short, and the draws of their views.

    Views of 1 to 224 pixels, of odd sizes; strengths beyond 1, any rotation, blurs of several pixels.
    """
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = (1 + int(longest ** rng.random(2)[0] - 1) for _ in range(2))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if index % 2:  # large areas of one colour, among them black, white and gray
            pixels = (pixels // 129 * 255).repeat(5, axis=0).repeat(7, axis=1)[:height, :width]
        config = ViewsConfig(
            global_size=int(rng.choice([1, 2, 3, 6, 16, 33, 96, 224])),
            local_size=int(rng.choice([3, 15, 17, 65])),
            num_local=3,
            rotate=float(rng.choice([0, 0, 30, 180])),
            jitter_strength=(float(rng.choice([0.4, 1.5])), 0.4, float(rng.choice([0.2, 2])), rng.choice([0.1, 0.5])),
            solarize=0.5,
        )
        params = sample_params(seed, 0, index, config, (width, height))
        params[:, Column.BLUR] *= float(rng.choice([1, 1, 4]))
        yield pixels, params, config

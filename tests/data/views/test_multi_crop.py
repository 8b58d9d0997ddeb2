"""The kernels' views beside Pillow's, which they follow but for the inner roundings of the blur."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data import views
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.views.fast import turns_of
from fastdino.data.views.params import Column, crop_boxes
from fastdino_kernels.views import multi_crop as module
from fastdino_kernels.views.multi_crop import multi_crop_reference

MEAN, WORST = 0.25, 1.0  # gray levels over all views, and in any


def test_columns_are_those_of_the_parameters() -> None:
    names = {name: value for name, value in Column.__members__.items() if value > Column.HEIGHT}
    assert {name: int(getattr(module, name)) for name in names} == {name: int(value) for name, value in names.items()}
    assert int(module.NUM_COLUMNS) == len(Column)


@pytest.mark.parametrize(
    ("change", "mean", "worst"),
    [
        ({}, MEAN, WORST),
        ({"rotate": 30.0}, MEAN, WORST),
        ({"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}, 0.001, 0.005),
        ({"jitter": 1.0, "blur": (0.0, 0.0, 0.0)}, 0.01, 0.05),
    ],
    ids=["DINO v1", "rotated", "crop alone", "colours alone"],
)
def test_views_are_those_of_the_reference(change: dict[str, float], mean: float, worst: float) -> None:
    config = dataclasses.replace(ViewsConfig(), **change)
    off = []
    for index, image in enumerate(photographs(12)):
        height, width = image.shape[:2]
        params = views.sample_params(0, 0, index, config, (width, height))
        boxes, turns = crop_boxes(params, (width, height)), torch.from_numpy(turns_of(params)).float()
        source = torch.from_numpy(image.reshape(-1)), torch.zeros(1, dtype=torch.int64), torch.tensor([width]).int()
        want, first = views.apply(image, params, config), 0
        for name, (count, size) in views.groups(config).items():
            of = slice(first, first + count)
            tables = (x[of][None] for x in (torch.from_numpy(boxes), params, turns))
            made = multi_crop_reference(*source, *tables, size)[:, 0]
            off.append((made.float() - want[name].float()).abs().mean((1, 2, 3)))
            first += count
    found = torch.cat(off)
    assert len(found) == 12 * config.num_views
    assert found.mean() <= mean
    assert found.max() <= worst


def photographs(count: int) -> list[np.ndarray]:
    """Rendered objects, enlarged, with grain, of several sizes."""
    rng, source = np.random.default_rng(0), ShapesSource(num_images=count, image_size=64)
    found = []
    for index in range(count):
        image = torch.from_numpy(source.read(index)[0]).permute(2, 0, 1)[None].float()
        height, width = (375, 500) if index % 2 else (333, 250 + 20 * index)
        large: Tensor = torch.nn.functional.interpolate(image, (height, width), mode="bicubic")[0].permute(1, 2, 0)
        found.append(np.clip(large.numpy() + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8))
    return found

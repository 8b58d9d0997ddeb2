"""Views of images of any number of channels: each channel becomes what it is as a part of RGB."""

import numpy as np
import pytest
import torch

from fastdino.config import ConfigError, ViewsConfig
from fastdino.data.views import apply, center_view, implementation, normalize, reference, sample_params
from tests.data.pictures import photo
from tests.data.views.cases import random_cases

ALIKE = ViewsConfig(
    global_size=64,
    local_size=31,
    num_local=3,
    jitter=0.0,
    grayscale=0.0,
    rotate=40.0,
    blur=(1.0, 0.5, 0.5),
    solarize=1.0,
)
"""Steps that are the same for each channel, all of them taken."""


def wide(image: np.ndarray, channels: int) -> np.ndarray:
    """(h, w, channels): those of RGB by turns, mirrored and inverted so that no two are equal."""
    rgb = [image[..., c % 3] for c in range(channels)]
    return np.stack([(band if c < 3 else 255 - band if c < 6 else band // 2 + c) for c, band in enumerate(rgb)], axis=2)


@pytest.mark.parametrize("size", [(500, 375), (61, 97), (40, 700)], ids=str)
def test_three_channels_apart_are_those_of_rgb(size):
    for index in range(6):
        image = np.asarray(photo(*size, seed=index))
        params = sample_params(0, 0, index, ALIKE, size)
        whole = apply(image, params, ALIKE)
        for c in range(3):
            alone = apply(image[..., c : c + 1], params, ALIKE)
            for name, views in whole.items():
                assert alone[name].shape[1] == 1
                assert torch.equal(alone[name][:, 0], views[:, c])


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13, 31])
def test_each_channel_becomes_what_it_is_alone(channels):
    image = wide(np.asarray(photo(90, 70)), channels)
    params = sample_params(3, 0, 0, ALIKE, (90, 70))
    whole = apply(image, params, ALIKE)
    assert whole["global"].shape == (2, channels, 64, 64)
    assert whole["local"].shape == (3, channels, 31, 31)
    for c in range(channels):
        alone = apply(image[..., c : c + 1], params, ALIKE)
        for name, views in whole.items():
            assert torch.equal(alone[name][:, 0], views[:, c])


def test_any_size_of_image_and_view():
    """Sides of 1 pixel and more, strong blurs, any rotation."""
    for pixels, params, config in random_cases(5, 40, 90):
        neutral = params.clone()
        neutral[:, 7:10], neutral[:, 10:12] = 1, 0  # the factors of jitter; hue and grayscale
        whole, four = apply(pixels, neutral, config), apply(wide(pixels, 4), neutral, config)
        for name, views in whole.items():
            assert torch.equal(four[name][:, :3], views)


@pytest.mark.parametrize("size", [(500, 375), (97, 61), (20, 400)], ids=str)
def test_the_center_of_each_channel_is_that_of_rgb(size):
    image = np.asarray(photo(*size))
    whole, five = center_view(image, 48), center_view(wide(image, 5), 48)
    assert five.shape == (5, 48, 48)
    assert torch.equal(five[:3], whole)
    assert torch.equal(center_view(image[..., :1], 48)[0], whole[0])


def test_each_channel_is_normalised_by_itself():
    views = torch.randint(256, (2, 3, 5, 8, 8), dtype=torch.uint8)
    found = normalize(views, "image")
    assert torch.equal(found[:, :, 2:5], normalize(views[:, :, 2:5], "image"))
    assert found.shape == views.shape


def test_the_fast_views_are_of_three_channels():
    write, said = implementation("auto", 4)
    assert write is reference.write
    assert said == "reference, because fast cannot be used: it makes views of 3 channels, and data.channels=4"
    assert implementation("reference", 4) == (reference.write, "reference")
    with pytest.raises(
        ConfigError, match=r"data\.views='fast' cannot be used: .*data\.channels=4\. Set data\.views=auto"
    ):
        implementation("fast", 4)

"""The evaluation's view and the normalisation against torchvision's."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode

from fastdino.data.views import center_view, normalize
from tests.data.pictures import photo


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (257, 1000), (90, 60)], ids=str)
@pytest.mark.parametrize("side", [224, 48])
def test_center_view_is_dino_v1s_evaluation_transform(size, side):
    image = photo(*size)
    short = {224: 256, 48: 55}[side]
    width, height = T.Resize(short)(image).size
    resized = F.resize(image, [image.height, width], InterpolationMode.BICUBIC)  # Pillow 13 may go the other way first
    resized = F.resize(resized, [height, width], InterpolationMode.BICUBIC)
    assert torch.equal(center_view(np.asarray(image), side), F.pil_to_tensor(F.center_crop(resized, side)))


def test_a_crop_of_1_shows_the_whole_of_a_square():
    image = photo(90, 90)
    whole = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(center_view(np.asarray(image), 32, crop=1.0), F.pil_to_tensor(whole))
    middle = F.center_crop(image.resize((64, 64), Image.Resampling.BICUBIC), 32)
    assert torch.equal(center_view(np.asarray(image), 32, crop=0.5), F.pil_to_tensor(middle))


@pytest.mark.parametrize("size", [(20000, 3), (3, 20000), (5000, 500), (20001, 3)], ids=str)
def test_extreme_shapes_are_not_resized_whole(size, monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *rest: sizes.append(to) or resize(image, to, *rest))
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    line = ramp[None] if size[0] > size[1] else ramp[:, None]
    view = center_view(np.repeat(np.broadcast_to(line, size[::-1])[..., None], 3, axis=2), 224)
    assert view.shape == (3, 224, 224)
    assert abs(int(view[0, 112, 112]) - 127) <= 1, "the middle is shown"
    assert max(max(to) for to in sizes) <= 9 * 256


def test_imagenet_normalisation_is_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    want = F.normalize(pixels.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    got = normalize(pixels, "imagenet")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert torch.equal(pixels, before)
    assert torch.equal(normalize(pixels[0, 0], "imagenet"), got[0, 0])


def test_image_normalisation_standardises_each_channel_of_each_view():
    pixels = torch.randint(0, 256, (2, 5, 3, 16, 16), dtype=torch.uint8)
    pixels[0, 0, 1] = 77
    got = normalize(pixels, "image")
    assert got.dtype == torch.float32
    assert got.mean((-2, -1)).abs().max() < 1e-5
    deviation = got.std((-2, -1), correction=0)
    assert deviation[0, 0, 1] == 0
    deviation[0, 0, 1] = 1
    assert (deviation - 1).abs().max() < 0.03
    faint = torch.tensor([100, 101], dtype=torch.uint8).repeat(1, 3, 4, 2)
    assert normalize(faint, "image").abs().max() < 0.5, "rounding noise is not blown up"
    brighter = (pixels[1] // 2 + 60).to(torch.uint8)  # gain and offset go away
    assert (normalize(brighter, "image") - got[1]).abs().mean() < 0.05

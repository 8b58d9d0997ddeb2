"""DINO v1's views by torchvision v2, in the ways that a user may write them, and by kornia."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastdino.config import ViewsConfig
from fastdino.data.views.params import JITTER, JITTER_ORDERS, SOLARIZE_THRESHOLD, Column, groups

BICUBIC = v2.InterpolationMode.BICUBIC
BLUR_RADIUS = (0.1, 2.0)
BLUR_KERNEL = 9  # pixels, where torchvision blurs tensors: DINOv2's
BATCHES = 10**6  # of a loader: more than anyone takes

Transform = Callable[[Image.Image | Tensor], list[Tensor]]
"""An image to its views, (3, size, size) uint8 each."""


def read_pil(path: Path) -> Image.Image:
    """As torchvision's ImageFolder reads."""
    with path.open("rb") as file:
        return Image.open(file).convert("RGB")


def read_tensor(path: Path) -> Tensor:
    """(3, h, w) uint8, which Pillow never sees."""
    return decode_image(str(path), ImageReadMode.RGB)


def multi_crop(config: ViewsConfig, *, tensors: bool) -> Transform:
    """Random transforms on Pillow images, with Pillow's blur as in DINO's code, or on tensors, with torchvision's."""
    blur = v2.GaussianBlur(BLUR_KERNEL, BLUR_RADIUS) if tensors else v2.Lambda(_pillow_blur)
    kinds = [
        (config.global_size, config.global_scale, config.blur[0], 0.0),
        (config.global_size, config.global_scale, config.blur[1], config.solarize),
        (config.local_size, config.local_scale, config.blur[2], 0.0),
    ]
    pipelines = [
        v2.Compose([
            v2.RandomResizedCrop(size, scale, interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(config.flip),
            v2.RandomApply([v2.ColorJitter(*config.jitter_strength)], config.jitter),
            v2.RandomGrayscale(config.grayscale),
            v2.RandomApply([blur], blurred),
            v2.RandomSolarize(SOLARIZE_THRESHOLD, solarized),
            *([] if tensors else [v2.PILToTensor()]),
        ])
        for size, scale, blurred, solarized in kinds
    ]  # fmt: skip
    views = [pipelines[0], pipelines[1], *[pipelines[2]] * config.num_local]
    return lambda image: [view(image) for view in views]


def _pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_RADIUS)))


def same_draws(image: Image.Image, params: Tensor, config: ViewsConfig) -> list[Tensor]:
    """The views that our ``params`` describe, by torchvision's functions on Pillow images: the same pixels as ours.

    Each pass of the resizing is a call of its own, because Pillow 13 changes the order of two.
    """
    sizes = [config.global_size] * 2 + [config.local_size] * config.num_local
    return [_view(image, row, size) for row, size in zip(params.tolist(), sizes, strict=True)]


def _view(image: Image.Image, row: list[float], size: int) -> Tensor:
    left, top, width, height = (round(row[i] * side) for i, side in enumerate(image.size * 2))
    view = F.resize(F.crop(image, top, left, height, width), [height, size], BICUBIC)
    view = F.resize(view, [size, size], BICUBIC)
    if row[Column.FLIP]:
        view = F.horizontal_flip(view)
    view = _recoloured(view, row)
    if row[Column.BLUR]:
        view = view.filter(ImageFilter.GaussianBlur(row[Column.BLUR]))
    if row[Column.SOLARIZE]:
        view = F.solarize(view, SOLARIZE_THRESHOLD)
    return F.pil_to_tensor(view)


def _recoloured(view: Any, row: list[float]) -> Any:
    """An image of Pillow's, or a tensor."""
    adjust = dict(zip(JITTER, (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue), strict=True))
    for column in JITTER_ORDERS[int(row[Column.ORDER])]:
        if row[column] != (0 if column is Column.HUE else 1):
            view = adjust[column](view, row[column])
    return F.rgb_to_grayscale(view, num_output_channels=3) if row[Column.GRAYSCALE] else view


def torchvision_views(pixels: Tensor, boxes: Tensor, params: Tensor, config: ViewsConfig) -> list[Tensor]:
    """The views that our draws describe, of a batch of images (B, h, w, 3) where they lie: (V, B, 3, size, size) each.

    View by view, since no two are cropped alike; antialiased, and blurred by a Gaussian of 13 taps.
    """
    images, made, first = pixels.permute(0, 3, 1, 2), [], 0
    every_box, every_row = boxes.tolist(), params.tolist()
    for count, size in groups(config).values():
        views = [
            [
                _tensor_view(image, drawn[v], row[v], size)
                for image, drawn, row in zip(images, every_box, every_row, strict=True)
            ]
            for v in range(first, first + count)
        ]
        made.append(torch.stack([torch.stack(of_images) for of_images in views]))
        first += count
    return made


def _tensor_view(image: Tensor, box: list[int], row: list[float], size: int) -> Tensor:
    left, top, width, height = box
    view = F.resized_crop(image, top, left, height, width, [size, size], BICUBIC, antialias=True)
    if row[Column.FLIP]:
        view = F.horizontal_flip(view)
    view = _recoloured(view, row)
    if row[Column.BLUR]:
        view = F.gaussian_blur(view, [13, 13], [row[Column.BLUR]] * 2)
    return F.solarize(view, SOLARIZE_THRESHOLD) if row[Column.SOLARIZE] else view


def kornia_views(pixels: Tensor, boxes: Tensor, params: Tensor, config: ViewsConfig) -> list[Tensor]:
    """As :func:`torchvision_views`, a view of all images at once, not antialiased and with the jitter in one order."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_hue,
        adjust_saturation_with_gray_subtraction,
    )
    from kornia.filters import gaussian_blur2d
    from kornia.geometry.transform import crop_and_resize

    images, made, first = pixels.permute(0, 3, 1, 2).float().div_(255), [], 0
    left, top, right, bottom = (
        boxes[..., 0],
        boxes[..., 1],
        boxes[..., 0] + boxes[..., 2],
        boxes[..., 1] + boxes[..., 3],
    )
    corners = [(left, top), (right - 1, top), (right - 1, bottom - 1), (left, bottom - 1)]
    points = torch.stack([torch.stack(corner, -1) for corner in corners], -2).float()  # (B, V, 4, 2)
    for count, size in groups(config).values():
        views = images.new_empty((count, len(images), 3, size, size), dtype=torch.uint8)
        for v in range(count):
            row = params[:, first + v].float().T
            x = crop_and_resize(images, points[:, first + v], (size, size), mode="bicubic").clamp_(0, 1)

            def where(column: Column, changed: Tensor, x: Tensor, row: Tensor = row) -> Tensor:
                return torch.where(row[column].bool()[:, None, None, None], changed, x)

            x = where(Column.FLIP, x.flip(-1), x)
            x = adjust_brightness_accumulative(x, row[Column.BRIGHTNESS])
            x = adjust_contrast_with_mean_subtraction(x, row[Column.CONTRAST])
            x = adjust_saturation_with_gray_subtraction(x, row[Column.SATURATION])
            x = adjust_hue(x, 2 * torch.pi * row[Column.HUE])
            x = where(Column.GRAYSCALE, F.rgb_to_grayscale(x, num_output_channels=3), x)
            deviation = row[Column.BLUR].clamp_min(0.1)[:, None].expand(-1, 2)
            x = where(Column.BLUR, gaussian_blur2d(x, (13, 13), deviation), x)
            views[v] = where(Column.SOLARIZE, torch.where(x < 0.5, x, 1 - x), x).mul(255).round_()
        made.append(views)
        first += count
    return made


class _Files(Dataset[list[Tensor]]):
    def __init__(self, paths: list[Path], config: ViewsConfig) -> None:
        self.paths, self.transform = paths, multi_crop(config, tensors=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(read_pil(self.paths[index]))


def loader(paths: list[Path], config: ViewsConfig, batch: int, workers: int) -> "DataLoader[list[Tensor]]":
    """Batches of random images, without end for our purposes: a list of (batch, 3, size, size) for each view."""
    dataset = _Files(paths, config)
    order = RandomSampler(dataset, replacement=True, num_samples=BATCHES * batch)
    context = "fork" if workers else None  # as ours, so that lambdas reach the workers
    return DataLoader(dataset, batch, sampler=order, num_workers=workers, multiprocessing_context=context)


def seed_all(seed: int) -> None:
    """Of the random numbers that torchvision's transforms and Pillow's blur take."""
    random.seed(seed)
    torch.manual_seed(seed)

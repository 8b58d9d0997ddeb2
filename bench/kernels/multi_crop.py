"""multi_crop: 2 views of 224 and 8 of 96 pixels of each decoded image, drawn as DINO v1 draws them.

All images are equally large and the colours are jittered in one order, since a batched library has no other.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import Bench, Function, Shape
from bench.peers import views as peers
from fastdino.config import ViewsConfig
from fastdino.data.views import Column, sample_params_of_many
from fastdino.data.views.params import crop_boxes, groups
from fastdino_kernels.views.multi_crop import multi_crop, multi_crop_reference

VIEWS = ViewsConfig()
COARSE = 25  # pixels of a spot of colour
BLOCK = 16  # pixels whose mean is judged: peers blur and resize otherwise, and a hue turns a byte here and there


class Inputs(NamedTuple):
    pixels: Tensor  # uint8 (B, H, W, 3)
    boxes: Tensor  # int32 (B, V, 4)
    params: Tensor  # fp32 (B, V, 14)


def _make(shape: Shape, seed: int) -> Inputs:
    B, width, height = shape.sizes
    random = shape.random(seed)
    spots = random(B, 3, height // COARSE, width // COARSE)
    colours = F.interpolate(spots, (height, width), mode="bilinear") + 0.2 * random(B, 3, height, width)
    pixels = (128 + 64 * colours).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    params = sample_params_of_many(0, seed, range(B), VIEWS, [(width, height)] * B)
    params[..., Column.ORDER] = 0
    boxes = torch.stack([torch.from_numpy(crop_boxes(drawn, (width, height))) for drawn in params])
    return Inputs(pixels, boxes.to(shape.device), params.to(shape.device))


def _bytes(shape: Shape) -> int:
    """Every pixel of the images is read, every one of the views is written."""
    B, width, height = shape.sizes
    return 3 * B * (width * height + sum(count * side**2 for count, side in groups(VIEWS).values()))


def _both_sizes(function: Function, pixels: Tensor, boxes: Tensor, params: Tensor) -> list[Tensor]:
    B, height, width, _ = pixels.shape
    starts = torch.arange(B, device=pixels.device) * (3 * height * width)
    widths = torch.full((B,), width, dtype=torch.int32, device=pixels.device)
    made, first = [], 0
    for count, side in groups(VIEWS).values():
        of = slice(first, first + count)
        made.append(function(pixels.view(-1), starts, widths, boxes[:, of], params[:, of], None, side))
        first += count
    return made


def _judge(inputs: Inputs, results: list[Tensor]) -> list[Tensor]:
    """Means of small squares."""
    squares = [F.avg_pool2d(views.flatten(0, 2).float()[:, None], BLOCK) for views in results]
    return [means.to(torch.bfloat16) for means in squares]


BENCH = Bench(
    name="multi_crop",
    # B, width, height
    shapes={"cuda": ["256,500,375"], "cpu": ["2,250,188"]},
    make=_make,
    bytes=_bytes,
    ours=partial(_both_sizes, multi_crop),
    reference=partial(_both_sizes, multi_crop_reference),
    others=lambda shape: {
        "torchvision v2": lambda pixels, boxes, params: peers.torchvision_views(pixels, boxes, params, VIEWS),
        "kornia": lambda pixels, boxes, params: peers.kornia_views(pixels, boxes, params, VIEWS),
    },
    compiled=lambda shape: None,
    judge=_judge,
    rounds=12,  # the reference and torchvision make one view after another
)

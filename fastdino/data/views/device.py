"""Decoded images, and what is drawn for their views, become the views of a batch on the device."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.config import ViewsConfig
from fastdino.data.views.evaluation import imagenet
from fastdino.data.views.fast import turns_of
from fastdino.data.views.params import Column, crop_boxes, groups
from fastdino.data.views.reference import resize
from fastdino_kernels import multi_crop

_ALIGNED = 16  # bytes: where an image begins


def aligned(position: int) -> int:
    """The first place from ``position`` on where an image may begin."""
    return -(-position // _ALIGNED) * _ALIGNED


def fields(config: ViewsConfig, images: int, room: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of a batch: ``pixels`` with ``room`` bytes for each image; where each starts and ends; its width;
    whether it was reduced; and of each view the crop box, the parameters and, if views rotate, the turn."""
    of_views = images, config.num_views
    turns = {"turns": ((*of_views, 2), torch.float32)} if config.rotate else {}
    return {
        "pixels": ((images * room,), torch.uint8),
        "starts": ((images,), torch.int64),
        "ends": ((images,), torch.int64),
        "widths": ((images,), torch.int32),
        "reduced": ((images,), torch.bool),
        "boxes": ((*of_views, 4), torch.int32),
        "params": ((*of_views, len(Column)), torch.float32),
        **turns,
    }


def enter_draws(out: dict[str, Tensor], place: int, params: Tensor, image: np.ndarray) -> None:
    """Writes what is drawn for the views of one image, ``params`` (views, columns)."""
    out["params"][place] = params
    out["boxes"][place] = torch.from_numpy(crop_boxes(params, (image.shape[1], image.shape[0])))
    if "turns" in out:
        out["turns"][place] = torch.from_numpy(turns_of(params))


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """``image`` (h, w, 3) at ``side`` pixels of its longer side, bicubic and antialiased."""
    height, width = image.shape[:2]
    sizes = (max(1, round(length * side / max(height, width))) for length in (width, height))
    return np.asarray(resize(Image.fromarray(image), *sizes))


def upload(made: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies on ``device`` of what :func:`make_views` takes. Of ``pixels`` those of images alone, in few pieces.

    From page-locked memory the copies do not wait. ``made`` is for nothing else then: it has the new places of images.
    """
    place, places, pieces = 0, list[int](), list[list[int]]()  # a piece: start, end, and its place on the device
    for start, end in zip(made["starts"].tolist(), made["ends"].tolist(), strict=True):
        if not pieces or start != aligned(pieces[-1][1]):
            pieces.append([start, end, place])
        pieces[-1][1] = end
        places.append(place)
        place = aligned(place + end - start)
    pixels = torch.empty(place, dtype=torch.uint8, device=device)
    for start, end, to in pieces:
        pixels[to : to + end - start].copy_(made["pixels"][start:end], non_blocking=True)
    made["starts"].copy_(torch.tensor(places))
    rest = {name: x for name, x in made.items() if name not in ("pixels", "ends", "reduced")}
    return {"pixels": pixels, **{name: x.to(device, non_blocking=True, copy=True) for name, x in rest.items()}}


def make_views(tensors: dict[str, Tensor], config: ViewsConfig, patch: int = 0) -> dict[str, Tensor]:
    """The views, by size as in Batch, of images and draws where they lie.

    With ``patch`` they are what a ViT of this patch size reads in bf16, normalised for ImageNet: patches, of which
    neither planes of bytes nor of floats are ever written.
    """
    normal = imagenet(tensors["pixels"].device) if patch else None
    pixels, starts, widths = (tensors[name] for name in ("pixels", "starts", "widths"))
    boxes, params, turns = tensors["boxes"], tensors["params"], tensors.get("turns")
    made, first = {}, 0
    for name, (count, size) in groups(config).items():
        of = slice(first, first + count)
        turn = None if turns is None else turns[:, of]
        views = multi_crop(pixels, starts, widths, boxes[:, of], params[:, of], turn, size, patch=patch, normal=normal)
        made[name] = views.flatten(2, 3) if patch else views
        first += count
    return made

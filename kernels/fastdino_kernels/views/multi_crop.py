"""Decoded images become views: cropped, resized, recoloured and blurred in a few launches."""

import math
from itertools import permutations

import torch
import triton
from torch import Tensor

from fastdino_kernels._backend import operator, use_triton
from fastdino_kernels.views._blur import MARGIN, _blur_kernel
from fastdino_kernels.views._crop import _crop_kernel
from fastdino_kernels.views._rotate import _rotate_kernel
from fastdino_kernels.views._steps import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    NUM_COLUMNS,
    ORDER,
    ROTATE,
    SATURATION,
    SOLARIZE,
    _colour_kernel,
)

_ORDERS = tuple(permutations(range(BRIGHTNESS, HUE + 1)))


def multi_crop(
    pixels: Tensor,
    starts: Tensor,
    widths: Tensor,
    boxes: Tensor,
    params: Tensor,
    turns: Tensor | None,
    size: int,
    *,
    patch: int = 0,
    normal: Tensor | None = None,
) -> Tensor:
    """V views of ``size`` x ``size`` pixels of each of B decoded images.

    Args:
        pixels: (bytes,) uint8: the images anywhere in it, each (height, width, 3), red first, row after row, of less
            than 2^31 bytes.
        starts: (B,) int64: where in ``pixels`` each image begins.
        widths: (B,) int32: pixels in a row of each.
        boxes: (B, V, 4) int32: left, top, width, height in pixels of what a view shows, within its image.
        params: (B, V, 14) fp32. Columns 0 to 3 are not read. Then, in the order in which they act: flip (1: mirror left
            and right), rotation (0: none, else by ``turns``), order (index into the permutations of the next four, in
            lexicographic order), factors of brightness, contrast and saturation (1: none), shift of the hue (share of
            the colour circle; 0: none), grayscale (1: replace the colours by their luma), deviation of the blur in
            pixels (at most 2.4; 0: none), solarize (1: invert what is 128 or brighter).
        turns: (B, V, 2) fp32: cosine and sine of the rotation, counter-clockwise about the view's center. None: no view
            is rotated, whatever ``params`` say, which saves a launch.
        size: side of a view.
        patch: side of the patches of which a view is made, 0 for planes; it divides ``size``.
        normal: (2, 3) fp32, scale and shift of each channel: of each byte the result has byte * scale + shift, in bf16.

    Returns (V, B, 3, size, size) uint8, or of patches (V, B, rows, columns, 3 * patch^2), each as in a convolution's
    weight: channel, row, column. The arithmetic follows Pillow's, with a byte after every step (all but the inner
    roundings of the blur): DINO v1's views are met within 0.25 gray levels on average, within 1.0 in any view.
    Values are not checked: that would wait for the device.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: the transforms of Caron et al. 2021, appendix A, as torchvision computes them on Pillow images.
    """
    tables = {"starts": starts, "widths": widths, "boxes": boxes, "params": params, "turns": turns, "normal": normal}
    _check(pixels, {name: x for name, x in tables.items() if x is not None}, size, patch)
    own = (None if x is None else x.contiguous() for x in tables.values())
    return multi_crop_forward(pixels, *own, size, patch)


def _check(pixels: Tensor, tables: dict[str, Tensor], size: int, patch: int) -> None:
    B, V = tables["boxes"].shape[:2] if tables["boxes"].dim() == 3 else (0, 0)
    expected = {
        "starts": ((B,), torch.int64),
        "widths": ((B,), torch.int32),
        "boxes": ((B, V, 4), torch.int32),
        "params": ((B, V, NUM_COLUMNS), torch.float32),
        "turns": ((B, V, 2), torch.float32),
        "normal": ((2, 3), torch.float32),
    }
    if pixels.dim() != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(f"expected pixels (bytes,) uint8, contiguous; got {tuple(pixels.shape)} {pixels.dtype}")
    for name, x in tables.items():
        shape, dtype = expected[name]
        if x.shape != shape or x.dtype != dtype or x.device != pixels.device or not x.numel():
            raise ValueError(
                f"expected {name} {shape} {dtype} on {pixels.device}, of at least one view; "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if size < 1 or patch < 0 or (patch and size % patch):
        raise ValueError(f"expected size >= 1, and a patch that divides it, or 0; got {size} and {patch}")


def multi_crop_reference(
    pixels: Tensor,
    starts: Tensor,
    widths: Tensor,
    boxes: Tensor,
    params: Tensor,
    turns: Tensor | None,
    size: int,
    *,
    patch: int = 0,
    normal: Tensor | None = None,
) -> Tensor:
    """:func:`multi_crop` in plain torch, a view at a time: the definition, and the CPU path."""
    views = pixels.new_empty((boxes.shape[1], len(boxes), 3, size, size))
    for b, (start, image_width) in enumerate(zip(starts.tolist(), widths.tolist(), strict=True)):
        for v, (left, top, width, height) in enumerate(boxes[b].tolist()):
            first = start + 3 * image_width * top
            rows = pixels[first : first + 3 * image_width * height].view(height, image_width, 3)
            crop = rows[:, left : left + width].permute(2, 0, 1).float()
            views[v, b] = _view(crop, params[b, v].tolist(), None if turns is None else turns[b, v], size)
    if normal is not None:
        scale, shift = normal.view(2, 3, 1, 1)
        views = (views * scale + shift).to(torch.bfloat16)
    if patch:
        tiles = views.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (V, B, 3, rows, patch, columns, patch)
        views = tiles.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3)
    return views


def _view(crop: Tensor, param: list[float], turn: Tensor | None, size: int) -> Tensor:
    """One view, (3, size, size), of the pixels in its box; fp32, with a byte's values after every step."""
    across, down = (_resize_weights(side, size, crop.device) for side in (crop.shape[2], crop.shape[1]))
    x = _round(down @ _round(crop @ across.T))
    x = x.flip(-1) if param[FLIP] else x
    x = _rotated(x, *turn) if turn is not None and param[ROTATE] else x
    for step in _ORDERS[int(param[ORDER])]:
        if step == BRIGHTNESS:
            x = _blend(torch.zeros_like(x), x, param[step])
        elif step == CONTRAST and param[step] != 1:
            x = _blend(torch.floor(_luma(x).double().mean() + 0.5).float(), x, param[step])
        elif step == SATURATION:
            x = _blend(_luma(x), x, param[step])
        elif step == HUE and param[step]:
            x = _hue_shifted(x, int(param[step] * 255))
    x = _luma(x).expand(3, -1, -1) if param[GRAYSCALE] else x
    x = _blurred(x, param[BLUR]) if param[BLUR] else x
    return torch.where(x < 128, x, 255 - x) if param[SOLARIZE] else x


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


def _resize_weights(count: int, size: int, device: torch.device) -> Tensor:
    """(size, count) weights of an antialiased resize: the kernel (Keys 1981, a = -1/2) as wide as a view's pixel."""
    scale = count / size
    center = (torch.arange(size, device=device) + 0.5) * scale
    t = (torch.arange(count, device=device) + 0.5 - center[:, None]).abs() / max(scale, 1)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Bilinear, of the view continued by its mirror image: out(p) = in(R p), R the rotation about the center."""
    size = x.shape[-1]
    offset = torch.arange(size, device=x.device) - (size - 1) / 2
    row, column = offset[:, None], offset
    from_x, from_y = cosine * column - sine * row + (size - 1) / 2, sine * column + cosine * row + (size - 1) / 2
    left, top = from_x.floor(), from_y.floor()

    def mirrored(i: Tensor) -> Tensor:
        return (size - 1 - (size - 1 - i.long().abs()).abs()).clamp_min(0)

    x0, x1, y0, y1 = (mirrored(i) for i in (left, left + 1, top, top + 1))
    above, below = (x[:, y, x0] + (x[:, y, x1] - x[:, y, x0]) * (from_x - left) for y in (y0, y1))
    return (above + (below - above) * (from_y - top)).floor()


def _luma(x: Tensor) -> Tensor:
    """(1, h, w) ITU-R 601-2, of which every term is exact in fp32."""
    red, green, blue = x.split(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) / 0x10000).floor()


def _blend(to: Tensor, x: Tensor, factor: float) -> Tensor:
    """Pillow's, which truncates."""
    return (to + factor * (x - to)).clamp(0, 255).floor()


def _hue_shifted(x: Tensor, shift: int) -> Tensor:
    """By way of HSV bytes: hue = floor(255 turns), saturation = floor(255 chroma / value), as in Python's colorsys.

    Both are quotients of integers, which lie on a whole number or at least 1 / 510 below the next: a rounding of fp32
    must not take one off.
    """
    red, green, blue = x.unbind()
    value = x.amax(0)
    chroma = value - x.amin(0)
    sixths = torch.where(
        red == value, green - blue, torch.where(green == value, blue - red, red - green)
    ) / chroma.clamp_min(1) + torch.where(red == value, 0, torch.where(green == value, 2, 4))
    hue = (42.5 * torch.where(sixths < 0, sixths + 6, sixths) + 5e-4).floor()
    saturation = (255 * chroma / value.clamp_min(1) + 5e-4).floor()
    six = 6 * (hue + shift).remainder(256)
    sector = (six / 255).floor()
    f, s = (six - 255 * sector) / 255, saturation / 255
    p = (value * (1 - s) + 0.5).floor()
    m = (value * (1 - s * torch.where(sector % 2 == 1, f, 1 - f)) + 0.5).floor()
    k = sector % 6

    def channel(at_value: tuple[int, int], at_m: tuple[int, int]) -> Tensor:
        is_value, is_m = ((k == one) | (k == other) for one, other in (at_value, at_m))
        return torch.where(is_value, value, torch.where(is_m, m, p))

    return torch.stack([channel((0, 5), (1, 4)), channel((1, 2), (0, 3)), channel((3, 4), (2, 5))])


def _blurred(x: Tensor, deviation: float) -> Tensor:
    """Pillow's Gaussian blur: a box three times across and three times down; here without roundings in between."""
    # By products, as the resize: a convolution in fp32 cuDNN may make in TF32, and move many bytes by one.
    size, device = x.shape[-1], x.device
    reads = (torch.arange(size, device=device)[:, None] + torch.arange(-2, 3, device=device)).clamp(0, size - 1)
    box = torch.tensor(_box_filter(deviation), device=device) @ torch.eye(size, device=device)[reads]
    thrice = torch.linalg.matrix_power(box, 3)
    return _round(thrice @ x @ thrice.T)


def _box_filter(deviation: float) -> list[float]:
    """Five weights: a box, with fractions at its ends, whose third power has a Gaussian's variance.

    Source: Gwosdek et al. 2011 (Theoretical Foundations of Gaussian Convolution by Extended Box Filtering), equations
    7, 11 and 14.
    """
    variance = deviation * deviation / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    near = 1 / (2 * (whole + part) + 1)
    far = (1 - (2 * whole + 1) * near) / 2
    return [far, near, near, near, far] if whole else [0, far, near, far, 0]


def launch_config(size: int) -> dict[str, dict[str, int]]:
    """Pixels of a program, and warps.

    A warp makes 16 rows of a product: as many warps as there are rows for, or they would compute the same. In the blur,
    whose products are transposed, it makes 16 of 64 columns.
    """
    tile = {"ROWS": 32, "COLUMNS": 16, "num_warps": 2}
    read = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32}  # of the blur: with 6 pixels around those that are made
    rows = triton.cdiv(size, triton.cdiv(size, read["BLOCK_ROWS"] - 2 * MARGIN.value))  # equally many in each program
    return {
        "crop": {**tile, "CHUNK_ROWS": 32, "CHUNK_COLUMNS": 16},
        "rotate": tile,
        "colour": {"BLOCK": 1024, "num_warps": 4},
        "blur": {"ROWS": rows, "COLUMNS": 16, "STRIP": 112, **read, "num_warps": 4},
    }


@operator()
def multi_crop_forward(
    pixels: Tensor,
    starts: Tensor,
    widths: Tensor,
    boxes: Tensor,
    params: Tensor,
    turns: Tensor | None,
    normal: Tensor | None,
    size: int,
    patch: int,
) -> Tensor:
    """The launches behind :func:`multi_crop`, or its reference: no gradient, so nothing of it needs to be traced."""
    if not use_triton(pixels):
        return multi_crop_reference(pixels, starts, widths, boxes, params, turns, size, patch=patch, normal=normal)
    config, (B, V) = launch_config(size), boxes.shape[:2]
    num_blocks, num_tiles, num_strips = (
        triton.cdiv(size**2, config["colour"]["BLOCK"]),
        triton.cdiv(size, config["crop"]["ROWS"]) * triton.cdiv(size, config["crop"]["COLUMNS"]),
        triton.cdiv(size, config["blur"]["ROWS"]) * triton.cdiv(size, config["blur"]["STRIP"]),
    )
    views = pixels.new_empty(_shape(boxes, size, patch), dtype=torch.uint8 if normal is None else torch.bfloat16)
    work = pixels.new_empty((V, B, 3, size, size))
    raw = work if turns is None else torch.empty_like(work)
    sums = pixels.new_empty((V, B, num_tiles), dtype=torch.int32)  # of luma, by tile
    source, form = (pixels, starts, widths, boxes), {"SIZE": size, "PATCH": patch}
    with torch.cuda.device_of(pixels):
        _crop_kernel[num_tiles, V, B](
            views, work, raw, sums, *source, params, normal, ROTATES=turns is not None, **form, **config["crop"]
        )
        if turns is not None:
            _rotate_kernel[num_tiles, V, B](views, work, raw, sums, params, turns, normal, **form, **config["rotate"])
        _colour_kernel[num_blocks, V, B](views, work, sums, params, normal, TILES=num_tiles, **form, **config["colour"])
        _blur_kernel[num_strips, V, B](views, work, params, normal, **form, **config["blur"])
    return views


@multi_crop_forward.register_fake
def _(
    pixels: Tensor,
    starts: Tensor,
    widths: Tensor,
    boxes: Tensor,
    params: Tensor,
    turns: Tensor | None,
    normal: Tensor | None,
    size: int,
    patch: int,
) -> Tensor:
    return pixels.new_empty(_shape(boxes, size, patch), dtype=torch.uint8 if normal is None else torch.bfloat16)


def _shape(boxes: Tensor, size: int, patch: int) -> tuple[int, ...]:
    """Of the result."""
    of_view = (size // patch, size // patch, 3 * patch**2) if patch else (3, size, size)
    return boxes.shape[1], len(boxes), *of_view

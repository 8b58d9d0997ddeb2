"""Decoded images become views: cropped, resized, recoloured and blurred in a few launches."""

import math
from itertools import permutations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastdino_kernels._backend import operator, use_triton
from fastdino_kernels.views._blur import MARGIN, _blur_kernel
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
    begin_colours,
    end_colours,
    fetch,
    fp16_of_byte,
    jitter,
    place_of_tile,
    put,
    rounded,
    view_of_program,
)  # fmt: skip

MAX_BLUR = 2.4  # pixels of deviation that 13 taps hold
_ORDERS = tuple(permutations(range(BRIGHTNESS, HUE + 1)))


def multi_crop(
    pixels: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, params: Tensor, turns: Tensor | None, size: int
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

    Returns (V, B, 3, size, size) uint8. The arithmetic follows Pillow's, with a byte after every step (all but the
    inner roundings of the blur): DINO v1's views are met within 0.25 gray levels on average, within 1.0 in any view.
    Values are not checked: that would wait for the device.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: the transforms of Caron et al. 2021, appendix A, as torchvision computes them on Pillow images.
    """
    given = {"starts": starts, "widths": widths, "boxes": boxes, "params": params}
    _check(pixels, given if turns is None else {**given, "turns": turns}, size)
    turns = None if turns is None else turns.contiguous()
    tables = (x.contiguous() for x in (starts, widths, boxes, params))
    return multi_crop_forward(pixels, *tables, turns, size)


def _check(pixels: Tensor, tables: dict[str, Tensor], size: int) -> None:
    B, V = tables["boxes"].shape[:2] if tables["boxes"].dim() == 3 else (0, 0)
    expected = {
        "starts": ((B,), torch.int64),
        "widths": ((B,), torch.int32),
        "boxes": ((B, V, 4), torch.int32),
        "params": ((B, V, NUM_COLUMNS), torch.float32),
        "turns": ((B, V, 2), torch.float32),
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
    if size < 1:
        raise ValueError(f"expected size >= 1; got {size}")


def multi_crop_reference(
    pixels: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, params: Tensor, turns: Tensor | None, size: int
) -> Tensor:
    """:func:`multi_crop` in plain torch, a view at a time: the definition, and the CPU path."""
    views = pixels.new_empty((boxes.shape[1], len(boxes), 3, size, size))
    for b, (start, image_width) in enumerate(zip(starts.tolist(), widths.tolist(), strict=True)):
        for v, (left, top, width, height) in enumerate(boxes[b].tolist()):
            first = start + 3 * image_width * top
            rows = pixels[first : first + 3 * image_width * height].view(height, image_width, 3)
            crop = rows[:, left : left + width].permute(2, 0, 1).float()
            views[v, b] = _view(crop, params[b, v].tolist(), None if turns is None else turns[b, v], size)
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
    """Pillow's Gaussian blur: the box of _box_filter three times, here composed and rounded once."""
    box = torch.tensor(_box_filter(deviation), device=x.device)
    taps = box.view(1, 1, -1)
    for _ in range(2):
        taps = F.conv1d(taps, box.view(1, 1, -1), padding=4)
    planes, margin = x[:, None], taps.shape[-1] // 2
    planes = F.conv2d(F.pad(planes, (margin, margin, 0, 0), "replicate"), taps[..., None, :])
    planes = F.conv2d(F.pad(planes, (0, 0, margin, margin), "replicate"), taps[..., None])
    return _round(planes[:, 0])


def _box_filter(deviation: float) -> list[float]:
    """Five weights: the box, with fractions at its ends, whose third power has a Gaussian's variance.

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

    A warp makes 16 rows of a product: as many warps as there are rows for, or they would compute the same.
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
    pixels: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, params: Tensor, turns: Tensor | None, size: int
) -> Tensor:
    """The launches behind :func:`multi_crop`, or its reference: no gradient, so nothing of it needs to be traced."""
    if not use_triton(pixels):
        return multi_crop_reference(pixels, starts, widths, boxes, params, turns, size)
    config, (B, V) = launch_config(size), boxes.shape[:2]
    num_blocks, num_tiles, num_strips = (
        triton.cdiv(size**2, config["colour"]["BLOCK"]),
        triton.cdiv(size, config["crop"]["ROWS"]) * triton.cdiv(size, config["crop"]["COLUMNS"]),
        triton.cdiv(size, config["blur"]["ROWS"]) * triton.cdiv(size, config["blur"]["STRIP"]),
    )
    sums = torch.empty((V, B, num_tiles), dtype=torch.int32, device=pixels.device)  # of luma, by tile
    work, views = (torch.empty((V, B, 3, size, size), dtype=torch.uint8, device=pixels.device) for _ in range(2))
    raw = work if turns is None else torch.empty_like(work)
    source = pixels, starts, widths, boxes, params
    with torch.cuda.device_of(pixels):
        _crop_kernel[num_tiles, V, B](
            views, work, raw, sums, *source, ROTATES=turns is not None, SIZE=size, **config["crop"]
        )
        if turns is not None:
            _rotate_kernel[num_tiles, V, B](views, work, raw, sums, params, turns, SIZE=size, **config["rotate"])
        _colour_kernel[num_blocks, V, B](views, work, sums, params, SIZE=size, TILES=num_tiles, **config["colour"])
        _blur_kernel[num_strips, V, B](views, work, params, SIZE=size, **config["blur"])
    return views


@multi_crop_forward.register_fake
def _(
    pixels: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, params: Tensor, turns: Tensor | None, size: int
) -> Tensor:
    return pixels.new_empty((boxes.shape[1], len(boxes), 3, size, size))


@triton.jit
def _span(first, num, count, scale):
    # Pixels [start, end) of ``count`` in a box that view pixels first, ..., first + num - 1 are made of.
    reach = 2 * tl.maximum(scale, 1.0)
    start = tl.floor((first + 0.5) * scale - reach).to(tl.int32)
    end = tl.ceil((first + num - 0.5) * scale + reach).to(tl.int32)
    return tl.maximum(start, 0), tl.minimum(end, count)


@triton.jit
def _bicubic(pixel, position, scale):
    # Weight of a box's pixel in a view's, up to a factor. Rounded to fp16's 11 bits it moves one byte in 600 by one.
    by_width = 1 / tl.maximum(scale, 1.0)
    t = tl.abs(pixel * by_width - ((position + 0.5) * scale - 0.5) * by_width)
    beyond = tl.maximum(2 - t, 0.0)
    return tl.where(t < 1, (1.5 * t - 2.5) * (t * t) + 1, (0.5 - 0.5 * t) * (beyond * beyond)).to(tl.float16)


@triton.jit
def _by_sum(position, count, scale):
    # 1 / the sum of the weights in each view pixel, one of which in a row the box's edge may cut off.
    reach = 2 * tl.maximum(scale, 1.0)
    first = tl.floor((position + 0.5) * scale - reach).to(tl.int32)
    total = tl.zeros(position.shape, tl.float32)
    for k in range(2 * reach.to(tl.int32) + 3):
        pixel = first + k
        weight = _bicubic(pixel, position, scale).to(tl.float32)
        total += tl.where((pixel >= 0) & (pixel < count), weight, 0.0)
    return 1 / total


@triton.jit
def _channel(pixel_ptr, inside):
    return tl.trans(fp16_of_byte(tl.load(pixel_ptr, mask=inside, other=0)))


@triton.jit
def _crop_kernel(
    views_ptr,
    work_ptr,
    raw_ptr,
    sums_ptr,
    pixels_ptr,
    starts_ptr,
    widths_ptr,
    boxes_ptr,
    params_ptr,
    SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_COLUMNS: tl.constexpr,
):
    # One program: ROWS x COLUMNS pixels of a view, by two products with bands of weights, of CHUNK_ROWS x CHUNK_COLUMNS
    # pixels of the box at a time. Bytes are exact in fp16, the sums are fp32.
    tile = tl.program_id(0)
    param_ptr, view_ptr, own_ptr, view, param = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    b = tl.program_id(2)
    left, top = tl.load(boxes_ptr + param * 4), tl.load(boxes_ptr + param * 4 + 1)
    width, height = tl.load(boxes_ptr + param * 4 + 2), tl.load(boxes_ptr + param * 4 + 3)
    image_width = tl.load(widths_ptr + b)
    crop_ptr = pixels_ptr + tl.load(starts_ptr + b) + (top.to(tl.int64) * image_width + left) * 3
    scale_x, scale_y = width.to(tl.float32) / SIZE, height.to(tl.float32) / SIZE

    first_y, first_x = place_of_tile(tile, SIZE, ROWS, COLUMNS)
    num_y, num_x = tl.minimum(SIZE - first_y, ROWS), tl.minimum(SIZE - first_x, COLUMNS)
    y, x = first_y + tl.arange(0, ROWS), first_x + tl.arange(0, COLUMNS)
    flip = tl.load(param_ptr + FLIP) != 0
    from_y, from_x = tl.minimum(y, SIZE - 1), tl.minimum(x, SIZE - 1)
    from_x = tl.where(flip, SIZE - 1 - from_x, from_x)
    start_y, end_y = _span(first_y, num_y, height, scale_y)
    start_x, end_x = _span(tl.where(flip, SIZE - first_x - num_x, first_x), num_x, width, scale_x)
    by_across, by_down = _by_sum(from_x, width, scale_x)[None, :], _by_sum(from_y, height, scale_y)[:, None]

    red = tl.zeros([ROWS, COLUMNS], tl.float32)
    green = tl.zeros([ROWS, COLUMNS], tl.float32)
    blue = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start_row in range(start_y, end_y, CHUNK_ROWS):
        row = start_row + tl.arange(0, CHUNK_ROWS)
        row_red = tl.zeros([CHUNK_ROWS, COLUMNS], tl.float32)
        row_green = tl.zeros([CHUNK_ROWS, COLUMNS], tl.float32)
        row_blue = tl.zeros([CHUNK_ROWS, COLUMNS], tl.float32)
        for start_column in range(start_x, end_x, CHUNK_COLUMNS):
            column = start_column + tl.arange(0, CHUNK_COLUMNS)
            across = _bicubic(column[:, None], from_x[None, :], scale_x)
            # Columns come first, because neighbouring threads load along the first axis where none is contiguous.
            pixel_ptr = crop_ptr + (row[None, :] * image_width + column[:, None]) * 3
            inside = (row < height)[None, :] & (column < width)[:, None]
            row_red = tl.dot(_channel(pixel_ptr, inside), across, row_red)
            row_green = tl.dot(_channel(pixel_ptr + 1, inside), across, row_green)
            row_blue = tl.dot(_channel(pixel_ptr + 2, inside), across, row_blue)
        down = _bicubic(row[None, :], from_y[:, None], scale_y)
        red = tl.dot(down, rounded(row_red * by_across).to(tl.float16), red)
        green = tl.dot(down, rounded(row_green * by_across).to(tl.float16), green)
        blue = tl.dot(down, rounded(row_blue * by_across).to(tl.float16), blue)
    red, green, blue = rounded(red * by_down), rounded(green * by_down), rounded(blue * by_down)

    i = y[:, None] * SIZE + x[None, :]
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    sum_ptr = sums_ptr + view * tl.num_programs(0) + tile
    if ROTATES:
        if tl.load(param_ptr + ROTATE) != 0:
            put(raw_ptr + view * (3 * SIZE * SIZE), red, green, blue, i, inside, SIZE)
        else:
            begin_colours(view_ptr, own_ptr, sum_ptr, param_ptr, red, green, blue, i, inside, SIZE)
    else:
        begin_colours(view_ptr, own_ptr, sum_ptr, param_ptr, red, green, blue, i, inside, SIZE)


@triton.jit
def _colour_kernel(
    views_ptr, work_ptr, sums_ptr, params_ptr, SIZE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    # One program: BLOCK pixels of a view whose contrast changes, from there on.
    param_ptr, view_ptr, own_ptr, view, _ = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    if tl.load(param_ptr + CONTRAST) != 1:
        tile = tl.arange(0, triton.next_power_of_2(TILES))
        total = tl.sum(tl.load(sums_ptr + view * TILES + tile, mask=tile < TILES, other=0), 0).to(tl.int64)
        mean = ((2 * total + SIZE * SIZE) // (2 * SIZE * SIZE)).to(tl.float32)  # rounded
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < SIZE * SIZE
        red, green, blue = fetch(own_ptr, i, inside, SIZE)
        red, green, blue = jitter(red, green, blue, param_ptr, mean, True)
        end_colours(view_ptr, own_ptr, param_ptr, red, green, blue, i, inside, SIZE)

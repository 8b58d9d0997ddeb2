"""A box of an image becomes a view of another size: bicubic, antialiased, perhaps mirrored."""

import triton
import triton.language as tl

from fastdino_kernels.views._steps import (
    FLIP,
    ROTATE,
    begin_colours,
    fp16_of_byte,
    place_of_tile,
    put,
    rounded,
    view_of_program,
)


@triton.jit
def _span(first, num, count, scale):
    # Pixels [start, end) of ``count`` in a box that view pixels first, ..., first + num - 1 are made of.
    reach = 2 * tl.maximum(scale, 1.0)
    start = tl.floor((first + 0.5) * scale - reach).to(tl.int32)
    end = tl.ceil((first + num - 0.5) * scale + reach).to(tl.int32)
    return tl.maximum(start, 0), tl.minimum(end, count)


@triton.jit
def _bicubic(pixel, position, scale):
    # Weight of a box's pixel in a view's, up to a factor; fp16's 11 bits seldom move a byte, and then by one.
    by_width = 1 / tl.maximum(scale, 1.0)
    t = tl.abs(pixel * by_width - ((position + 0.5) * scale - 0.5) * by_width)
    beyond = tl.maximum(2 - t, 0.0)
    return tl.where(t < 1, (1.5 * t - 2.5) * (t * t) + 1, (0.5 - 0.5 * t) * (beyond * beyond)).to(tl.float16)


@triton.jit
def _by_sum(position, count, scale):
    # 1 / the sum of the weights in each view pixel, of which the box's edge may cut off some.
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
    normal_ptr,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
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
            begin_colours(view_ptr, own_ptr, sum_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE, PATCH)
    else:
        begin_colours(view_ptr, own_ptr, sum_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE, PATCH)

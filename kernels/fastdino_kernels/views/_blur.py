"""A view is blurred, where its parameters say so: Pillow's Gaussian blur, a box three times."""

import triton
import triton.language as tl

from fastdino_kernels.views._steps import (
    BLUR,
    fp16_of_byte,
    place_of_tile,
    rounded,
    solarize,
    view_of_program,
    write,
)

MARGIN: tl.constexpr = tl.constexpr(6)  # pixels that three boxes of five reach to either side


@triton.jit
def _box(deviation):
    # Weights of the box at distances 0, 1, 2 as fp16 has them; see the reference's _box_filter.
    variance = deviation * deviation / 3
    wide = variance >= 2 / 3  # a box of five pixels, else of three
    whole = tl.where(wide, 1.0, 0.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    near = 1 / (2 * (whole + part) + 1)
    far = (1 - (2 * whole + 1) * near) / 2
    return near.to(tl.float16), tl.where(wide, near, far).to(tl.float16), tl.where(wide, far, 0.0).to(tl.float16)


@triton.jit
def _weights(made, read, b0, b1, b2, SIZE: tl.constexpr):
    # Of the pixels ``read`` in those that one box makes at ``made``: beyond the view stands its last pixel.
    weights = tl.where(read == made, b0, 0.0)
    weights += tl.where(read == tl.maximum(made - 1, 0), b1, 0.0)
    weights += tl.where(read == tl.minimum(made + 1, SIZE - 1), b1, 0.0)
    weights += tl.where(read == tl.maximum(made - 2, 0), b2, 0.0)
    weights += tl.where(read == tl.minimum(made + 2, SIZE - 1), b2, 0.0)
    return weights.to(tl.float16)


@triton.jit
def _blur_kernel(
    views_ptr,
    work_ptr,
    params_ptr,
    normal_ptr,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # One program: ROWS x STRIP pixels of a blurred view, COLUMNS at a time, by two products with bands of weights, each
    # that of three boxes. Reads BLOCK_ROWS x BLOCK_COLUMNS pixels, MARGIN of them before the first that is made, and
    # makes as many rows as it reads: those from ROWS on lack some of theirs. All is transposed, columns first: Hopper
    # makes products of 64 rows by wgmma, and for those in a loop ptxas 12.8, that of Triton 3.6, takes the addresses of
    # their operands from registers that nothing has written. For the two before the loop it does not.
    param_ptr, view_ptr, own_ptr, _, _ = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    deviation = tl.load(param_ptr + BLUR)
    if deviation != 0:
        b0, b1, b2 = _box(deviation)
        total = b0.to(tl.float32) + 2 * b1.to(tl.float32) + 2 * b2.to(tl.float32)
        by_total = 1 / (total * total * total)
        first_y, first_x = place_of_tile(tl.program_id(0), SIZE, ROWS, STRIP)
        y, from_y = first_y + tl.arange(0, BLOCK_ROWS), first_y + tl.arange(0, BLOCK_ROWS) - MARGIN
        box = _weights(from_y[None, :], from_y[:, None], b0, b1, b2, SIZE)
        twice_down = tl.dot(box, _weights(y[None, :], from_y[:, None], b0, b1, b2, SIZE))
        down = tl.dot(box, twice_down.to(tl.float16)).to(tl.float16)
        row = tl.minimum(tl.maximum(from_y, 0), SIZE - 1)[None, :]
        for start_x in range(first_x, tl.minimum(first_x + STRIP, SIZE), COLUMNS):
            x, from_x = start_x + tl.arange(0, COLUMNS), start_x + tl.arange(0, BLOCK_COLUMNS) - MARGIN
            box_across = _weights(from_x[:, None], from_x[None, :], b0, b1, b2, SIZE)
            twice = tl.dot(_weights(x[:, None], from_x[None, :], b0, b1, b2, SIZE), box_across)
            across = tl.dot(twice.to(tl.float16), box_across).to(tl.float16)
            column = tl.minimum(tl.maximum(from_x, 0), SIZE - 1)[:, None]
            inside = (tl.arange(0, BLOCK_ROWS) < ROWS)[None, :] & (y < SIZE)[None, :] & (x < SIZE)[:, None]
            i = y[None, :] * SIZE + x[:, None]
            for channel in range(3):
                pixels = fp16_of_byte(tl.load(own_ptr + channel * SIZE * SIZE + row * SIZE + column))
                between = tl.dot(across, pixels) * by_total - 128  # fp16 is finer about zero
                made = rounded(tl.dot(between.to(tl.float16), down) * by_total + 128)
                write(view_ptr, solarize(made, param_ptr), channel, i, inside, normal_ptr, SIZE, PATCH)

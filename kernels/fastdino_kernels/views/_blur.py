"""A view is blurred, where its parameters say so: Pillow's Gaussian blur, a box three times."""

import triton
import triton.language as tl

from fastdino_kernels.views._steps import BLUR, fp16_of_byte, place_of_tile, rounded, solarize, view_of_program, write

MARGIN: tl.constexpr = tl.constexpr(6)  # pixels that 13 taps reach to either side


@triton.jit
def _taps(deviation):
    # Weights at distances 0 to 6, as fp16 has them, of three boxes on each other; see the reference's _box_filter.
    variance = deviation * deviation / 3
    wide = variance >= 2 / 3  # a box of five pixels, else of three
    whole = tl.where(wide, 1.0, 0.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    n = 1 / (2 * (whole + part) + 1)
    edge = (1 - (2 * whole + 1) * n) / 2
    m, f = tl.where(wide, n, edge), tl.where(wide, edge, 0.0)
    c0, c1, c2, c3, c4 = n * n + 2 * (m * m + f * f), 2 * m * (n + f), m * m + 2 * n * f, 2 * m * f, f * f
    t0, t1 = n * c0 + 2 * (m * c1 + f * c2), n * c1 + m * (c0 + c2) + f * (c1 + c3)
    t2, t3 = n * c2 + m * (c1 + c3) + f * (c0 + c4), n * c3 + m * (c2 + c4) + f * c1
    t4, t5, t6 = n * c4 + m * c3 + f * c2, m * c4 + f * c3, f * c4
    return _fp16(t0), _fp16(t1), _fp16(t2), _fp16(t3), _fp16(t4), _fp16(t5), _fp16(t6)


@triton.jit
def _fp16(x):
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _band(d, t0, t1, t2, t3, t4, t5, t6):
    # The taps at distances ``d``.
    band = tl.where(d == 0, t0, tl.where(d == 1, t1, tl.where(d == 2, t2, tl.where(d == 3, t3, 0.0))))
    return tl.where(d == 4, t4, tl.where(d == 5, t5, tl.where(d == 6, t6, band))).to(tl.float16)


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
    # One program: ROWS x STRIP pixels of a blurred view, COLUMNS at a time, by two products with a band of taps. Reads
    # BLOCK_ROWS x BLOCK_COLUMNS pixels, and makes as many rows as it reads: those from ROWS on lack some of theirs.
    param_ptr, view_ptr, own_ptr, _, _ = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    deviation = tl.load(param_ptr + BLUR)
    if deviation != 0:
        t0, t1, t2, t3, t4, t5, t6 = _taps(deviation)
        by_total = 1 / (t0 + 2 * (t1 + t2 + t3 + t4 + t5 + t6))
        read_row, read_column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
        made_row, made_column = tl.arange(0, BLOCK_ROWS), tl.arange(0, COLUMNS)
        across = _band(tl.abs(read_column[:, None] - made_column[None, :] - MARGIN), t0, t1, t2, t3, t4, t5, t6)
        down = _band(tl.abs(read_row[None, :] - made_row[:, None] - MARGIN), t0, t1, t2, t3, t4, t5, t6)
        first_y, first_x = place_of_tile(tl.program_id(0), SIZE, ROWS, STRIP)
        row = tl.minimum(tl.maximum(first_y - MARGIN + read_row, 0), SIZE - 1)[None, :]
        y = (first_y + made_row)[:, None]
        for start_x in range(first_x, tl.minimum(first_x + STRIP, SIZE), COLUMNS):
            column = tl.minimum(tl.maximum(start_x - MARGIN + read_column, 0), SIZE - 1)[:, None]
            x = (start_x + made_column)[None, :]
            inside = (made_row < ROWS)[:, None] & (y < SIZE) & (x < SIZE)
            for channel in range(3):
                plane = channel * SIZE * SIZE
                pixels = tl.trans(fp16_of_byte(tl.load(own_ptr + plane + row * SIZE + column)))
                between = tl.dot(pixels, across) * by_total - 128  # fp16 is finer about zero
                made = rounded(tl.dot(down, between.to(tl.float16)) * by_total + 128)
                made = solarize(made, param_ptr)
                write(view_ptr, made, channel, y * SIZE + x, inside, normal_ptr, SIZE, PATCH)

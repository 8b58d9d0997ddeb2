"""A view is blurred, where its parameters say so: Pillow's Gaussian blur, a box three times."""

import triton
import triton.language as tl

from fastdino_kernels.views._steps import BLUR, place_of_tile, rounded, solarize, view_of_program

MARGIN: tl.constexpr = tl.constexpr(6)  # pixels that 13 taps reach to either side
BLOCK = 64  # of pixels that are read, with the margins


@triton.jit
def _taps(deviation):
    # Weights at distances 0 to 6 of three boxes [far, near, ...]; see the reference's _box_filter.
    variance = deviation * deviation / 3
    wide = variance >= 2 / 3  # a box of five pixels, else of three
    whole = tl.where(wide, 1.0, 0.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    n = 1 / (2 * (whole + part) + 1)
    edge = (1 - (2 * whole + 1) * n) / 2
    m, f = tl.where(wide, n, edge), tl.where(wide, edge, 0.0)
    c0, c1, c2, c3, c4 = n * n + 2 * (m * m + f * f), 2 * m * (n + f), m * m + 2 * n * f, 2 * m * f, f * f
    return (
        n * c0 + 2 * (m * c1 + f * c2),
        n * c1 + m * (c0 + c2) + f * (c1 + c3),
        n * c2 + m * (c1 + c3) + f * (c0 + c4),
        n * c3 + m * (c2 + c4) + f * c1,
        n * c4 + m * c3 + f * c2,
        m * c4 + f * c3,
        f * c4,
    )


@triton.jit
def blur_kernel(views_ptr, work_ptr, params_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # One program: STEP x STEP pixels of a blurred view, by two products with a band of taps, of BLOCK x BLOCK pixels.
    param_ptr, view_ptr, own_ptr, _, _ = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    deviation = tl.load(param_ptr + BLUR)
    if deviation != 0:
        t0, t1, t2, t3, t4, t5, t6 = _taps(deviation)
        lane = tl.arange(0, BLOCK)
        d = tl.abs(lane[:, None] - lane[None, :] - MARGIN)  # from the pixel that is read to the one that is made
        band = tl.where(d == 0, t0, tl.where(d == 1, t1, tl.where(d == 2, t2, tl.where(d == 3, t3, 0.0))))
        band = tl.where(d == 4, t4, tl.where(d == 5, t5, tl.where(d == 6, t6, band))).to(tl.float16)
        total = tl.where(lane < STEP, tl.sum(band.to(tl.float32), 0), 1.0)
        first_y, first_x = place_of_tile(tl.program_id(0), SIZE, STEP)
        row = tl.minimum(tl.maximum(first_y - MARGIN + lane, 0), SIZE - 1)[:, None]
        column = tl.minimum(tl.maximum(first_x - MARGIN + lane, 0), SIZE - 1)[None, :]
        y, x = (first_y + lane)[:, None], (first_x + lane)[None, :]
        inside = (lane < STEP)[:, None] & (lane < STEP)[None, :] & (y < SIZE) & (x < SIZE)
        for channel in range(3):
            start = channel * SIZE * SIZE
            pixels = tl.load(own_ptr + start + row * SIZE + column).to(tl.float16)
            across = tl.dot(pixels, band) / total[None, :]
            whole = tl.floor(across)
            made = tl.dot(tl.trans(band), whole.to(tl.float16))
            made = tl.dot(tl.trans(band), (across - whole).to(tl.float16), made) / total[:, None]
            made = solarize(rounded(made), param_ptr).to(tl.uint8)
            tl.store(view_ptr + start + y * SIZE + x, made, mask=inside)

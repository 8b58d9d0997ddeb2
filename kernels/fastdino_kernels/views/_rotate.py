"""A view of a batch is rotated, where its parameters say so."""

import triton
import triton.language as tl

from fastdino_kernels.views._steps import ROTATE, begin_colours, fetch, place_of_tile, view_of_program


@triton.jit
def _rotate_kernel(
    views_ptr,
    work_ptr,
    raw_ptr,
    sums_ptr,
    params_ptr,
    turns_ptr,
    normal_ptr,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One program: ROWS x COLUMNS pixels of a rotated view, bilinear, of the view continued by its mirror image.
    param_ptr, view_ptr, own_ptr, view, param = view_of_program(params_ptr, views_ptr, work_ptr, SIZE)
    if tl.load(param_ptr + ROTATE) != 0:
        tile = tl.program_id(0)
        first_y, first_x = place_of_tile(tile, SIZE, ROWS, COLUMNS)
        y, x = first_y + tl.arange(0, ROWS)[:, None], first_x + tl.arange(0, COLUMNS)[None, :]
        cosine, sine = tl.load(turns_ptr + 2 * param), tl.load(turns_ptr + 2 * param + 1)
        row, column = y - (SIZE - 1) / 2, x - (SIZE - 1) / 2
        from_x, from_y = cosine * column - sine * row + (SIZE - 1) / 2, sine * column + cosine * row + (SIZE - 1) / 2
        left, top = tl.floor(from_x), tl.floor(from_y)
        x0, x1 = _mirrored(left, SIZE), _mirrored(left + 1, SIZE)
        y0, y1 = _mirrored(top, SIZE) * SIZE, _mirrored(top + 1, SIZE) * SIZE
        inside = (y < SIZE) & (x < SIZE)
        raw_ptr += view * (3 * SIZE * SIZE)
        red00, green00, blue00 = fetch(raw_ptr, y0 + x0, inside, SIZE)
        red01, green01, blue01 = fetch(raw_ptr, y0 + x1, inside, SIZE)
        red10, green10, blue10 = fetch(raw_ptr, y1 + x0, inside, SIZE)
        red11, green11, blue11 = fetch(raw_ptr, y1 + x1, inside, SIZE)
        right, down = from_x - left, from_y - top
        red = _between(red00, red01, red10, red11, right, down)
        green = _between(green00, green01, green10, green11, right, down)
        blue = _between(blue00, blue01, blue10, blue11, right, down)
        sum_ptr = sums_ptr + view * tl.num_programs(0) + tile
        i = y * SIZE + x
        begin_colours(view_ptr, own_ptr, sum_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE, PATCH)


@triton.jit
def _mirrored(i, SIZE: tl.constexpr):
    # numpy's "reflect", which repeats no edge; two views wide at most.
    i = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(i.to(tl.int32)))
    return tl.maximum(i, 0)


@triton.jit
def _between(above_left, above_right, below_left, below_right, right, down):
    above, below = above_left + (above_right - above_left) * right, below_left + (below_right - below_left) * right
    return tl.floor(above + (below - above) * down)

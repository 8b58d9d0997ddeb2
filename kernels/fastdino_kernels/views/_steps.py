"""What happens to the pixels of a view in registers: fp32 that hold a byte's values, red, green and blue apart."""

import triton
import triton.language as tl

# Columns of the parameters; see multi_crop.
FLIP: tl.constexpr = tl.constexpr(4)
ROTATE: tl.constexpr = tl.constexpr(5)
ORDER: tl.constexpr = tl.constexpr(6)
BRIGHTNESS: tl.constexpr = tl.constexpr(7)
CONTRAST: tl.constexpr = tl.constexpr(8)
SATURATION: tl.constexpr = tl.constexpr(9)
HUE: tl.constexpr = tl.constexpr(10)
GRAYSCALE: tl.constexpr = tl.constexpr(11)
BLUR: tl.constexpr = tl.constexpr(12)
SOLARIZE: tl.constexpr = tl.constexpr(13)
NUM_COLUMNS: tl.constexpr = tl.constexpr(14)

# A GPU adds faster than it rounds or converts between integers and floats. Of small integers these are additions too:
# in fp32 the bits of 2^23 + n are those of 2^23 with n in the lowest ones.
WHOLE: tl.constexpr = tl.constexpr(8388608.0)
WHOLE_BITS: tl.constexpr = tl.constexpr(0x4B000000)


@triton.jit
def from_byte(x):
    return (x.to(tl.int32) | WHOLE_BITS).to(tl.float32, bitcast=True) - WHOLE


@triton.jit
def fp16_of_byte(x):
    # Likewise: 1024 + n.
    return (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024


@triton.jit
def to_byte(x):
    return (x + WHOLE).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def rounded(x):
    # To the nearest byte; what lies between two, to the even one.
    return tl.minimum(tl.maximum(x, 0.0), 255.0) + WHOLE - WHOLE


@triton.jit
def whole(x):
    # floor(x) of 0 <= x < 2^22.
    near = x + WHOLE - WHOLE
    return tl.where(near > x, near - 1, near)


@triton.jit
def luma(red, green, blue):
    # ITU-R 601-2, of which every term is exact in fp32.
    return whole((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) * (1 / 65536))


@triton.jit
def jitter(red, green, blue, param_ptr, mean, FROM_CONTRAST: tl.constexpr):
    # The steps before contrast, or contrast, which needs the view's mean luma, and those after it. Contrast by 1 is no
    # step, so that all are before it.
    order = tl.load(param_ptr + ORDER).to(tl.int32)
    first = order // 6
    second = order % 6 // 2
    second += second >= first
    lowest = tl.where((first != 0) & (second != 0), 0, tl.where((first != 1) & (second != 1), 1, 2))
    highest = 6 - first - second - lowest
    swap = order % 2 == 1
    third = tl.where(swap, highest, lowest)
    fourth = tl.where(swap, lowest, highest)
    steps = first | second << 2 | third << 4 | fourth << 6
    reached = 0
    for _ in range(4):
        step = steps & 3
        steps >>= 2
        strength = tl.load(param_ptr + BRIGHTNESS + step)
        reached = tl.where((step == 1) & (strength != 1), 1, reached)
        if reached == FROM_CONTRAST:
            if step == 3:
                if strength != 0:
                    red, green, blue = _shift_hue(red, green, blue, (strength * 255).to(tl.int32) & 255)
            else:
                gray = luma(red, green, blue)
                to = tl.where(step == 0, 0.0, tl.where(step == 1, mean, gray))
                red, green, blue = _blend(to, red, strength), _blend(to, green, strength), _blend(to, blue, strength)
    return red, green, blue


@triton.jit
def _blend(to, x, factor):
    # Pillow's, which truncates.
    return whole(tl.minimum(tl.maximum(to + factor * (x - to), 0.0), 255.0))


@triton.jit
def _shift_hue(red, green, blue, shift):
    # As the reference. What is truncated is a quotient of small integers, no closer to the next whole number than 1 /
    # 510, so that an approximate division truncates alike.
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    is_red, is_green = red == value, green == value
    difference = tl.where(is_red, green - blue, tl.where(is_green, blue - red, red - green))
    sixths = difference / tl.maximum(chroma, 1.0) + tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    hue = whole(42.5 * tl.where(sixths < 0, sixths + 6, sixths) + 5e-4)
    saturation = whole(255 * chroma / tl.maximum(value, 1.0) + 5e-4)
    hue += tl.where(hue + shift < 256, shift, shift - 256)
    six = 6 * hue
    sector = whole((six + 0.5) * (1 / 255))
    f, s = (six - 255 * sector) * (1 / 255), saturation * (1 / 255)
    sector = tl.where(sector == 6, 0.0, sector)
    odd = (sector == 1) | (sector == 3) | (sector == 5)
    p = whole(value * (1 - s) + 0.5)
    m = whole(value * (1 - s * tl.where(odd, f, 1 - f)) + 0.5)
    k = sector
    red = tl.where((k == 0) | (k == 5), value, tl.where((k == 1) | (k == 4), m, p))
    green = tl.where((k == 1) | (k == 2), value, tl.where((k == 0) | (k == 3), m, p))
    blue = tl.where((k == 3) | (k == 4), value, tl.where((k == 2) | (k == 5), m, p))
    return red, green, blue


@triton.jit
def grayscale(red, green, blue, param_ptr):
    if tl.load(param_ptr + GRAYSCALE) != 0:
        gray = luma(red, green, blue)
        red, green, blue = gray, gray, gray
    return red, green, blue


@triton.jit
def solarize(x, param_ptr):
    if tl.load(param_ptr + SOLARIZE) != 0:
        x = tl.where(x < 128, x, 255 - x)
    return x


@triton.jit
def fetch(x_ptr, i, inside, SIZE: tl.constexpr):
    # Pixels ``i`` of three planes.
    red = from_byte(tl.load(x_ptr + i, mask=inside, other=0))
    green = from_byte(tl.load(x_ptr + SIZE * SIZE + i, mask=inside, other=0))
    blue = from_byte(tl.load(x_ptr + 2 * SIZE * SIZE + i, mask=inside, other=0))
    return red, green, blue


@triton.jit
def put(x_ptr, red, green, blue, i, inside, SIZE: tl.constexpr):
    tl.store(x_ptr + i, to_byte(red), mask=inside)
    tl.store(x_ptr + SIZE * SIZE + i, to_byte(green), mask=inside)
    tl.store(x_ptr + 2 * SIZE * SIZE + i, to_byte(blue), mask=inside)


@triton.jit
def write(view_ptr, x, channel, i, inside, normal_ptr, SIZE: tl.constexpr, PATCH: tl.constexpr):
    # Pixels ``i`` of one channel, as the caller wants them: planes or patches, bytes or normalised.
    plane: tl.constexpr = PATCH * PATCH if PATCH else SIZE * SIZE
    if PATCH:
        row, column = i // SIZE, i % SIZE
        patch = row // PATCH * (SIZE // PATCH) + column // PATCH
        i = patch * (3 * PATCH * PATCH) + row % PATCH * PATCH + column % PATCH
    if normal_ptr is None:
        tl.store(view_ptr + channel * plane + i, to_byte(x), mask=inside)
    else:
        x = x * tl.load(normal_ptr + channel) + tl.load(normal_ptr + 3 + channel)
        tl.store(view_ptr + channel * plane + i, x.to(view_ptr.dtype.element_ty), mask=inside)


@triton.jit
def view_of_program(params_ptr, views_ptr, work_ptr, SIZE: tl.constexpr):
    # Of this program: where its view's parameters begin, its pixels, and those of the copy that is worked on; number of
    # the view in the result and in the parameters.
    v, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    view = v * tl.num_programs(2) + b
    param = b * tl.num_programs(1) + v
    first = view * (3 * SIZE * SIZE)
    return params_ptr + param * NUM_COLUMNS, views_ptr + first, work_ptr + first, view, param


@triton.jit
def place_of_tile(tile, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # First row and column of a tile of a view.
    across: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    return tile // across * ROWS, tile % across * COLUMNS


@triton.jit
def begin_colours(
    view_ptr,
    own_ptr,
    sum_ptr,
    param_ptr,
    red,
    green,
    blue,
    i,
    inside,
    normal_ptr,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
):
    # The steps before contrast, and the sum of the luma that contrast needs.
    red, green, blue = jitter(red, green, blue, param_ptr, 0.0, False)
    if tl.load(param_ptr + CONTRAST) != 1:
        gray = tl.where(inside, luma(red, green, blue), 0.0).to(tl.int32)
        tl.store(sum_ptr, tl.sum(tl.sum(gray, 1), 0))
        put(own_ptr, red, green, blue, i, inside, SIZE)
    else:
        end_colours(view_ptr, own_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE, PATCH)


@triton.jit
def end_colours(
    view_ptr, own_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE: tl.constexpr, PATCH: tl.constexpr
):
    # What comes after the jitter; the blur has a launch of its own.
    red, green, blue = grayscale(red, green, blue, param_ptr)
    if tl.load(param_ptr + BLUR) != 0:
        put(own_ptr, red, green, blue, i, inside, SIZE)
    else:
        write(view_ptr, solarize(red, param_ptr), 0, i, inside, normal_ptr, SIZE, PATCH)
        write(view_ptr, solarize(green, param_ptr), 1, i, inside, normal_ptr, SIZE, PATCH)
        write(view_ptr, solarize(blue, param_ptr), 2, i, inside, normal_ptr, SIZE, PATCH)


@triton.jit
def _colour_kernel(
    views_ptr,
    work_ptr,
    sums_ptr,
    params_ptr,
    normal_ptr,
    SIZE: tl.constexpr,
    PATCH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
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
        end_colours(view_ptr, own_ptr, param_ptr, red, green, blue, i, inside, normal_ptr, SIZE, PATCH)

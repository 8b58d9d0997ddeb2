/* What comes after a view has its size: rotation, colours, blur. A view is three planes of size x size bytes. */

/* ------------------------------------------------------------------------------------------------------- rotation */

INLINE ptrdiff_t mirrored(ptrdiff_t i, ptrdiff_t size) /* numpy's "reflect", which repeats no edge */
{
    i = i < 0 ? -i : i;
    return i >= size ? 2 * (size - 1) - i : i;
}

/* Bilinear, from the view continued by its mirror image: out(x, y) = in(R (x, y)), R the rotation about the center. */
INLINE void rotate(u8 *view, ptrdiff_t size, double cosine, double sine, u8 *in)
{
    ptrdiff_t margin = MIN(size / 4 + 2, size - 1), side = size + 2 * margin, plane = size * size;
    double center = (double)side / 2, middle = (double)size / 2;
    double shift_x = center - (cosine - sine) * middle, shift_y = center - (sine + cosine) * middle;
    memcpy(in, view, 3 * plane);
    for (ptrdiff_t y = 0; y < size; y++)
        for (ptrdiff_t x = 0; x < size; x++) {
            double from_x = cosine * ((double)x + 0.5) + -sine * ((double)y + 0.5) + shift_x;
            double from_y = sine * ((double)x + 0.5) + cosine * ((double)y + 0.5) + shift_y;
            u8 *out = view + y * size + x;
            if (from_x < 0.0 || from_x >= (double)side || from_y < 0.0 || from_y >= (double)side) {
                out[0] = out[plane] = out[2 * plane] = 0;
                continue;
            }
            from_x -= 0.5, from_y -= 0.5;
            ptrdiff_t left = (ptrdiff_t)floor(from_x), top = (ptrdiff_t)floor(from_y);
            double dx = from_x - (double)left, dy = from_y - (double)top;
            ptrdiff_t x0 = mirrored(MAX(left, 0) - margin, size), x1 = mirrored(MIN(left + 1, side - 1) - margin, size);
            ptrdiff_t y0 = mirrored(MAX(top, 0) - margin, size), y1 = mirrored(MIN(top + 1, side - 1) - margin, size);
            for (int c = 0; c < 3; c++) {
                const u8 *upper = in + c * plane + y0 * size, *lower = in + c * plane + y1 * size;
                double above = upper[x0] + (upper[x1] - upper[x0]) * dx, below = lower[x0] + (lower[x1] - lower[x0]) * dx;
                out[c * plane] = (u8)(above + (below - above) * dy);
            }
        }
}

/* --------------------------------------------------------------------------------------------------------- colours */

/* ITU-R 601-2 luma. */
INLINE int32_t luma(int32_t red, int32_t green, int32_t blue)
{
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
}

/* floor(to + factor (byte - to)), clipped: Pillow's blend, which truncates. */
INLINE u8 blend(float to, float byte, float factor)
{
    float mixed = to + factor * (byte - to);
    mixed = mixed < 0.0f ? 0.0f : mixed;
    return (u8)(int32_t)(mixed > 255.0f ? 255.0f : mixed);
}

INLINE void brightness(u8 *view, ptrdiff_t plane, float factor)
{
    for (ptrdiff_t i = 0; i < 3 * plane; i++)
        view[i] = blend(0.0f, (float)view[i], factor);
}

/* Blends with the mean luma of the view, rounded to a byte. */
INLINE void contrast(u8 *view, ptrdiff_t plane, float factor)
{
    uint64_t sum = 0;
    for (ptrdiff_t start = 0; start < plane; start += 4096) { /* in parts that fit into 32 bits */
        uint32_t part = 0;
        for (ptrdiff_t i = start; i < MIN(start + 4096, plane); i++)
            part += (uint32_t)luma(view[i], view[plane + i], view[2 * plane + i]);
        sum += part;
    }
    float mean = (float)(int32_t)((double)sum / (double)plane + 0.5);
    for (ptrdiff_t i = 0; i < 3 * plane; i++)
        view[i] = blend(mean, (float)view[i], factor);
}

INLINE void saturation(u8 *view, ptrdiff_t plane, float factor)
{
    u8 *restrict red = view, *restrict green = view + plane, *restrict blue = view + 2 * plane;
    for (ptrdiff_t i = 0; i < plane; i++) {
        float gray = (float)luma(red[i], green[i], blue[i]);
        red[i] = blend(gray, (float)red[i], factor);
        green[i] = blend(gray, (float)green[i], factor);
        blue[i] = blend(gray, (float)blue[i], factor);
    }
}

#define BLOCK 256 /* pixels that go through one stage of hue() together: a compiler makes vectors of each loop */

/* RGB to HSV bytes, hue + shift modulo 256, back to RGB. Source: Python's colorsys, as Pillow rounds it:
 *   hue = floor(255 (((base + plus - minus) / 6 + 1) mod 1)), saturation = floor(255 chroma / value),
 *   6 hue / 255 = sector + f, s = saturation / 255, and of the three channels one is value, one p and one m:
 *   p = round(value (1 - s)), m = round(value (1 - s f)) in odd sectors, round(value (1 - s (1 - f))) in even ones.
 * Floats and doubles are where Pillow has them, or where the cheaper form gives the same byte for every colour: times
 * 1/6 for / 6, 255 h in floats, and the two quotients of integers. */
INLINE void hue(u8 *view, ptrdiff_t plane, int32_t shift)
{
    int32_t red[BLOCK], green[BLOCK], blue[BLOCK], value[BLOCK], chroma[BLOCK], sector[BLOCK], p[BLOCK], m[BLOCK];
    float plus[BLOCK], minus[BLOCK], base[BLOCK], f[BLOCK], s[BLOCK];
    for (ptrdiff_t start = 0; start < plane; start += BLOCK) {
        u8 *pixel = view + start;
        int count = (int)MIN(BLOCK, plane - start);
        for (int i = 0; i < BLOCK; i++)
            red[i] = green[i] = blue[i] = 0;
        for (int i = 0; i < count; i++)
            red[i] = pixel[i], green[i] = pixel[plane + i], blue[i] = pixel[2 * plane + i];
        for (int i = 0; i < BLOCK; i++) {
            int32_t r = red[i], g = green[i], b = blue[i], top = MAX(r, MAX(g, b));
            value[i] = top;
            chroma[i] = top - MIN(r, MIN(g, b));
            float divisor = (float)MAX(chroma[i], 1);
            base[i] = r == top ? 0.0f : g == top ? 2.0f : 4.0f;
            plus[i] = (float)(top - (r == top ? b : g == top ? r : g)) / divisor;
            minus[i] = (float)(top - (r == top ? g : g == top ? b : r)) / divisor;
        }
        for (int i = 0; i < BLOCK; i++)
            f[i] = (float)((double)base[i] + (double)plus[i] - (double)minus[i]);
        for (int i = 0; i < BLOCK; i++) {
            double turns = (double)f[i] * (1.0 / 6.0) + 1.0;
            f[i] = (float)(turns >= 1.0 ? turns - 1.0 : turns);
        }
        for (int i = 0; i < BLOCK; i++)
            sector[i] = (int32_t)(f[i] * 255.0f);
        for (int i = 0; i < BLOCK; i++) {
            int32_t saturation = (int32_t)((float)(255 * chroma[i]) / (float)MAX(value[i], 1));
            int32_t six = 6 * (((chroma[i] > 0 ? sector[i] : 0) + shift) & 255), whole = (six * 257 + 257) >> 16;
            s[i] = (float)saturation / 255.0f;
            f[i] = (float)(six - 255 * whole) / 255.0f; /* whole = six / 255 */
            sector[i] = whole == 6 ? 0 : whole;
            p[i] = (int32_t)((float)(value[i] * (255 - saturation)) * (1.0f / 255.0f) + 0.5f);
        }
        for (int i = 0; i < BLOCK; i++) {
            double odd = (double)(s[i] * f[i]), even = (double)s[i] * (1.0 - (double)f[i]);
            m[i] = (int32_t)((double)value[i] * (1.0 - (sector[i] & 1 ? odd : even)) + 0.5);
        }
        for (int i = 0; i < BLOCK; i++) {
            int32_t k = sector[i], v = value[i];
            red[i] = k == 0 || k == 5 ? v : k == 1 || k == 4 ? m[i] : p[i];
            green[i] = k == 1 || k == 2 ? v : k == 0 || k == 3 ? m[i] : p[i];
            blue[i] = k == 3 || k == 4 ? v : k == 2 || k == 5 ? m[i] : p[i];
        }
        for (int i = 0; i < count; i++)
            pixel[i] = (u8)red[i], pixel[plane + i] = (u8)green[i], pixel[2 * plane + i] = (u8)blue[i];
    }
}

INLINE void grayscale(u8 *view, ptrdiff_t plane)
{
    u8 *restrict red = view, *restrict green = view + plane, *restrict blue = view + 2 * plane;
    for (ptrdiff_t i = 0; i < plane; i++)
        red[i] = (u8)luma(red[i], green[i], blue[i]);
}

INLINE void solarize(u8 *pixels, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        pixels[i] = pixels[i] < 128 ? pixels[i] : (u8)(255 - pixels[i]);
}

/* ------------------------------------------------------------------------------------------------------------ blur */

#define MAX_BLUR 1000

typedef struct { /* a box of 2 radius + 1 pixels of weight near and one more on each side of weight far, of 2^24 */
    int32_t radius;
    uint32_t near, far;
} BoxFilter;

/* The box whose third power has a Gaussian's variance. Source: Gwosdek et al. 2011, equations 7, 11 and 14. */
static BoxFilter box_filter(float deviation)
{
    float variance = deviation * deviation / 3;
    float length = (float)sqrt(12.0 * variance + 1.0), whole = (float)floor((length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    float radius = whole + part;
    BoxFilter filter = {.radius = (int32_t)radius, .near = (uint32_t)((1 << 24) / (radius * 2 + 1))};
    filter.far = ((1u << 24) - (2 * (uint32_t)filter.radius + 1) * filter.near) / 2;
    return filter;
}

/* out[i] = round(near (in[i - radius] + ... + in[i + radius]) + far (the next one on each side)), neighbours lie step
 * bytes apart. radius is a constant where this is called, but for wide filters. */
INLINE void box_line(const u8 *restrict in, u8 *restrict out, ptrdiff_t count, ptrdiff_t step, int radius, BoxFilter box)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        uint32_t sum = 0, next = (uint32_t)in[i - (radius + 1) * step] + in[i + (radius + 1) * step];
        for (int d = -radius; d <= radius; d++)
            sum += in[i + d * step];
        out[i] = (u8)((box.near * sum + box.far * next + (1u << 23)) >> 24);
    }
}

/* The filter three times along a line of `count` items of `step` bytes, whose ends are continued by their last item. */
INLINE void box_thrice(u8 *line, ptrdiff_t count, ptrdiff_t step, BoxFilter box, u8 *const work[2])
{
    ptrdiff_t margin = box.radius + 1, size = count * step;
    u8 *from = work[0] + margin * step, *to = work[1] + margin * step;
    memcpy(from, line, size);
    for (int pass = 0; pass < 3; pass++) {
        for (ptrdiff_t i = 1; i <= margin; i++) {
            memcpy(from - i * step, from, step);
            memcpy(from + size + (i - 1) * step, from + size - step, step);
        }
        u8 *out = pass == 2 ? line : to;
        if (box.radius == 0)
            box_line(from, out, size, step, 0, box);
        else if (box.radius == 1)
            box_line(from, out, size, step, 1, box);
        else
            box_line(from, out, size, step, box.radius, box);
        to = from, from = out;
    }
}

INLINE void blur(u8 *plane, ptrdiff_t size, BoxFilter box, u8 *const work[2])
{
    for (ptrdiff_t y = 0; y < size; y++)
        box_thrice(plane + y * size, size, 1, box, work);
    box_thrice(plane, size, size, box, work); /* a column of rows */
}

/* A box of the image becomes a view of another size, perhaps mirrored: Pillow's crop, resize and transpose. */

/* ------------------------------------------------------------------------------------ the image, turned into columns */

typedef u8 bytes16 __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bytes16){__VA_ARGS__})
#endif
#define LOW_HALVES(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_HALVES(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

INLINE bytes16 load16(const u8 *from)
{
    bytes16 value;
    memcpy(&value, from, 16);
    return value;
}

/* Transposes 16 x 16 bytes: rows 0 and 8, 1 and 9, ... are interleaved, four times over. */
INLINE void turn(bytes16 *tile)
{
    for (int stage = 0; stage < 4; stage++) {
        bytes16 before[16];
        memcpy(before, tile, sizeof before);
        for (int i = 0; i < 8; i++) {
            tile[2 * i] = LOW_HALVES(before[i], before[i + 8]);
            tile[2 * i + 1] = HIGH_HALVES(before[i], before[i + 8]);
        }
    }
}

#define STRIP 64 /* rows */
#define MAX_LANES 64 /* neighbours that are weighed at once */
#define PADDING (2 * MAX_LANES) /* bytes after a buffer that vectors may read; they are multiplied by 0 or belong to no pixel */

/* Pixels (height, width, 3) become, for each channel, strips of STRIP rows (the last has what is left), in which every
 * column is contiguous: the horizontal pass then works on 16 rows at once, and stays within a few pages of memory. */
INLINE void turn_image(const u8 *pixels, ptrdiff_t width, ptrdiff_t height, u8 *columns)
{
    for (ptrdiff_t top = 0; top < height; top += STRIP) {
        ptrdiff_t rows = MIN(STRIP, height - top);
        for (ptrdiff_t x = 0; x < width; x += 16)
            for (ptrdiff_t y = 0; y < rows; y += 16) {
                ptrdiff_t num_x = MIN(16, width - x), num_y = MIN(16, rows - y);
                bytes16 tile[48]; /* 48 bytes of each row: byte 3 x + c is channel c of pixel x */
                for (int j = 0; j < 16; j++) {
                    const u8 *row = pixels + ((top + y + MIN(j, num_y - 1)) * width + x) * 3;
                    u8 last[48] = {0};
                    if (num_x < 16)
                        row = memcpy(last, row, 3 * num_x);
                    for (int k = 0; k < 3; k++)
                        tile[16 * k + j] = load16(row + 16 * k);
                }
                for (int k = 0; k < 3; k++)
                    turn(tile + 16 * k);
                for (int c = 0; c < 3; c++) {
                    u8 *to = columns + (c * height + top) * width + x * rows + y;
                    if (num_y == 16)
                        for (ptrdiff_t i = 0; i < num_x; i++)
                            memcpy(to + i * rows, tile + 3 * i + c, 16);
                    else
                        for (ptrdiff_t i = 0; i < num_x; i++)
                            memcpy(to + i * rows, tile + 3 * i + c, num_y);
                }
            }
    }
}

/* ------------------------------------------------------------------------------------------ crop, resize and flip */

typedef struct { /* which pixels an output pixel is made of, and by how much */
    int32_t *weights; /* (size, stride): pairs of taps as two words of two 16-bit numbers, see make_taps */
    int32_t *first;   /* (size,) */
    int32_t *pairs;   /* (size,) */
    double *exact;    /* (stride,) */
    ptrdiff_t stride;
} Taps;

#define WEIGHT_BITS 22

/* Keys' cubic with a = -1/2 of a distance in pixels. */
INLINE double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, far = (((x - 5) * x + 8) * x - 4) * a;
    return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

INLINE double support_of(ptrdiff_t from, ptrdiff_t to)
{
    return 2.0 * fmax((double)(float)from / (double)to, 1.0);
}

static ptrdiff_t stride_of(ptrdiff_t from, ptrdiff_t to)
{
    return 2 * (ptrdiff_t)ceil(support_of(from, to)) + 2;
}

/* weight of pixel x in output i = round(2^22 cubic((x + 1/2 - center) / scale) / their sum), center = (i + 1/2) scale,
 * where scale = max(from / to, 1) under cubic. |weight| < 2^23, so it is kept as high * 256 + low of 16 bits each: a
 * pair of taps is the word of its high parts, then that of its low ones. An odd last tap has a partner of weight 0. */
INLINE void make_taps(Taps *taps, ptrdiff_t from, ptrdiff_t to)
{
    double scale = (double)(float)from / (double)to, support = support_of(from, to), per_pixel = 1.0 / fmax(scale, 1.0);
    taps->stride = stride_of(from, to);
    for (ptrdiff_t i = 0; i < to; i++) {
        double center = ((double)i + 0.5) * scale, sum = 0.0;
        ptrdiff_t first = MAX((ptrdiff_t)(center - support + 0.5), 0);
        ptrdiff_t count = MIN((ptrdiff_t)(center + support + 0.5), from) - first;
        for (ptrdiff_t x = 0; x < count; x++)
            taps->exact[x] = cubic(((double)(x + first) - center + 0.5) * per_pixel);
        for (ptrdiff_t x = 0; x < count; x++)
            sum += taps->exact[x];
        if (sum != 0.0)
            for (ptrdiff_t x = 0; x < count; x++)
                taps->exact[x] /= sum;
        taps->exact[count] = 0.0;
        int32_t *word = taps->weights + i * taps->stride;
        for (ptrdiff_t x = 0; x < count; x += 2, word += 2) {
            int16_t part[4];
            for (int k = 0; k < 2; k++) {
                double scaled = taps->exact[x + k] * (1 << WEIGHT_BITS);
                int32_t weight = (int32_t)(scaled < 0 ? -0.5 + scaled : 0.5 + scaled);
                part[k] = (int16_t)(weight >> 8);
                part[2 + k] = (int16_t)(weight & 255);
            }
            memcpy(word, part, 8);
        }
        taps->first[i] = (int32_t)first;
        taps->pairs[i] = (int32_t)((count + 1) / 2);
    }
}

/* out[j] = clip8((2^21 + sum of in[tap * step + j] * weight of tap) >> 22) for 16, 32 or 64 neighbours j. Sums are
 * modulo 2^32, which their true value fits into; so they may be taken of high and low parts apart, and in any order. */
#ifdef X86
/* Interleaved by tap and widened, bytes of two taps stand side by side: madd weighs them with a pair of weights. Within
 * each 16 bytes of a vector the unpacking orders the sums as the packing wants them. */
#define WEIGH(NAME, TARGET, VECTOR, OP, LOAD, STORE, ZERO)                                                             \
    TARGET static inline void NAME(const u8 *in, ptrdiff_t step, const int32_t *words, int32_t pairs, u8 *out)         \
    {                                                                                                                  \
        const VECTOR zero = ZERO();                                                                                    \
        VECTOR high[4], low[4];                                                                                        \
        for (int k = 0; k < 4; k++)                                                                                    \
            high[k] = zero, low[k] = OP(set1_epi32)(1 << (WEIGHT_BITS - 1));                                           \
        for (; pairs > 0; pairs--, in += 2 * step, words += 2) {                                                       \
            VECTOR one = LOAD((const void *)in), two = LOAD((const void *)(in + step));                                \
            VECTOR a = OP(unpacklo_epi8)(one, two), b = OP(unpackhi_epi8)(one, two);                                   \
            VECTOR both[4] = {OP(unpacklo_epi8)(a, zero), OP(unpackhi_epi8)(a, zero), OP(unpacklo_epi8)(b, zero),      \
                              OP(unpackhi_epi8)(b, zero)};                                                             \
            for (int k = 0; k < 4; k++) {                                                                              \
                high[k] = OP(add_epi32)(high[k], OP(madd_epi16)(both[k], OP(set1_epi32)(words[0])));                   \
                low[k] = OP(add_epi32)(low[k], OP(madd_epi16)(both[k], OP(set1_epi32)(words[1])));                     \
            }                                                                                                          \
        }                                                                                                              \
        for (int k = 0; k < 4; k++)                                                                                    \
            low[k] = OP(srai_epi32)(OP(add_epi32)(OP(slli_epi32)(high[k], 8), low[k]), WEIGHT_BITS);                   \
        STORE((void *)out, OP(packus_epi16)(OP(packs_epi32)(low[0], low[1]), OP(packs_epi32)(low[2], low[3])));        \
    }
#define OP128(name) _mm_##name
#define OP256(name) _mm256_##name
#define OP512(name) _mm512_##name
WEIGH(weigh16, , __m128i, OP128, _mm_loadu_si128, _mm_storeu_si128, _mm_setzero_si128)
WEIGH(weigh32, __attribute__((target("avx2"))), __m256i, OP256, _mm256_loadu_si256, _mm256_storeu_si256,
      _mm256_setzero_si256)
WEIGH(weigh64, __attribute__((target("avx512f,avx512bw"))), __m512i, OP512, _mm512_loadu_si512, _mm512_storeu_si512,
      _mm512_setzero_si512)
#else
static inline void weigh16(const u8 *in, ptrdiff_t step, const int32_t *words, int32_t pairs, u8 *out)
{
    uint32_t sum[16];
    for (int j = 0; j < 16; j++)
        sum[j] = 1 << (WEIGHT_BITS - 1);
    for (; pairs > 0; pairs--, in += 2 * step, words += 2) {
        int16_t part[4];
        memcpy(part, words, 8);
        uint32_t one = (uint32_t)(part[0] * 256 + part[2]), two = (uint32_t)(part[1] * 256 + part[3]);
        for (int j = 0; j < 16; j++)
            sum[j] += in[j] * one + in[step + j] * two;
    }
    for (int j = 0; j < 16; j++) {
        int32_t value = (int32_t)sum[j] >> WEIGHT_BITS;
        out[j] = (u8)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}
#define weigh32 weigh16
#define weigh64 weigh16
#endif

/* How many of `left` neighbours are weighed at once. */
INLINE ptrdiff_t lanes(int level, ptrdiff_t left)
{
    return level >= AVX512 && left > 32 ? 64 : level >= AVX2 && left > 16 ? 32 : 16;
}

INLINE void weigh(ptrdiff_t num_lanes, const u8 *in, ptrdiff_t step, const Taps *taps, ptrdiff_t i, u8 *out)
{
    const int32_t *words = taps->weights + i * taps->stride;
    in += taps->first[i] * step;
    if (num_lanes == 64)
        weigh64(in, step, words, taps->pairs[i], out);
    else if (num_lanes == 32)
        weigh32(in, step, words, taps->pairs[i], out);
    else
        weigh16(in, step, words, taps->pairs[i], out);
}

typedef struct {
    ptrdiff_t left, top, width, height;
} Box;

typedef struct { /* memory that all views of an image share */
    u8 *columns; /* the image, see turn_image */
    u8 *rows;    /* a channel of a crop at its new width */
    u8 *work[2]; /* for what a step cannot do in place */
    Taps across, down;
    void *taken[12]; /* what is to be freed */
    int num_taken;
} Scratch;

/* Bytes for the rows of a crop and for what is weighed beyond its end. */
#define ROWS_SIZE(height, size) ((height + MAX_LANES) * ROUND_UP(size, MAX_LANES))

/* The columns of one channel of the crop, weighed: `num_rows` rows of `size` bytes, `stride` apart. */
INLINE void resize_across(int level, const Scratch *s, const u8 *columns, ptrdiff_t rows, ptrdiff_t num_rows, int flip,
                          ptrdiff_t size, u8 *out, ptrdiff_t stride)
{
    u8 made[16][MAX_LANES];
    for (ptrdiff_t x = 0; x < size; x += 16)
        for (ptrdiff_t y = 0, num; y < num_rows; y += num) {
            num = lanes(level, num_rows - y);
            for (int j = 0; j < 16; j++) {
                ptrdiff_t i = MIN(x + j, size - 1);
                weigh(num, columns + y, rows, &s->across, flip ? size - 1 - i : i, made[j]);
            }
            for (ptrdiff_t part = 0; part < num; part += 16) {
                bytes16 tile[16];
                for (int j = 0; j < 16; j++)
                    tile[j] = load16(made[j] + part);
                turn(tile);
                for (int j = 0; j < 16; j++)
                    memcpy(out + (y + part + j) * stride + x, tile + j, 16);
            }
        }
}

/* The box becomes a view of size x size: columns first, a byte between the passes, as Pillow up to 12 has it. */
INLINE void crop_and_resize(int level, Scratch *s, ptrdiff_t width, ptrdiff_t height, Box box, int flip, ptrdiff_t size,
                            u8 *out)
{
    ptrdiff_t stride = ROUND_UP(size, MAX_LANES), end = box.top + box.height;
    make_taps(&s->across, box.width, size);
    make_taps(&s->down, box.height, size);
    memset(s->rows + box.height * stride, 0, (size_t)stride); /* an odd last tap's partner */
    for (int c = 0; c < 3; c++) {
        for (ptrdiff_t y = box.top, num; y < end; y += num) {
            ptrdiff_t top = y / STRIP * STRIP, rows = MIN(STRIP, height - top);
            num = MIN(top + rows, end) - y;
            const u8 *columns = s->columns + (c * height + top) * width + box.left * rows + y - top;
            resize_across(level, s, columns, rows, num, flip, size, s->rows + (y - box.top) * stride, stride);
        }
        for (ptrdiff_t y = 0; y < size; y++, out += size)
            for (ptrdiff_t x = 0, num; x < size; x += num) {
                num = lanes(level, size - x);
                u8 made[MAX_LANES], *to = x + num <= size ? out + x : made;
                weigh(num, s->rows + x, stride, &s->down, y, to);
                if (to == made)
                    memcpy(out + x, made, size - x);
            }
    }
}

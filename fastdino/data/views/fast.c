/* All views of one image, with the pixels of reference.py to the byte and without the interpreter.
 *
 * The code is our own; the arithmetic, with every rounding, is that of Pillow (MIT-CMU licence): Resample.c, Geometry.c,
 * Blend.c, Convert.c and BoxBlur.c of its libImaging. Above each step stands its formula.
 *
 * A view stays planar from its first byte to its last: red, green, blue planes of size x size bytes in the buffer that
 * the caller gives. Every step is written once and inlined into one function per instruction set (see MAKE_VIEWS); the
 * loops are plain, for the compiler to turn into vectors, but for the sums of the resizing. Floating point is as
 * written: no contraction into fused operations, no reordering.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && !defined(FASTDINO_PORTABLE) /* which tests define, to see the code of other processors run */
#define X86
#include <immintrin.h>
#endif

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0 || SIZE_MAX < UINT64_MAX
#error "a 64-bit processor, and floating point as it is written: no -ffast-math, no x87"
#endif

#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(x, to) (((x) + (to) - 1) / (to) * (to))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef uint8_t u8;
enum { BASELINE, AVX2, AVX512 }; /* instruction sets, see widest_level */

#include "fast_resize.h"
#include "fast_steps.h"

/* ------------------------------------------------------------------------------------------------- a view, an image */

enum { /* params.py: Column */
    LEFT, TOP, WIDTH, HEIGHT, FLIP, ROTATE, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SOLARIZE,
    NUM_COLUMNS
};
static const u8 ORDERS[24][4] = { /* params.py: JITTER_ORDERS; 0 brightness, 1 contrast, 2 saturation, 3 hue */
    {0, 1, 2, 3}, {0, 1, 3, 2}, {0, 2, 1, 3}, {0, 2, 3, 1}, {0, 3, 1, 2}, {0, 3, 2, 1},
    {1, 0, 2, 3}, {1, 0, 3, 2}, {1, 2, 0, 3}, {1, 2, 3, 0}, {1, 3, 0, 2}, {1, 3, 2, 0},
    {2, 0, 1, 3}, {2, 0, 3, 1}, {2, 1, 0, 3}, {2, 1, 3, 0}, {2, 3, 0, 1}, {2, 3, 1, 0},
    {3, 0, 1, 2}, {3, 0, 2, 1}, {3, 1, 0, 2}, {3, 1, 2, 0}, {3, 2, 0, 1}, {3, 2, 1, 0},
};

/* What follows the resizing, in the order of params.py: Column. */
INLINE void finish_view(u8 *view, ptrdiff_t size, const float *param, const double *turn, Scratch *s)
{
    ptrdiff_t plane = size * size;
    if (param[ROTATE] != 0)
        rotate(view, size, turn[0], turn[1], s->work[0]);
    for (int k = 0; k < 4; k++) {
        int step = BRIGHTNESS + ORDERS[(int)param[ORDER]][k];
        float strength = param[step];
        if (step == HUE && strength != 0)
            hue(view, plane, (int32_t)((double)strength * 255) & 255);
        else if (step == BRIGHTNESS && strength != 1)
            brightness(view, plane, strength);
        else if (step == CONTRAST && strength != 1)
            contrast(view, plane, strength);
        else if (step == SATURATION && strength != 1)
            saturation(view, plane, strength);
    }
    int channels = param[GRAYSCALE] != 0 ? 1 : 3;
    if (channels == 1)
        grayscale(view, plane);
    if (param[BLUR] != 0)
        for (int c = 0; c < channels; c++)
            blur(view + c * plane, size, box_filter(param[BLUR]), s->work);
    if (param[SOLARIZE] != 0)
        solarize(view, channels * plane);
    for (int c = channels; c < 3; c++)
        memcpy(view + c * plane, view, plane);
}

typedef struct {
    const u8 *pixels; /* (height, width, 3) */
    ptrdiff_t height, width, num_views;
    const int32_t *boxes; /* (num_views, 4): left, top, width, height */
    const float *params;  /* (num_views, NUM_COLUMNS) */
    const double *turns;  /* (num_views, 2): cosine and sine of the rotation */
    Py_buffer *views;     /* (3, size, size) each */
} Job;

INLINE void make_views(int level, const Job *job, Scratch *s)
{
    turn_image(job->pixels, job->width, job->height, s->columns);
    for (ptrdiff_t v = 0; v < job->num_views; v++) {
        const int32_t *box = job->boxes + 4 * v;
        const float *param = job->params + NUM_COLUMNS * v;
        u8 *view = job->views[v].buf;
        ptrdiff_t size = job->views[v].shape[1];
        crop_and_resize(level, s, job->width, job->height, (Box){box[0], box[1], box[2], box[3]}, param[FLIP] != 0, size,
                        view);
        finish_view(view, size, param, job->turns + 2 * v, s);
    }
}

/* The same source for each instruction set, of which a processor runs the widest that it has. None has a fused
 * multiply-add, nor would it be used: setup.py says -ffp-contract=off. */
static void make_views_baseline(const Job *job, Scratch *s) { make_views(BASELINE, job, s); }
#ifdef X86
__attribute__((target("avx2"))) static void make_views_avx2(const Job *job, Scratch *s) { make_views(AVX2, job, s); }
__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))) static void make_views_avx512(const Job *job,
                                                                                                Scratch *s)
{
    make_views(AVX512, job, s);
}
static void (*const MAKE_VIEWS[])(const Job *, Scratch *) = {make_views_baseline, make_views_avx2, make_views_avx512};

static int widest_level(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2"))
        return BASELINE;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? AVX512
               : AVX2;
}
#else
static void (*const MAKE_VIEWS[])(const Job *, Scratch *) = {make_views_baseline};
static int widest_level(void) { return BASELINE; }
#endif

/* ------------------------------------------------------------------------------------------------------ the module */

/* Memory of its own for each buffer, so that an address checker sees the end of each. */
static void *take(Scratch *s, ptrdiff_t bytes)
{
    void *memory = aligned_alloc(64, ROUND_UP((size_t)bytes + PADDING, 64));
    return s->taken[s->num_taken++] = memory;
}

static int allocate(const Job *job, Scratch *s)
{
    ptrdiff_t rows = 0, work = 0, size = 0, across = 0, down = 0, num_pixels = job->width * job->height;
    for (ptrdiff_t v = 0; v < job->num_views; v++) {
        const int32_t *box = job->boxes + 4 * v;
        ptrdiff_t side = job->views[v].shape[1], radius = box_filter(job->params[NUM_COLUMNS * v + BLUR]).radius;
        size = MAX(size, side);
        rows = MAX(rows, ROWS_SIZE(box[3], side));
        work = MAX(work, MAX(3 * side, side + 2 * (radius + 1)) * side);
        across = MAX(across, stride_of(box[2], side));
        down = MAX(down, stride_of(box[3], side));
    }
    s->columns = take(s, 3 * num_pixels);
    s->rows = take(s, rows);
    for (int k = 0; k < 2; k++) {
        s->work[k] = take(s, work);
        Taps *taps = k ? &s->down : &s->across;
        ptrdiff_t stride = k ? down : across;
        taps->weights = take(s, size * stride * (ptrdiff_t)sizeof *taps->weights);
        taps->first = take(s, size * (ptrdiff_t)sizeof *taps->first);
        taps->pairs = take(s, size * (ptrdiff_t)sizeof *taps->pairs);
        taps->exact = take(s, stride * (ptrdiff_t)sizeof *taps->exact);
    }
    for (int i = 0; i < s->num_taken; i++)
        if (!s->taken[i])
            return 0;
    memset(s->columns + 3 * num_pixels, 0, PADDING);
    return 1;
}

/* Sets a ValueError and returns 0 when a view cannot be made: nothing after this looks at a bound. */
static int check(const Job *job)
{
    for (ptrdiff_t v = 0; v < job->num_views; v++) {
        const int32_t *box = job->boxes + 4 * v;
        const float *param = job->params + NUM_COLUMNS * v;
        const double *turn = job->turns + 2 * v;
        const Py_ssize_t *shape = job->views[v].shape;
        if (shape[0] != 3 || shape[1] != shape[2] || shape[1] < 1) {
            PyErr_Format(PyExc_ValueError, "view %zd: must be (3, size, size), not (%zd, %zd, %zd)", v, shape[0], shape[1],
                         shape[2]);
            return 0;
        }
        if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 || box[0] > job->width - box[2] ||
            box[1] > job->height - box[3]) {
            PyErr_Format(PyExc_ValueError, "view %zd: box (%i, %i, %i, %i) is not within %zd x %zd pixels", v, box[0],
                         box[1], box[2], box[3], job->width, job->height);
            return 0;
        }
        if (!(fabs(turn[0]) <= 1 && fabs(turn[1]) <= 1)) {
            PyErr_Format(PyExc_ValueError, "view %zd: its cosine and sine are not within [-1, 1]", v);
            return 0;
        }
        for (int i = ROTATE; i < NUM_COLUMNS; i++)
            if (!isfinite(param[i]) || (i == ORDER && !(param[i] >= 0 && param[i] < 24)) ||
                (i == HUE && fabsf(param[i]) > 1) || (i == BLUR && !(param[i] >= 0 && param[i] <= MAX_BLUR))) {
                char value[32];
                snprintf(value, sizeof value, "%g", param[i]);
                PyErr_Format(PyExc_ValueError, "view %zd: column %i of its parameters cannot be %s", v, i, value);
                return 0;
            }
    }
    return 1;
}

/* A C-contiguous buffer of `dims` dimensions and `format`, or a TypeError. */
static int get(PyObject *from, Py_buffer *buffer, const char *name, const char *format, int dims, int flags)
{
    if (PyObject_GetBuffer(from, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags))
        return 0;
    if (buffer->ndim == dims && !strcmp(buffer->format, format))
        return 1;
    PyErr_Format(PyExc_TypeError, "%s: must have %i dimensions of format %s, not %i of %s", name, dims, format,
                 buffer->ndim, buffer->format);
    PyBuffer_Release(buffer);
    return 0;
}

/* With the buffers of all arguments held. */
static PyObject *run(Job *job, int level)
{
    Scratch scratch = {0};
    if (!check(job))
        return NULL;
    int enough;
    Py_BEGIN_ALLOW_THREADS
    enough = allocate(job, &scratch);
    if (enough)
        MAKE_VIEWS[level](job, &scratch);
    for (int i = 0; i < scratch.num_taken; i++)
        free(scratch.taken[i]);
    Py_END_ALLOW_THREADS
    return enough ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

PyDoc_STRVAR(MAKE_VIEWS_DOC,
             "make_views(pixels, boxes, params, turns, views, level)\n\n"
             "pixels uint8 (h, w, 3); boxes int32 (V, 4): left, top, width, height; params fp32 (V, NUM_COLUMNS); turns\n"
             "fp64 (V, 2): cosine and sine of the rotation, as the reference has them; views: V writable buffers, uint8\n"
             "(3, size, size), which are filled. All contiguous; level: index into LEVELS.\n"
             "Without the interpreter's lock. Raises TypeError, ValueError, MemoryError.");

static PyObject *py_make_views(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *given[4], *sequence, *made = NULL;
    Py_buffer pixels, boxes, params, turns;
    int level;
    if (!PyArg_ParseTuple(args, "OOOOOi", &given[0], &given[1], &given[2], &given[3], &sequence, &level))
        return NULL;
    if (level < 0 || level > widest_level())
        return PyErr_Format(PyExc_ValueError, "level %i: this processor has 0 to %i", level, widest_level());
    PyObject *views = PySequence_Fast(sequence, "views: must be a sequence of buffers");
    if (!views)
        return NULL;
    Py_ssize_t num_views = PySequence_Fast_GET_SIZE(views), held = 0;
    Py_buffer *buffers = PyMem_Calloc((size_t)num_views + 1, sizeof *buffers);
    if (!buffers) {
        PyErr_NoMemory();
        goto no_buffers;
    }
    if (!get(given[0], &pixels, "pixels", "B", 3, 0))
        goto no_pixels;
    if (!get(given[1], &boxes, "boxes", "i", 2, 0))
        goto no_boxes;
    if (!get(given[2], &params, "params", "f", 2, 0))
        goto no_params;
    if (!get(given[3], &turns, "turns", "d", 2, 0))
        goto no_turns;
    for (; held < num_views; held++)
        if (!get(PySequence_Fast_GET_ITEM(views, held), &buffers[held], "views", "B", 3, PyBUF_WRITABLE))
            goto done;
    if (pixels.shape[2] != 3 || pixels.shape[0] > INT32_MAX || pixels.shape[1] > INT32_MAX)
        PyErr_SetString(PyExc_ValueError, "pixels: must be (height, width, 3)");
    else if (boxes.shape[0] != num_views || params.shape[0] != num_views || turns.shape[0] != num_views)
        PyErr_Format(PyExc_ValueError, "%zd boxes, %zd rows of parameters and %zd turns for %zd views", boxes.shape[0],
                     params.shape[0], turns.shape[0], num_views);
    else if (boxes.shape[1] != 4 || params.shape[1] != NUM_COLUMNS || turns.shape[1] != 2)
        PyErr_Format(PyExc_ValueError, "a box has 4 columns, not %zd; parameters have %i, not %zd; a turn has 2, not %zd",
                     boxes.shape[1], NUM_COLUMNS, params.shape[1], turns.shape[1]);
    else
        made = run(&(Job){.pixels = pixels.buf, .height = pixels.shape[0], .width = pixels.shape[1], .views = buffers,
                          .num_views = num_views, .boxes = boxes.buf, .params = params.buf, .turns = turns.buf}, level);
done:
    while (held > 0)
        PyBuffer_Release(&buffers[--held]);
    PyBuffer_Release(&turns);
no_turns:
    PyBuffer_Release(&params);
no_params:
    PyBuffer_Release(&boxes);
no_boxes:
    PyBuffer_Release(&pixels);
no_pixels:
    PyMem_Free(buffers);
no_buffers:
    Py_DECREF(views);
    return made;
}

static int fill_module(PyObject *module)
{
    static const char *const NAMES[] = {"baseline", "avx2", "avx512"};
    PyObject *levels = PyTuple_New(widest_level() + 1);
    for (int i = 0; levels && i <= widest_level(); i++) {
        PyObject *name = PyUnicode_FromString(NAMES[i]);
        if (!name)
            Py_CLEAR(levels);
        else
            PyTuple_SET_ITEM(levels, i, name);
    }
    int failed = !levels || PyModule_AddObjectRef(module, "LEVELS", levels);
    Py_XDECREF(levels);
    return failed || PyModule_AddStringConstant(module, "SOURCES", SOURCES) ? -1 : 0;
}

static PyMethodDef METHODS[] = {{"make_views", py_make_views, METH_VARARGS, MAKE_VIEWS_DOC}, {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, fill_module}, {0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, .m_name = "_fast", .m_methods = METHODS, .m_slots = SLOTS};

PyMODINIT_FUNC PyInit__fast(void)
{
    return PyModuleDef_Init(&MODULE);
}

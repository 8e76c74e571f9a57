/* A linear layer in one job: code the inputs, multiply, round to the type of the inputs.

   Few tokens are coded by every thread for itself, which is cheaper than to wait for one another;
   many are shared out, and batches of BATCH bound the memory. */

#include "integers.h"

#define BATCH 512

enum number { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    const weight_t *w;
    const void *x;
    void *y;
    int64_t tokens, x_stride, y_stride; /* in elements */
    int32_t type, planes, block;
    inputs_t shared; /* of a batch */
    float *sums;     /* float32 [batch][w rows], unless y is float32 */
    int64_t from, count; /* the batch */
} linear_t;

static float half_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7FFF) << 13;
    float value;
    if (bits >= 0x7C00u << 13) {
        bits |= 0x7F800000 | sign;
        memcpy(&value, &bits, 4);
        return value;
    }
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

/* Ties to even; NaN and infinity stay. */
static uint16_t float_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (bits < 0x38800000) { /* subnormal: units of 2^-24, rounded by an addition */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3F000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
}

static uint16_t float_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void widen(const linear_t *l, int64_t token, float *out) {
    int64_t K = l->w->columns;
    const uint16_t *x = (const uint16_t *)l->x + token * l->x_stride;
    if (l->type == BFLOAT16)
        for (int64_t i = 0; i < K; i++) {
            uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    else
        for (int64_t i = 0; i < K; i++) out[i] = half_float(x[i]);
}

static void code_token(const linear_t *l, int64_t t, const inputs_t *out, float *row) {
    const float *x = (const float *)l->x + (l->from + t) * l->x_stride;
    if (l->type == BFLOAT16 && out->halves) { /* as they are */
        uint16_t *to = (uint16_t *)out->halves + t * out->columns;
        memcpy(to, (const uint16_t *)l->x + (l->from + t) * l->x_stride, (size_t)l->w->columns * 2);
        memset(to + l->w->columns, 0, (size_t)(out->columns - l->w->columns) * 2);
        return;
    }
    if (l->type != FLOAT32) {
        widen(l, l->from + t, row);
        x = row;
    }
    inputs_t one = *out;
    int64_t P = out->planes, blocks = P ? (out->columns + out->block - 1) / out->block : 0;
    one.codes = P ? out->codes + t * P * out->columns : NULL;
    one.scales = P ? out->scales + t * blocks : NULL;
    one.sums = P ? out->sums + t * P * (out->columns / SUM_COLUMNS) : NULL;
    one.halves = out->halves ? out->halves + t * out->parts * out->columns : NULL;
    code_inputs(x, 0, l->w->columns, &one, 0, 1);
}

/* Arrays of coded inputs in one piece of scratch. */
static inputs_t coded_inputs(const linear_t *l, int64_t tokens, int use) {
    int64_t columns = l->w->units * UNIT;
    int64_t P = l->w->engine == INTEGER ? l->planes : 0, blocks = (columns + l->block - 1) / l->block;
    size_t codes = (size_t)(tokens * P * columns), sums = (size_t)(tokens * P * columns / SUM_COLUMNS) * 4;
    size_t scales = (size_t)(tokens * blocks) * 4 * (P > 0), halves = 0;
    int32_t parts = l->type == BFLOAT16 ? 1 : l->type == FLOAT16 ? 2 : 3; /* that hold all bits */
    if (!P) halves = (size_t)(tokens * parts * columns) * 2;
    char *memory = scratch(use, codes + sums + scales + halves + 64);
    inputs_t x = {.tokens = tokens, .columns = columns, .planes = (int32_t)P, .block = l->block, .parts = parts};
    x.codes = (int8_t *)memory;
    x.sums = (int32_t *)(memory + codes);
    x.scales = (float *)(memory + codes + sums);
    if (!P) x.halves = (uint16_t *)memory;
    return x;
}

/* Rows [first, last) of the batch's sums, rounded. */
static void narrow(const linear_t *l, int64_t first, int64_t last) {
    int64_t N = l->w->rows;
    for (int64_t t = 0; t < l->count; t++) {
        const float *from = l->sums + t * N;
        uint16_t *to = (uint16_t *)l->y + (l->from + t) * l->y_stride;
        if (l->type == BFLOAT16)
            for (int64_t o = first; o < last; o++) to[o] = float_bf16(from[o]);
        else
            for (int64_t o = first; o < last; o++) to[o] = float_half(from[o]);
    }
}

static void linear_batch(void *argument, int thread, int threads) {
    const linear_t *l = argument;
    inputs_t x = l->shared;
    int64_t columns = l->w->units * UNIT, first, last;
    float *row = l->type == FLOAT32 ? NULL : scratch(10, (size_t)columns * 4);
    if (l->count < threads) {
        x = coded_inputs(l, l->count, 11);
        for (int64_t t = 0; t < l->count; t++) code_token(l, t, &x, row);
    } else {
        share(l->count, 1, thread, threads, &first, &last);
        for (int64_t t = first; t < last; t++) code_token(l, t, &x, row);
        barrier();
    }
    share(l->w->blocks, 1, thread, threads, &first, &last);
    if (first == last) return;
    int direct = l->type == FLOAT32;
    float *y = direct ? (float *)l->y + l->from * l->y_stride : l->sums;
    product(l->w, &x, y, direct ? l->y_stride : l->w->rows, first, last);
    int64_t end = last * ROWS < l->w->rows ? last * ROWS : l->w->rows;
    if (!direct) narrow(l, first * ROWS, end);
}

/* y = x W^T. type: of x and y, an enum number. planes: of the inputs' codes, block: columns of a
   scale of theirs; both only for integer weights. */
void linear(const weight_t *w, const void *x, int64_t tokens, int64_t x_stride, void *y, int64_t y_stride,
            int32_t type, int32_t planes, int32_t block) {
    linear_t l = {.w = w, .x = x, .y = y, .tokens = tokens, .x_stride = x_stride, .y_stride = y_stride,
                  .type = type, .planes = planes, .block = block};
    for (l.from = 0; l.from < tokens; l.from += BATCH) {
        l.count = tokens - l.from < BATCH ? tokens - l.from : BATCH;
        l.shared = coded_inputs(&l, l.count, 8);
        if (type != FLOAT32) l.sums = scratch(9, (size_t)(l.count * w->rows) * 4);
        run(linear_batch, &l);
    }
}

/* The same on inputs that are coded already; y float32. */
typedef struct {
    const weight_t *w;
    const inputs_t *x;
    float *y;
    int64_t stride;
} coded_t;

static void coded_job(void *argument, int thread, int threads) {
    const coded_t *c = argument;
    int64_t first, last;
    share(c->w->blocks, 1, thread, threads, &first, &last);
    product(c->w, c->x, c->y, c->stride, first, last);
}

void linear_coded(const weight_t *w, const inputs_t *x, float *y, int64_t stride) {
    coded_t c = {w, x, y, stride};
    run(coded_job, &c);
}

int64_t weight_size(void) { return sizeof(weight_t); }
int64_t inputs_size(void) { return sizeof(inputs_t); }

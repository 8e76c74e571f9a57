/* Inputs taken to the basis that a weight is stored in, and rounded, a row at a time in cache.

       steps      divide by channels | reorder | signs, block Hadamard matrix, 1 / sqrt(block)
       parts      runs of channels with a format: scale s of each group, code = clamp(round(x / s))

   A block is m 2^j, m = 1 or the order of a Paley matrix; 2^j by butterflies, 2^j >= 16 or m = 1 and
   2^j >= 16, m by a product with its matrix of +-1. Sums are float32 in the butterfly's order. */

#include "cpu.h"
#include "floats.h"

#include <math.h>

enum { STEP_DIVIDE = 1, STEP_ORDER, STEP_ROTATE };

typedef struct {
    int32_t kind, core;     /* core: m */
    int64_t block;
    const void *data;       /* float channels; int32 order; float signs or NULL */
    const float *matrix;    /* [m][m], where m > 1 */
} step_t;

typedef struct {
    int64_t first, last, group, scale; /* scale: where its first one goes */
    float largest, clip, fixed;        /* fixed: the static scale, 0 for none */
    int32_t reserved;
} part_t;

typedef struct {
    int64_t tokens, columns, stride, padded; /* stride of x; padded: columns of codes, 32s */
    int64_t all_scales;                      /* of a token */
    int32_t steps, parts;
    step_t step[4];
    part_t part[2];
    const float *x;
    int8_t *codes;    /* [tokens][padded] */
    float *scales;    /* [tokens][all_scales] */
    int32_t *sums;    /* [tokens][padded / 16], or NULL */
    float *scratch;   /* [threads][2][padded] */
} rotate_t;

/* One level of the transform within registers: lanes whose number has bit `half` get a - b. */
#define LEVEL(x, half)                                                                              \
    do {                                                                                            \
        const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};                     \
        vf other = (vf)__builtin_shuffle((vi)(x), lane ^ (half));                                   \
        x = other + (vf)((vi)(x) ^ (((lane & (half)) != 0) & (int32_t)0x80000000));                 \
    } while (0)

static void butterflies(float *x, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        vf y = vf_load(x + i);
        LEVEL(y, 1);
        LEVEL(y, 2);
        LEVEL(y, 4);
        LEVEL(y, 8);
        vf_store(x + i, y);
    }
    int64_t half = 16;
    for (; 4 * half <= size; half *= 4) /* two levels at a time */
        for (int64_t i = 0; i < size; i += 4 * half)
            for (int64_t j = i; j < i + half; j += 16) {
                vf a = vf_load(x + j), b = vf_load(x + j + half);
                vf c = vf_load(x + j + 2 * half), d = vf_load(x + j + 3 * half);
                vf s = a + b, t = a - b, u = c + d, v = c - d;
                vf_store(x + j, s + u), vf_store(x + j + half, t + v);
                vf_store(x + j + 2 * half, s - u), vf_store(x + j + 3 * half, t - v);
            }
    for (; 2 * half <= size; half *= 2)
        for (int64_t i = 0; i < size; i += 2 * half)
            for (int64_t j = i; j < i + half; j += 16) {
                vf a = vf_load(x + j), b = vf_load(x + j + half);
                vf_store(x + j, a + b), vf_store(x + j + half, a - b);
            }
}

/* x (m, p) to H^T x, 16 columns at a time. */
static void core_product(const float *matrix, int64_t m, int64_t p, const float *x, float *y) {
    for (int64_t c = 0; c < p; c += 16)
        for (int64_t i = 0; i < m; i++) {
            vf sum = {0};
            for (int64_t k = 0; k < m; k++) sum += matrix[k * m + i] * vf_load(x + k * p + c);
            vf_store(y + i * p + c, sum);
        }
}

static void rotate_row(const step_t *s, int64_t columns, const float *from, float *to) {
    int64_t body = columns / s->block * s->block, power = s->block / s->core;
    const float *signs = s->data;
    float scale = (float)(1.0 / sqrt((double)s->block)), room[s->core > 1 ? s->block + 16 : 16];
    for (int64_t i = 0; i < columns; i++) to[i] = signs && i < body ? from[i] * signs[i] : from[i];
    for (int64_t i = 0; i < body; i += s->block) {
        for (int64_t k = 0; k < s->core; k++) butterflies(to + i + k * power, power);
        if (s->core > 1) {
            core_product(s->matrix, s->core, power, to + i, room);
            memcpy(to + i, room, 4 * s->block);
        }
    }
    for (int64_t i = 0; i < body; i++) to[i] *= scale;
}

static const float *to_basis(const rotate_t *r, const float *x, float *a, float *b) {
    for (int i = 0; i < r->steps; i++) {
        const step_t *s = r->step + i;
        const float *channels = s->data;
        const int32_t *order = s->data;
        float *to = x == a ? b : a;
        if (s->kind == STEP_DIVIDE)
            for (int64_t c = 0; c < r->columns; c++) to[c] = x[c] / channels[c];
        else if (s->kind == STEP_ORDER)
            for (int64_t c = 0; c < r->columns; c++) to[c] = x[order[c]];
        else
            rotate_row(s, r->columns, x, to);
        x = to;
    }
    return x;
}

static float group_scale(const part_t *p, const float *x, int64_t count) {
    if (p->fixed > 0) return p->fixed;
    vf top = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) top = vf_max(vf_abs(vf_load(x + i)), top);
    float most = vf_most(top);
    for (; i < count; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    if (p->clip != 1.0f) most *= p->clip;
    float scale = most / p->largest;
    return scale < 0x1p-126f ? 1.0f : scale;
}

static void code_group(const float *x, int64_t count, float scale, float largest, int8_t *to) {
    for (int64_t i = 0; i < count; i += 16) {
        vf y = {0};
        memcpy(&y, x + i, 4 * (count - i < 16 ? count - i : 16));
        y = y / scale;
        y = vf_pick(y > largest, vf_all(largest), vf_pick(y < -largest, vf_all(-largest), y));
        vi code = vf_round(y);
        for (int64_t j = 0; j < 16 && i + j < count; j++) to[i + j] = (int8_t)code[j];
    }
}

static void job(void *argument, int thread, int threads) {
    const rotate_t *r = argument;
    int64_t first, last;
    float *a = r->scratch + thread * 2 * r->padded, *b = a + r->padded;
    share(r->tokens, 1, thread, threads, &first, &last);
    for (int64_t t = first; t < last; t++) {
        const float *x = to_basis(r, r->x + t * r->stride, a, b);
        int8_t *codes = r->codes + t * r->padded;
        memset(codes + r->columns, 0, r->padded - r->columns);
        for (int i = 0; i < r->parts; i++) {
            const part_t *p = r->part + i;
            float *scales = r->scales + t * r->all_scales + p->scale;
            for (int64_t c = p->first; c < p->last; c += p->group) {
                int64_t count = p->last - c < p->group ? p->last - c : p->group;
                float scale = group_scale(p, x + c, count);
                code_group(x + c, count, scale, p->largest, codes + c);
                *scales++ = scale;
            }
        }
        for (int64_t c = 0; r->sums && c < r->padded; c += 16) {
            int32_t sum = 0;
            for (int j = 0; j < 16; j++) sum += codes[c + j];
            r->sums[(t * r->padded + c) / 16] = sum;
        }
    }
}

void rotate_inputs(const rotate_t *r) { run(job, (void *)r); }

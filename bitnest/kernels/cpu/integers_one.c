/* Integer weights times one token: codes go from memory to the dot product in registers. */

#include "integers.h"

#define AHEAD 1024 /* bytes of each plane fetched in advance */

typedef struct {
    const weight_t *w;
    const inputs_t *x;
    const cells_t *cells;
    float *y;
    int64_t first, last;
} one_t;

/* Sums of a cell, per plane of inputs; two of each, so that one need not wait for the other. */
typedef struct {
    vi32 a[3][2];
} sums_t;

ALWAYS void one_step(sums_t sums[SUBS], const weight_t *w, const uint8_t *const *plane, int half,
                     const int8_t *x, int64_t columns, int widths, int planes, int P, int lookup) {
    int wide = widths == 0x8 || lookup;
    UNROLL for (int s = 0; s < SUBS; s++) {
        const uint8_t *at[MAX_PLANES];
        vu8 c[4];
        UNROLL for (int k = 0; k < planes; k++) at[k] = plane[k] + s * VB;
        decode_step(c, at, half, widths, planes);
        UNROLL for (int i = 0; i < 4; i++) {
            if (lookup) c[i] = looked_up(c[i], w->table, w->bits);
            UNROLL for (int p = 0; p < P; p++)
                sums[s].a[p][i & 1] =
                    dot4(sums[s].a[p][i & 1], c[i], four(x + p * columns + 4 * i), wide);
        }
    }
}

/* Adds a cell's sums to y (LANES rows). */
ALWAYS void one_cell(const one_t *job, const sums_t *sums, int64_t i, int64_t block, int s, int P,
                     vf32 *y, vi32 *whole) {
    const weight_t *w = job->w;
    const cell_t *cell = job->cells->cell + i;
    int zero = job->cells->zero[0] != NULL;
    vi32 sum = add(sums[s].a[P - 1][0], sums[s].a[P - 1][1]);
    if (P > 1) sum = add(sum, times256(add(sums[s].a[P - 2][0], sums[s].a[P - 2][1])));
    if (zero) sum = less_zero(w, sum, job->cells->zero[1][i], block, cell->group, s);
    if (P == 1 && job->cells->whole_rows) {
        sum = mul(sum, integer_scale(w, block, cell->group, s));
        *whole = cell->resumes ? add(*whole, sum) : sum;
        if (!cell->goes_on) *y += to_f32(*whole) * job->cells->scale[i];
        return;
    }
    vf32 value = to_f32(sum);
    if (P == 3) {
        vi32 first = add(sums[s].a[0][0], sums[s].a[0][1]);
        if (zero) first = less_zero(w, first, job->cells->zero[0][i], block, cell->group, s);
        value += to_f32(first) * 65536.0f;
    }
    *y += value * job->cells->scale[i] * weight_scale(w, block, cell->group, s);
}

ALWAYS void one(const one_t *job, int widths, int planes, int P, int lookup) {
    const weight_t *w = job->w;
    int64_t columns = job->x->columns;
    for (int64_t block = job->first; block < job->last; block++) {
        const uint8_t *plane[MAX_PLANES];
        int64_t stride[MAX_PLANES];
        UNROLL for (int k = 0; k < planes; k++) {
            stride[k] = w->plane_stride[k];
            plane[k] = w->plane[k] + block * w->units * stride[k];
        }
        vf32 y[SUBS] = {{0}};
        vi32 whole[SUBS] = {{0}};
        const int8_t *x = job->x->codes;
        for (int64_t i = 0; i < job->cells->count; i++) {
            sums_t sums[SUBS] = {{{{{0}}}}};
            int64_t step = job->cells->cell[i].start, end = step + job->cells->cell[i].steps;
            while (step < end) {
                if (!(step & 1)) {
                    UNROLL for (int k = 0; k < planes; k++) {
                        int b = widths >> (4 * (planes - 1 - k)) & 15;
                        UNROLL for (int v = 0; v < b; v++) __builtin_prefetch(plane[k] + 64 * v + AHEAD);
                    }
                    one_step(sums, w, plane, 0, x, columns, widths, planes, P, lookup);
                    x += STEP;
                    if (++step == end) break;
                }
                one_step(sums, w, plane, 1, x, columns, widths, planes, P, lookup);
                UNROLL for (int k = 0; k < planes; k++) plane[k] += stride[k];
                x += STEP, step++;
            }
            UNROLL for (int s = 0; s < SUBS; s++)
                one_cell(job, sums, i, block, s, P, y + s, whole + s);
        }
        for (int s = 0; s < SUBS; s++)
            put_rows(w, job->y, block, s, y[s] * row_factor(w, block, s));
    }
}

#define ONE(widths, count, lookup)                                                      \
    static void one_##widths##_##lookup(const one_t *job) {                              \
        if (job->x->planes == 1)                                                         \
            one(job, widths, count, 1, lookup);                                         \
        else if (job->x->planes == 2)                                                    \
            one(job, widths, count, 2, lookup);                                         \
        else                                                                             \
            one(job, widths, count, 3, lookup);                                         \
    }
ONE(0x8, 1, 0)
#if SPECIAL
ONE(0x1, 1, 0)
ONE(0x2, 1, 0)
ONE(0x4, 1, 0)
ONE(0x21, 2, 0)
ONE(0x41, 2, 0)
ONE(0x42, 2, 0)
ONE(0x421, 3, 0)
ONE(0x1, 1, 1)
ONE(0x2, 1, 1)
ONE(0x4, 1, 1)
ONE(0x21, 2, 1)
ONE(0x41, 2, 1)
ONE(0x42, 2, 1)
#endif

/* Any other planes: a block at a time as bytes. */
static void one_other(const one_t *job) {
    const weight_t *w = job->w;
    uint8_t *bytes = scratch(2, (size_t)w->units * 512);
    for (int64_t block = job->first; block < job->last; block++) {
        unpack(w, block, 0, w->units * 2, bytes);
        weight_t whole = *w;
        whole.planes = 1;
        whole.plane_stride[0] = 512;
        whole.plane[0] = bytes - block * w->units * 512;
        one_t own = *job;
        own.w = &whole;
        own.first = block;
        own.last = block + 1;
        one_0x8_0(&own);
    }
}

void product_one(const weight_t *w, const inputs_t *x, float *y, int64_t first, int64_t last) {
    cells_t cells = make_cells(w, x, LONGEST, 0);
    one_t job = {w, x, &cells, y, first, last};
#if SPECIAL
    int widths = plane_widths(w);
    if (w->table) {
        switch (widths) {
        case 0x1: one_0x1_1(&job); return;
        case 0x2: one_0x2_1(&job); return;
        case 0x4: one_0x4_1(&job); return;
        case 0x21: one_0x21_1(&job); return;
        case 0x41: one_0x41_1(&job); return;
        case 0x42: one_0x42_1(&job); return;
        default: one_other(&job); return;
        }
    }
    switch (widths) {
    case 0x1: one_0x1_0(&job); return;
    case 0x2: one_0x2_0(&job); return;
    case 0x4: one_0x4_0(&job); return;
    case 0x8: one_0x8_0(&job); return;
    case 0x21: one_0x21_0(&job); return;
    case 0x41: one_0x41_0(&job); return;
    case 0x42: one_0x42_0(&job); return;
    case 0x421: one_0x421_0(&job); return;
    default: one_other(&job); return;
    }
#endif
    one_other(&job);
}

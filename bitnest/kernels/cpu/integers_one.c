/* Integer weights times one token: codes go from memory to the dot product in registers. */

#include "integers.h"

#ifndef AHEAD
#define AHEAD 4096 /* bytes of each plane fetched in advance */
#endif
#define CHAINS (SUBS == 1 ? 2 : 1) /* sums of a row, so that one need not wait for the other */

typedef struct {
    const weight_t *w;
    const inputs_t *x;
    const cells_t *cells;
    float *y;
    int64_t first, last;
} one_t;

ALWAYS void one_step(vi32 sums[SUBS][3][2], const weight_t *w, const uint8_t *const *plane, int half,
                     const int8_t *x, int64_t columns, int widths, int planes, int P, int lookup) {
    int wide = widths == 0x8 || lookup;
    raw_t raw[SUBS];
    UNROLL for (int s = 0; s < SUBS; s++) {
        const uint8_t *at[MAX_PLANES];
        UNROLL for (int k = 0; k < planes; k++) at[k] = plane[k] + s * VB;
        raw[s] = load_raw(at, half, widths, planes);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        vi32 in[3];
        UNROLL for (int p = 0; p < P; p++) in[p] = four(x + p * columns + 4 * i);
        UNROLL for (int s = 0; s < SUBS; s++) {
            vu8 c = decode(raw + s, half, i, widths, planes);
            if (lookup) c = looked_up(c, w->table, w->bits);
            UNROLL for (int p = 0; p < P; p++)
                sums[s][p][i % CHAINS] = dot4(sums[s][p][i % CHAINS], c, in[p], wide);
        }
    }
}

/* Adds a cell's sums to y (LANES rows). */
ALWAYS void one_cell(const one_t *job, vi32 sums[3][2], int64_t i, int64_t block, int s, int P, vf32 *y,
                     vi32 *whole) {
    const weight_t *w = job->w;
    const cell_t *cell = job->cells->cell + i;
    int zero = job->cells->zero[0] != NULL;
    vi32 sum = add(sums[P - 1][0], sums[P - 1][1]);
    if (P > 1) sum = add(sum, times256(add(sums[P - 2][0], sums[P - 2][1])));
    if (zero) sum = less_zero(w, sum, job->cells->zero[1][i], block, cell->group, s);
    if (P == 1 && job->cells->whole_rows) {
        sum = mul(sum, integer_scale(w, block, cell->group, s));
        *whole = cell->resumes ? add(*whole, sum) : sum;
        if (!cell->goes_on) *y += to_f32(*whole) * job->cells->scale[i];
        return;
    }
    vf32 value = to_f32(sum);
    if (P == 3) {
        vi32 first = add(sums[0][0], sums[0][1]);
        if (zero) first = less_zero(w, first, job->cells->zero[0][i], block, cell->group, s);
        value += to_f32(first) * 65536.0f;
    }
    *y += value * job->cells->scale[i] * weight_scale(w, block, cell->group, s);
}

ALWAYS void one_block(const one_t *job, int64_t block, int widths, int planes, int P, int lookup) {
    const weight_t *w = job->w;
    const uint8_t *plane[MAX_PLANES];
    int64_t columns = job->x->columns;
    UNROLL for (int k = 0; k < planes; k++)
        plane[k] = w->plane[k] + block * w->units * w->plane_stride[k];
    vf32 y[SUBS] = {{0}};
    vi32 whole[SUBS] = {{0}};
    const int8_t *x = job->x->codes;
    for (int64_t i = 0; i < job->cells->count; i++) {
        vi32 sums[SUBS][3][2] = {{{{0}}}};
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
            UNROLL for (int k = 0; k < planes; k++) plane[k] += w->plane_stride[k];
            x += STEP, step++;
        }
        UNROLL for (int s = 0; s < SUBS; s++) one_cell(job, sums[s], i, block, s, P, y + s, whole + s);
    }
    for (int s = 0; s < SUBS; s++) put_rows(w, job->y, block, s, y[s] * row_factor(w, block, s));
}

ALWAYS void one(const one_t *job, int widths, int planes, int P, int lookup) {
    for (int64_t block = job->first; block < job->last; block++)
        one_block(job, block, widths, planes, P, lookup);
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

/* Integer weights times 2 to 8 tokens of 16-bit inputs: as for one token, codes go from memory to the
   dot products in registers, each decoded once for AT_ONCE tokens. More tokens than that pass over a
   block while it lies in a cache. */

#include "integers.h"

#define AHEAD 4096 /* bytes of each plane fetched in advance */
#define AT_ONCE 4
#define P 2 /* planes of inputs */

typedef struct {
    const weight_t *w;
    const inputs_t *x;
    const cells_t *cells;
    float *y;
    int64_t stride, block, token; /* the first of its tokens */
} few_t;

ALWAYS void few_step(vi32 sums[SUBS][AT_ONCE][P], const uint8_t *const *plane, int half, const int8_t *x,
                     int64_t columns, int widths, int planes, int T) {
    raw_t raw[SUBS];
    UNROLL for (int s = 0; s < SUBS; s++) {
        const uint8_t *at[MAX_PLANES];
        UNROLL for (int k = 0; k < planes; k++) at[k] = plane[k] + s * VB;
        raw[s] = load_raw(at, half, widths, planes);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        vu8 c[SUBS];
        UNROLL for (int s = 0; s < SUBS; s++) c[s] = decode(raw + s, half, i, widths, planes);
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int p = 0; p < P; p++) {
            vi32 in = four(x + (t * P + p) * columns + 4 * i);
            UNROLL for (int s = 0; s < SUBS; s++)
                sums[s][t][p] = dot4(sums[s][t][p], c[s], in, widths == 0x8);
        }
    }
}

ALWAYS void few(const few_t *job, int widths, int planes, int T) {
    const weight_t *w = job->w;
    const cells_t *cells = job->cells;
    const uint8_t *plane[MAX_PLANES];
    int64_t columns = job->x->columns, tokens = job->x->tokens;
    UNROLL for (int k = 0; k < planes; k++)
        plane[k] = w->plane[k] + job->block * w->units * w->plane_stride[k];
    vf32 y[SUBS][AT_ONCE] = {{{0}}};
    const int8_t *x = job->x->codes + job->token * P * columns;
    for (int64_t i = 0; i < cells->count; i++) {
        vi32 sums[SUBS][AT_ONCE][P] = {{{{0}}}};
        int64_t step = cells->cell[i].start, end = step + cells->cell[i].steps;
        while (step < end) {
            if (!(step & 1)) {
                UNROLL for (int k = 0; k < planes; k++) {
                    int b = widths >> (4 * (planes - 1 - k)) & 15;
                    UNROLL for (int v = 0; v < b; v++) __builtin_prefetch(plane[k] + 64 * v + AHEAD);
                }
                few_step(sums, plane, 0, x, columns, widths, planes, T);
                x += STEP;
                if (++step == end) break;
            }
            few_step(sums, plane, 1, x, columns, widths, planes, T);
            UNROLL for (int k = 0; k < planes; k++) plane[k] += w->plane_stride[k];
            x += STEP, step++;
        }
        int64_t group = cells->cell[i].group, number = i * tokens + job->token;
        UNROLL for (int s = 0; s < SUBS; s++) {
            vf32 scale = weight_scale(w, job->block, group, s);
            UNROLL for (int t = 0; t < T; t++) {
                vi32 sum = add(sums[s][t][1], times256(sums[s][t][0]));
                if (cells->zero[0]) sum = less_zero(w, sum, cells->zero[1][number + t], job->block, group, s);
                y[s][t] += to_f32(sum) * cells->scale[number + t] * scale;
            }
        }
    }
    UNROLL for (int t = 0; t < T; t++) for (int s = 0; s < SUBS; s++)
        put_rows(w, job->y + (job->token + t) * job->stride, job->block, s,
                 y[s][t] * row_factor(w, job->block, s));
}

typedef void (*few_f)(const few_t *);
#define FEW(widths, count)                                                   \
    static void few_##widths##_1(const few_t *j) { few(j, widths, count, 1); } \
    static void few_##widths##_2(const few_t *j) { few(j, widths, count, 2); } \
    static void few_##widths##_3(const few_t *j) { few(j, widths, count, 3); } \
    static void few_##widths##_4(const few_t *j) { few(j, widths, count, 4); } \
    static const few_f few_##widths[] = {few_##widths##_1, few_##widths##_2, few_##widths##_3, few_##widths##_4};
#if VB == 64 /* elsewhere registers are too few */
FEW(0x2, 1)
FEW(0x4, 1)
FEW(0x8, 1)
FEW(0x21, 2)
FEW(0x42, 2)
#endif

static const few_f *find(const weight_t *w, const inputs_t *x) {
    if (x->planes != P || x->tokens > 2 * AT_ONCE || w->table) return NULL;
#if VB == 64
    switch (plane_widths(w)) {
    case 0x2: return few_0x2;
    case 0x4: return few_0x4;
    case 0x8: return few_0x8;
    case 0x21: return few_0x21;
    case 0x42: return few_0x42;
    }
#endif
    return NULL;
}

/* Whether it did them: 2 to 8 tokens of two planes, and codes of its widths. */
int product_few(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    const few_f *kernels = find(w, x);
    if (!kernels) return 0;
    cells_t cells = make_cells(w, x, LONGEST, 0);
    few_t job = {.w = w, .x = x, .cells = &cells, .y = y, .stride = stride};
    int64_t T = x->tokens, parts = (T + AT_ONCE - 1) / AT_ONCE;
    for (job.block = first; job.block < last; job.block++)
        for (int64_t k = 0; k < parts; k++) {
            job.token = T * k / parts;
            kernels[T * (k + 1) / parts - job.token - 1](&job);
        }
    return 1;
}

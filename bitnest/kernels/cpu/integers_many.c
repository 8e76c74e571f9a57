/* Integer weights times many tokens.

   GANG blocks of rows at a time. PANEL columns of them are unpacked to bytes, which stay in L1 while
   TILE tokens after another pass over them: GANG x TILE accumulators in registers, weights loaded
   once for TILE dot products and inputs once for GANG. Each plane of inputs is a pass of its own; the
   sum is shifted up 8 bits between them. Inputs are packed beforehand so that those of a tile and a
   panel lie together. */

#include "integers.h"

#define GANG (VB == 64 ? 4 : 1)
#define TILE (SPECIAL ? 6 : 2)
#define PANEL 256 /* columns */

typedef struct {
    const weight_t *w;
    const inputs_t *x;
    const cells_t *cells;
    const uint8_t *panel; /* [GANG][PANEL / STEP][256] */
    int64_t block;        /* the first of the gang */
    float *sums;          /* [tokens][GANG][16] */
    int32_t *carry;       /* the same, integers */
} many_t;

/* Tokens [first, first + T): their inputs, and what packs them. */
typedef struct {
    int64_t token;
    const int8_t *packed; /* of the panel's columns: [P][T][PANEL] */
} tile_t;

/* Four columns of T tokens after another; from: [T][stride]. */
ALWAYS void interleave(const int8_t *from, int64_t stride, int64_t count, int T, int8_t *out) {
    for (int64_t i = 0; i < count; i += 4, out += 4 * T)
        UNROLL for (int t = 0; t < T; t++) memcpy(out + 4 * t, from + t * stride + i, 4);
}

static void interleave_any(const int8_t *from, int64_t stride, int64_t count, int T, int8_t *out) {
    switch (T) {
    case 1: interleave(from, stride, count, 1, out); return;
    case 2: interleave(from, stride, count, 2, out); return;
    case 3: interleave(from, stride, count, 3, out); return;
    case 4: interleave(from, stride, count, 4, out); return;
    case 5: interleave(from, stride, count, 5, out); return;
    default: interleave(from, stride, count, 6, out);
    }
}

/* Inputs as [panel][tile][P][tile's tokens][PANEL]: a pass over a panel reads a run of memory, and
   every token's columns lie at an offset that is known to the compiler. */
static void pack(const inputs_t *x, int64_t tiles, int8_t *out) {
    for (int64_t start = 0; start < x->columns; start += PANEL)
        for (int64_t k = 0; k < tiles; k++) {
            int64_t token = x->tokens * k / tiles, end = x->tokens * (k + 1) / tiles;
            size_t count = (size_t)(x->columns - start < PANEL ? x->columns - start : PANEL);
            for (int p = 0; p < x->planes; p++)
                for (int64_t t = token; t < end; t++, out += PANEL)
                    memcpy(out, x->codes + (t * x->planes + p) * x->columns + start, count);
        }
}

#define SET(a, value)                                                                            \
    UNROLL for (int r = 0; r < G * SUBS; r++) UNROLL for (int t = 0; t < T; t++) {               \
        a[r][t] = (value);                                                                       \
    }

/* Adds a cell's sums, or of three planes' the first's, to the float sums. */
ALWAYS void flush(const many_t *job, const tile_t *tile, int64_t i, vi32 a[GANG * SUBS][TILE], int G,
                  int T, int first) {
    const weight_t *w = job->w;
    const cells_t *cells = job->cells;
    const cell_t *cell = cells->cell + i;
    const int32_t *zero = cells->zero[!first];
    vf32 scale[GANG * SUBS];
    UNROLL for (int r = 0; r < G * SUBS; r++)
        scale[r] = weight_scale(w, job->block + r / SUBS, cell->group, r % SUBS);
    int64_t number = i * job->x->tokens + tile->token;
    float *y = job->sums + tile->token * GANG * ROWS;
    UNROLL for (int t = 0; t < T; t++) {
        vf32 input = all_f32(cells->scale[number + t]);
        vi32 z = all_i32(zero ? zero[number + t] : 0);
        UNROLL for (int r = 0; r < G * SUBS; r++) {
            vi32 sum = sub(a[r][t], w->zeros ? mul(z, zero_points(w, job->block + r / SUBS, cell->group,
                                                                  r % SUBS))
                                             : z);
            vf32 value = to_f32(sum) * input * scale[r];
            float *at = y + (t * GANG * SUBS + r) * LANES;
            STORE(vf32, at, LOAD(vf32, at) + (first ? value * 65536.0f : value));
        }
    }
}

/* Dual grain: integer scales before the sum is rounded. */
ALWAYS void flush_whole(const many_t *job, const tile_t *tile, int64_t i,
                        vi32 a[GANG * SUBS][TILE], int G, int T) {
    const weight_t *w = job->w;
    const cells_t *cells = job->cells;
    const cell_t *cell = cells->cell + i;
    UNROLL for (int r = 0; r < G * SUBS; r++) {
        int64_t block = job->block + r / SUBS;
        vi32 scale = integer_scale(w, block, cell->group, r % SUBS);
        UNROLL for (int t = 0; t < T; t++) {
            int64_t token = tile->token + t, number = i * job->x->tokens + token;
            int64_t at = (token * GANG * SUBS + r) * LANES;
            vi32 sum = a[r][t];
            if (cells->zero[1])
                sum = less_zero(w, sum, cells->zero[1][number], block, cell->group, r % SUBS);
            sum = mul(sum, scale);
            if (cell->resumes) sum = add(sum, LOAD(vi32, job->carry + at));
            if (cell->goes_on)
                STORE(vi32, job->carry + at, sum);
            else
                STORE(vf32, job->sums + at,
                      LOAD(vf32, job->sums + at) + to_f32(sum) * cells->scale[number]);
        }
    }
}

ALWAYS void carry_over(const many_t *job, const tile_t *tile, vi32 a[GANG * SUBS][TILE], int G, int T,
                       int out) {
    UNROLL for (int r = 0; r < G * SUBS; r++) UNROLL for (int t = 0; t < T; t++) {
        int32_t *at = job->carry + ((tile->token + t) * GANG * SUBS + r) * LANES;
        if (out)
            STORE(vi32, at, a[r][t]);
        else
            a[r][t] = LOAD(vi32, at);
    }
}

/* Cells [from, to), which lie in the panel. */
ALWAYS void many(const many_t *job, const tile_t *tile, int64_t from, int64_t to, int G, int T, int wide) {
    const inputs_t *x = job->x;
    for (int64_t i = from; i < to; i++) {
        const cell_t *cell = job->cells->cell + i;
        vi32 a[GANG * SUBS][TILE];
        SET(a, (vi32){0});
        if (cell->resumes && !job->cells->whole_rows) carry_over(job, tile, a, G, T, 0);
        for (int p = 0; p < x->planes; p++) {
            if (p == 1 && x->planes == 3) {
                flush(job, tile, i, a, G, T, 1);
                SET(a, (vi32){0});
            } else if (p) {
                SET(a, times256(a[r][t]));
            }
            int64_t start = cell->start % (PANEL / STEP);
            const uint8_t *c = job->panel + start * 256;
            const int8_t *in = tile->packed + p * PANEL * T + start * STEP;
            for (int32_t step = 0; step < cell->steps; step++, c += 256, in += STEP) {
                UNROLL for (int v = 0; v < 4; v++) {
                    vu8 codes[GANG * SUBS];
                    UNROLL for (int r = 0; r < G * SUBS; r++)
                        codes[r] = LOAD(vu8, c + 64 * v + r / SUBS * (PANEL * 16) + r % SUBS * VB);
                    UNROLL for (int t = 0; t < T; t++) {
                        vi32 four_columns = four(in + t * PANEL + 4 * v);
                        UNROLL for (int r = 0; r < G * SUBS; r++)
                            a[r][t] = dot4(a[r][t], codes[r], four_columns, wide);
                    }
                }
            }
        }
        if (job->cells->whole_rows)
            flush_whole(job, tile, i, a, G, T);
        else if (cell->goes_on)
            carry_over(job, tile, a, G, T, 1);
        else
            flush(job, tile, i, a, G, T, 0);
    }
}

#define MANY(G, T)                                                                               \
    static void many_##G##_##T(const many_t *job, const tile_t *tile, int64_t from, int64_t to) { \
        many(job, tile, from, to, G, T, 1);                                                      \
    }
#define MANY_TOKENS(G) MANY(G, 3) MANY(G, 4) MANY(G, 5) MANY(G, 6)
MANY(1, 1)
MANY(1, 2)
#if SPECIAL
MANY_TOKENS(1)
#endif
#if VB == 64
MANY(4, 1)
MANY(4, 2)
MANY_TOKENS(4)
#endif
typedef void (*many_f)(const many_t *, const tile_t *, int64_t, int64_t);
static const many_f alone[] = {
    many_1_1, many_1_2,
#if SPECIAL
    many_1_3, many_1_4, many_1_5, many_1_6,
#endif
};
#if VB == 64
static const many_f together[] = {many_4_1, many_4_2, many_4_3, many_4_4, many_4_5, many_4_6};
#else
#define together alone
#endif

/* The float sums of a gang, rounded by nobody yet, to rows of y. */
static void put_gang(const many_t *job, float *y, int64_t stride, int G) {
    for (int64_t t = 0; t < job->x->tokens; t++)
        for (int r = 0; r < G * SUBS; r++) {
            const float *from = job->sums + (t * GANG * SUBS + r) * LANES;
            int64_t block = job->block + r / SUBS;
            put_rows(job->w, y + t * stride, block, r % SUBS,
                     LOAD(vf32, from) * row_factor(job->w, block, r % SUBS));
        }
}

void product_many(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first,
                  int64_t last) {
    cells_t cells = make_cells(w, x, PANEL, 1);
    int64_t T = x->tokens, tiles = (T + TILE - 1) / TILE;
    size_t size = (size_t)T * GANG * ROWS * 4;
    uint8_t *panel = scratch(2, GANG * PANEL * 16);
    int64_t panels = (x->columns + PANEL - 1) / PANEL;
    int8_t *packed = scratch(3, (size_t)(T * x->planes * panels * PANEL));
    many_t job = {.w = w, .x = x, .cells = &cells, .panel = panel};
    job.sums = scratch(4, size);
    job.carry = scratch(5, size);
    pack(x, tiles, packed);
    for (int64_t block = first; block < last;) {
        int G = last - block >= GANG ? GANG : 1;
        const many_f *kernels = G == GANG ? together : alone;
        job.block = block;
        memset(job.sums, 0, size);
        for (int64_t from = 0, to = 0; from < cells.count; from = to) {
            int64_t number = cells.cell[from].start / (PANEL / STEP), start = number * (PANEL / STEP);
            int64_t end = start;
            for (; to < cells.count && cells.cell[to].start < start + PANEL / STEP; to++)
                end = cells.cell[to].start + cells.cell[to].steps;
            for (int g = 0; g < G; g++)
                unpack(w, block + g, start, end - start, panel + g * PANEL * 16);
            const int8_t *in = packed + number * PANEL * x->planes * T;
            for (int64_t k = 0; k < tiles; k++) {
                int64_t token = T * k / tiles, n = T * (k + 1) / tiles - token;
                tile_t tile = {token, in + token * x->planes * PANEL};
                kernels[n - 1](&job, &tile, from, to);
            }
        }
        put_gang(&job, y, stride, G);
        block += G;
    }
}

/* Products of many tokens with weights that become bfloat16: panels of decoded weights, tiles of sums.

   A lane group is LANES rows of a block. A panel is two lane groups by DEPTH_UNITS units of decoded
   weights, which stay in the first cache while all tokens pass: [lane group][element], an element
   being a vector of pairs of columns where the machine multiplies pairs of bfloat16, else of float32
   of one column. Inputs are laid out once as [tile][element][T] to be read in the order they are
   used. A tile is T tokens by two lane groups: sums of the running group, and totals, to which a
   group is added with its scale. Totals of a block of tokens wait in scratch between panels. */

#include "tables.h"

#define DEPTH_UNITS 8 /* 256 columns */
#define ELEMENTS (PAIRS ? 1 : 2) /* of a step */
#define DEPTH (DEPTH_UNITS * STEPS * ELEMENTS)
#define TILE (VB == 64 ? 6 : 4) /* tokens at most */
#define TOKENS (22 * TILE)      /* of a block of tokens */

ALWAYS void decode_panel(const weight_t *w, int64_t block, int sub, int64_t first, int64_t last, vu16 *panel, const lookup_t *table,
                   const int bits, const int form) {
    const lookup_t l = *table;
    const uint8_t *p[MAX_PLANES];
    sink_t s;
    planes_at(w, block, first, sub, p);
    for (int64_t unit = first; unit < last; unit++) {
        s.panel = panel + (unit - first) * STEPS * ELEMENTS;
        steps(p, &l, &s, bits, form, 0, 0);
        next_unit(p, bits, form);
    }
}

typedef void (*decode_t)(const weight_t *, int64_t, int, int64_t, int64_t, vu16 *, const lookup_t *);
#define DECODER(name, bits, form)                                                                              \
    static void name(const weight_t *w, int64_t b, int s, int64_t u, int64_t v, vu16 *o, const lookup_t *l) {     \
        decode_panel(w, b, s, u, v, o, l, bits, form);                                                                 \
    }
DECODER(packed1, 1, PACKED)
DECODER(packed2, 2, PACKED)
DECODER(packed3, 3, PACKED)
DECODER(packed4, 4, PACKED)
DECODER(packed5, 5, PACKED)
DECODER(packed6, 6, PACKED)
DECODER(packed7, 7, PACKED)
DECODER(packed8, 8, PACKED)
DECODER(twos3, 3, TWOS)
DECODER(twos4, 4, TWOS)
DECODER(twos5, 5, TWOS)
DECODER(twos6, 6, TWOS)
DECODER(twos7, 7, TWOS)
DECODER(twos8, 8, TWOS)
DECODER(ones2, 2, ONES)
DECODER(ones3, 3, ONES)
DECODER(ones4, 4, ONES)
DECODER(ones5, 5, ONES)
DECODER(ones6, 6, ONES)
DECODER(ones7, 7, ONES)
DECODER(ones8, 8, ONES)
static const decode_t DECODERS[3][9] = {
    {0, packed1, packed2, packed3, packed4, packed5, packed6, packed7, packed8},
    {0, 0, 0, twos3, twos4, twos5, twos6, twos7, twos8},
    {0, 0, ones2, ones3, ones4, ones5, ones6, ones7, ones8},
};


static void decode_dense(const weight_t *w, int64_t block, int sub, int64_t first, int64_t last, vu16 *panel) {
    const uint8_t *p = (const uint8_t *)w->dense + (block * w->units + first) * 64 * STEPS + sub * VB;
    sink_t s = {.panel = panel};
    for (int64_t step = 0; step < (last - first) * STEPS; step++, s.panel += ELEMENTS) emit(&s, 0, 0, at(p, (int)step));
}

/* Inputs of the tokens as [tile][element][T]; tokens beyond the last are zero. */
static void order_inputs(const inputs_t *x, int64_t first, int64_t count, int64_t elements, int T, uint32_t *out) {
    for (int64_t tile = 0; tile * T < count; tile++, out += elements * T)
        for (int k = 0; k < T; k++) {
            int64_t token = tile * T + k;
            const uint16_t *row = x->halves + (first + token) * x->columns;
            if (token >= count)
                for (int64_t i = 0; i < elements; i++) out[i * T + k] = 0;
            else if (PAIRS)
                for (int64_t i = 0; i < elements; i++) memcpy(out + i * T + k, row + 2 * i, 4);
            else
                for (int64_t i = 0; i < elements; i++) out[i * T + k] = (uint32_t)row[i] << 16;
        }
}

/* Runs of elements of a panel that share scales. */
typedef struct {
    int runs, ends[2 * DEPTH_UNITS];
    vf32 scales[2 * DEPTH_UNITS][2];
} runs_t;

static void find_runs(const weight_t *w, int64_t lane_group, int count, int64_t first, int64_t last, runs_t *out) {
    int64_t whole = 2 * (last - first);
    out->runs = 0;
    for (int64_t half = 0; half < whole;) { /* of units */
        int64_t group = 0, end = whole;
        if (w->scale_kind != SCALE_NONE) {
            group = (2 * first + half) * SUM_COLUMNS / w->group;
            group = group < w->groups ? group : w->groups - 1; /* padding is of none */
            if (group + 1 < w->groups) end = (group + 1) * w->group / SUM_COLUMNS - 2 * first;
            end = end < whole ? end : whole;
        }
        for (int g = 0; g < count; g++)
            out->scales[out->runs][g] = weight_scale(w, (lane_group + g) / SUBS, group, (int)((lane_group + g) % SUBS));
        out->ends[out->runs++] = (int)(end * STEPS / 2 * ELEMENTS);
        half = end;
    }
}

ALWAYS vf32 plus(vf32 sum, vu16 a, uint32_t x) {
    vu32 all = (vu32){} + x;
#if PAIRS
    return dot2(sum, a, all);
#else
    return plus_product(sum, (vf32)a, (vf32)all);
#endif
}

/* T tokens by G lane groups: totals [T][G] += panel of the runs times inputs. */
ALWAYS void tile(const vu16 *const *panel, const runs_t *runs, const uint32_t *x, vf32 *totals, const int T, const int G) {
#define EACH(M) M(0) if (T > 1) { M(1) } if (T > 2) { M(2) } if (T > 3) { M(3) } if (T > 4) { M(4) } if (T > 5) { M(5) }
    vf32 sum[6][2];
#if VB == 64 /* 32 registers */
    vf32 all[6][2];
#define TOTAL(k, g) all[k][g]
#define M(k) all[k][0] = totals[k * G]; if (G > 1) all[k][1] = totals[k * G + 1];
    EACH(M)
#undef M
#else
#define TOTAL(k, g) totals[(k) * G + (g)]
#endif
    for (int run = 0, i = 0; run < runs->runs; run++) {
#define M(k) sum[k][0] = sum[k][1] = (vf32){};
        EACH(M)
#undef M
        for (int end = runs->ends[run]; i < end; i++) {
            vu16 a = panel[0][i], b = G > 1 ? panel[1][i] : a;
#define M(k)                                                          \
    sum[k][0] = plus(sum[k][0], a, x[i * T + k]);                     \
    if (G > 1) sum[k][1] = plus(sum[k][1], b, x[i * T + k]);
            EACH(M)
#undef M
        }
        vf32 first = runs->scales[run][0], second = runs->scales[run][1];
#define M(k)                                                                              \
    TOTAL(k, 0) = plus_product(TOTAL(k, 0), sum[k][0], first);                            \
    if (G > 1) TOTAL(k, 1) = plus_product(TOTAL(k, 1), sum[k][1], second);
        EACH(M)
#undef M
    }
#if VB == 64
#define M(k) totals[k * G] = all[k][0]; if (G > 1) totals[k * G + 1] = all[k][1];
    EACH(M)
#undef M
#endif
#undef TOTAL
#undef EACH
}

typedef void (*tile_t)(const vu16 *const *, const runs_t *, const uint32_t *, vf32 *);
#define TILES_OF(T)                                                                                  \
    static void tile##T##_1(const vu16 *const *p, const runs_t *r, const uint32_t *x, vf32 *s) {     \
        tile(p, r, x, s, T, 1);                                                                      \
    }                                                                                                \
    static void tile##T##_2(const vu16 *const *p, const runs_t *r, const uint32_t *x, vf32 *s) {     \
        tile(p, r, x, s, T, 2);                                                                      \
    }
TILES_OF(1)
TILES_OF(2)
TILES_OF(3)
TILES_OF(4)
TILES_OF(5)
TILES_OF(6)
static const tile_t TILES[7][3] = {
    {0}, {0, tile1_1, tile1_2}, {0, tile2_1, tile2_2}, {0, tile3_1, tile3_2},
    {0, tile4_1, tile4_2}, {0, tile5_1, tile5_2}, {0, tile6_1, tile6_2},
};

typedef struct {
    const weight_t *w;
    lookup_t lookup;
    int T;
    int64_t tiles, tokens;
    uint32_t *x;
    vu16 *panel;  /* [2][DEPTH] */
    vf32 *totals; /* [tiles][T][lane groups] */
    runs_t *runs;
} panels_t;

/* Rows of one or two lane groups for a block of tokens. */
static void rows_of(const panels_t *j, int64_t lane_group, int count, float *y, int64_t stride) {
    const weight_t *w = j->w;
    memset(j->totals, 0, (size_t)(j->tiles * j->T * count) * sizeof(vf32));
    for (int64_t unit = 0; unit < w->units; unit += DEPTH_UNITS) {
        int64_t end = unit + DEPTH_UNITS < w->units ? unit + DEPTH_UNITS : w->units;
        const vu16 *panel[2] = {j->panel, j->panel + DEPTH};
        for (int g = 0; g < count; g++) {
            int64_t block = (lane_group + g) / SUBS;
            int sub = (int)((lane_group + g) % SUBS);
            if (w->engine == TABLE)
                DECODERS[form_of(w)][w->bits](w, block, sub, unit, end, j->panel + g * DEPTH, &j->lookup);
            else if (PAIRS)
                panel[g] = (const vu16 *)w->dense + (block * w->units + unit) * STEPS;
            else
                decode_dense(w, block, sub, unit, end, j->panel + g * DEPTH);
        }
        find_runs(w, lane_group, count, unit, end, j->runs);
        for (int64_t t = 0; t < j->tiles; t++)
            TILES[j->T][count](panel, j->runs, j->x + (t * w->units + unit) * STEPS * ELEMENTS * j->T,
                               j->totals + t * j->T * count);
    }
    for (int g = 0; g < count; g++) {
        int64_t block = (lane_group + g) / SUBS;
        int sub = (int)((lane_group + g) % SUBS);
        vf32 factor = row_factor(w, block, sub);
        for (int64_t k = 0; k < j->tokens; k++)
            put_rows(w, y + k * stride, block, sub, j->totals[k * count + g] * factor);
    }
}

void panel_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    panels_t j = {.w = w};
    int64_t elements = w->units * STEPS * ELEMENTS, most = x->tokens < TOKENS ? x->tokens : TOKENS;
    size_t totals = (size_t)(most + TILE) * 2 * sizeof(vf32), panel = 2 * DEPTH * sizeof(vu16);
    uint8_t *memory = scratch(6, panel + totals + sizeof(runs_t));
    j.panel = (vu16 *)memory;
    j.totals = (vf32 *)(memory + panel);
    j.runs = (runs_t *)(memory + panel + totals);
    j.x = scratch(7, (size_t)((most + TILE) * elements) * 4);
    if (w->engine == TABLE) build_lookup(w, &j.lookup);
    for (int64_t done = 0; done < x->tokens; done += TOKENS) {
        j.tokens = x->tokens - done < TOKENS ? x->tokens - done : TOKENS;
        int64_t tiles = (j.tokens + TILE - 1) / TILE;
        j.T = (int)((j.tokens + tiles - 1) / tiles);
        j.tiles = (j.tokens + j.T - 1) / j.T;
        order_inputs(x, done, j.tokens, elements, j.T, j.x);
        for (int64_t g = first * SUBS; g < last * SUBS; g += 2)
            rows_of(&j, g, last * SUBS - g > 1 ? 2 : 1, y + done * stride, stride);
    }
}

/* Products of a few tokens with weights that look their numbers up, and with bfloat16 weights.

   A lane is a row, a step is 16 rows by 2 columns (`tables.h`): codes become bfloat16 in registers,
   are multiplied by the pair of inputs, and the scale of a group is applied to its float32 sum. More
   tokens than four go through panels (`panels.c`). What is rounded: table entries to bfloat16 when
   the table was made; inputs, which are bfloat16. A product of two pairs adds up in float32, and
   vdpbf16ps takes numbers below 2^-126 for zero, so no table may rest on them. */

#include "tables.h"

#define FEW 4 /* tokens at most that are done without a panel */

/* The sums of a token's four chains; of one half of the unit if `half` says which. */
ALWAYS vf32 total(const sink_t *s, const int k, const int half) {
    vf32 a = s->sum[4 * k] + s->sum[4 * k + 1], b = s->sum[4 * k + 2] + s->sum[4 * k + 3];
    return half == 0 ? a : half == 1 ? b : a + b;
}

ALWAYS void clear(sink_t *s) {
#define M(i) s->sum[i] = (vf32){};
    EACH16(M)
#undef M
}

/* What one call reads beside planes. */
typedef struct {
    const weight_t *w;
    const lookup_t *lookup;
    const uint16_t *x[4];
    float *y[4];
    int tokens; /* of the T: the others repeat the last one and are not written */
    int64_t first, last;
} few_t;

/* One unit, by table or of numbers as they are. */
ALWAYS void one_unit(const uint8_t **p, const lookup_t *l, sink_t *s, const int bits, const int form, const int mirrored,
                     const int T) {
    if (bits == 16) {
#define M(t) emit(s, T, t, at(p[0], t));
        EACH16(M)
#undef M
        p[0] += 64 * STEPS;
    } else {
        steps(p, l, s, bits, form, mirrored, T);
        next_unit(p, bits, form);
    }
#define M(k) if (T > k) s->x[k] += UNIT;
    EACH4(M)
#undef M
}

/* LANES rows of a block, from the sub-th LANES on. */
ALWAYS void few_rows(const few_t *j, const lookup_t *l, int64_t block, int sub, const int bits, const int form, const int mirrored,
                     const int T) {
    const weight_t *w = j->w;
    const int64_t units = w->units;
    const int whole = w->scale_kind == SCALE_NONE || w->group % UNIT == 0;
    const uint8_t *p[MAX_PLANES];
    sink_t s;
    vf32 rows[4];
    if (bits == 16) p[0] = (const uint8_t *)w->dense + block * units * 64 * STEPS + sub * VB;
    else planes_at(w, block, 0, sub, p);
#define M(k) s.x[k] = j->x[k], rows[k] = (vf32){};
    EACH4(M)
#undef M
    int64_t span = !whole ? 1 : w->scale_kind == SCALE_NONE ? units : w->group / UNIT;
    for (int64_t unit = 0, group = 0; unit < units; group++) {
        int64_t end = unit + span < units ? unit + span : units;
        clear(&s);
        if (whole) {
            for (; unit < end; unit++) one_unit(p, l, &s, bits, form, mirrored, T);
            vf32 scale = weight_scale(w, block, group, sub);
#define M(k) if (T > k) rows[k] = plus_product(rows[k], total(&s, k, 2), scale);
            EACH4(M)
#undef M
        } else { /* a unit's halves may be of two groups; padding may be of none */
            int64_t a = unit * UNIT / w->group, b = (unit * UNIT + SUM_COLUMNS) / w->group;
            one_unit(p, l, &s, bits, form, mirrored, T);
            unit++;
            vf32 low = weight_scale(w, block, a, sub), high = weight_scale(w, block, b < w->groups ? b : a, sub);
#define M(k)                                                                \
    if (T > k) {                                                            \
        rows[k] = plus_product(rows[k], total(&s, k, 0), low);              \
        rows[k] = plus_product(rows[k], total(&s, k, 1), high);             \
    }
            EACH4(M)
#undef M
        }
    }
    vf32 factor = row_factor(w, block, sub);
#define M(k) if (T > k && k < j->tokens) put_rows(w, j->y[k], block, sub, rows[k] * factor);
    EACH4(M)
#undef M
}

ALWAYS void few(const few_t *j, const int bits, const int form, const int mirrored, const int T) {
    const lookup_t lookup = *j->lookup; /* which nothing else points to: it may stay in registers */
    for (int64_t block = j->first; block < j->last; block++)
        for (int sub = 0; sub < SUBS; sub++) few_rows(j, &lookup, block, sub, bits, form, mirrored, T);
}

/* One function for each way of storing and number of tokens. */
#define FUNCTIONS(name, bits, form, mirrored)                                   \
    static void name##_1(const few_t *j) { few(j, bits, form, mirrored, 1); }   \
    TWO(name, bits, form, mirrored)                                             \
    static void name##_4(const few_t *j) { few(j, bits, form, mirrored, 4); }
#if VB == 64
#define TWO(name, bits, form, mirrored) \
    static void name##_2(const few_t *j) { few(j, bits, form, mirrored, 2); }
#else /* not worth the time to compile them */
#define TWO(name, bits, form, mirrored)
#endif
FUNCTIONS(packed1, 1, PACKED, 0)
FUNCTIONS(packed2, 2, PACKED, 0)
FUNCTIONS(packed3, 3, PACKED, 0)
FUNCTIONS(packed4, 4, PACKED, 0)
FUNCTIONS(packed5, 5, PACKED, 0)
FUNCTIONS(packed6, 6, PACKED, 0)
FUNCTIONS(packed7, 7, PACKED, 0)
FUNCTIONS(packed8, 8, PACKED, 0)
FUNCTIONS(mirrored8, 8, PACKED, 1)
FUNCTIONS(twos3, 3, TWOS, 0)
FUNCTIONS(twos4, 4, TWOS, 0)
FUNCTIONS(twos5, 5, TWOS, 0)
FUNCTIONS(twos6, 6, TWOS, 0)
FUNCTIONS(twos7, 7, TWOS, 0)
FUNCTIONS(twos8, 8, TWOS, 0)
FUNCTIONS(ones2, 2, ONES, 0)
FUNCTIONS(ones3, 3, ONES, 0)
FUNCTIONS(ones4, 4, ONES, 0)
FUNCTIONS(ones5, 5, ONES, 0)
FUNCTIONS(ones6, 6, ONES, 0)
FUNCTIONS(ones7, 7, ONES, 0)
FUNCTIONS(ones8, 8, ONES, 0)
FUNCTIONS(dense16, 16, PACKED, 0)

typedef void (*run_t)(const few_t *);
#if VB == 64
#define ROW(name) {name##_1, name##_2, name##_4}
#else
#define ROW(name) {name##_1, name##_4, name##_4}
#endif
static const run_t FEW_TABLE[3][9][3] = {
    {{0}, ROW(packed1), ROW(packed2), ROW(packed3), ROW(packed4), ROW(packed5), ROW(packed6), ROW(packed7), ROW(packed8)},
    {{0}, {0}, {0}, ROW(twos3), ROW(twos4), ROW(twos5), ROW(twos6), ROW(twos7), ROW(twos8)},
    {{0}, {0}, ROW(ones2), ROW(ones3), ROW(ones4), ROW(ones5), ROW(ones6), ROW(ones7), ROW(ones8)},
};
static const run_t FEW_MIRRORED[3] = ROW(mirrored8), FEW_DENSE[3] = ROW(dense16);

static void few_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    lookup_t lookup = {.mirrored = 0};
    const run_t *functions = FEW_DENSE;
    if (w->engine == TABLE) {
        build_lookup(w, &lookup);
        enum form form = form_of(w);
        functions = form == PACKED && w->bits == 8 && lookup.mirrored ? FEW_MIRRORED : FEW_TABLE[form][w->bits];
    }
    for (int64_t done = 0; done < x->tokens; done += 4) {
        int64_t left = x->tokens - done;
        few_t job = {.w = w, .lookup = &lookup, .first = first, .last = last, .tokens = left < 4 ? (int)left : 4};
        for (int k = 0; k < 4; k++) {
            int64_t token = done + (k < job.tokens ? k : job.tokens - 1);
            job.x[k] = x->halves + token * x->columns;
            job.y[k] = y + token * stride;
        }
        functions[job.tokens == 1 ? 0 : job.tokens == 2 ? 1 : 2](&job);
    }
}

static void whole_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    if (x->tokens <= FEW) few_product(w, x, y, stride, first, last);
    else panel_product(w, x, y, stride, first, last);
}

void table_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last) {
    if (x->parts < 2) {
        whole_product(w, x, y, stride, first, last);
        return;
    }
    /* parts are tokens of their own, whose results add up, the smallest first */
    int64_t parts = x->parts, rows = (last - first) * ROWS, from = first * ROWS;
    int64_t count = (last * ROWS < w->rows ? last * ROWS : w->rows) - from;
    float *sums = scratch(12, (size_t)(x->tokens * parts * rows) * 4);
    inputs_t all = *x;
    all.tokens = x->tokens * parts;
    whole_product(w, &all, sums - from, rows, first, last);
    for (int64_t t = 0; t < x->tokens; t++) {
        float *sum = sums + t * parts * rows;
        for (int64_t o = 0; o < count; o++) {
            float total = sum[(parts - 1) * rows + o];
            for (int64_t p = parts - 2; p >= 0; p--) total += sum[p * rows + o];
            y[t * stride + from + o] = total;
        }
    }
}

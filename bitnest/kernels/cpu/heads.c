/* Attention of a decoder over cached keys and values, grouped queries, causal, with a window.

       y = softmax(scale q K^T) V

   Positions go by in stretches: scores of a stretch, then the running maximum, sums and outputs of
   all queries that share the keys are brought up to date, as in FlashAttention (Dao et al. 2022).
   Scores of 16 positions come at once from 16 keys side by side, so no sum runs across a vector. */

#include "runtime.h"

#include <math.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define STRETCH CACHE_STEP /* positions */
#define QUERIES 16   /* that go together, of one head of keys */
#define TOKENS 4     /* of them, at most */

static int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

static floats load_halves(const uint16_t *from) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    float out[LANES];
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
    _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1)));
    return *(loose *)out;
#else
    _Float16 in[LANES];
    floats out;
    memcpy(in, from, sizeof in);
    for (int i = 0; i < LANES; i++) out[i] = (float)in[i];
    return out;
#endif
}

static uint16_t to_half(float x) {
#ifdef __F16C__
    return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0);
#else
    _Float16 half = (_Float16)x;
    uint16_t out;
    memcpy(&out, &half, 2);
    return out;
#endif
}

static void store(const cache_t *c, void *array, int64_t at, float x) {
    if (c->halves) ((uint16_t *)array)[at] = to_half(x);
    else ((float *)array)[at] = x;
}

static inline floats load(const void *array, int64_t at, int halves) {
    if (halves) return load_halves((const uint16_t *)array + at);
    return *(const loose *)((const float *)array + at);
}

/* 1 / sqrt(mean(x^2) + eps) of what a head's norm is over. */
static float norm_factor(const attention_t *how, const float *row, int64_t head, int64_t heads) {
    int64_t count = how->norm == 2 ? heads * how->width : how->width;
    const float *x = how->norm == 2 ? row : row + head * how->width;
    return 1.0f / sqrtf(dot(x, x, count) / (float)count + how->eps);
}

/* Norm, clip and turn one head: out [width]. */
static void prepare(const attention_t *how, const float *row, int64_t head, int64_t heads, const float *norm,
                    int64_t position, float *out) {
    const float *x = row + head * how->width;
    const float *cosines = how->cosines + position * how->rotary, *sines = how->sines + position * how->rotary;
    float turned[1024];
    float factor = norm ? norm_factor(how, row, head, heads) : 1;
    if (norm && how->norm == 2) norm += head * how->width;
    for (int64_t i = 0; i < how->width; i++) {
        float value = norm ? x[i] * factor * norm[i] : x[i];
        if (how->clip > 0) value = fminf(fmaxf(value, -how->clip), how->clip);
        turned[i] = value;
    }
    int64_t half = how->rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = turned[i] * cosines[i] - turned[i + half] * sines[i];
        out[i + half] = turned[i + half] * cosines[i + half] + turned[i] * sines[i + half];
    }
    for (int64_t i = how->rotary; i < how->width; i++) out[i] = turned[i];
}

static void append_token(const attend_t *a, int64_t t, int64_t head) {
    const attention_t *how = a->how;
    const cache_t *c = &a->cache;
    int64_t width = how->width, wide = padded(width), position = a->past + t;
    float key[1024];
    prepare(how, a->k + t * how->kv_heads * width, head, how->kv_heads, how->norm ? how->k_norm : NULL, position, key);
    int64_t at = (head * c->capacity / LANES + position / LANES) * width * LANES + position % LANES;
    for (int64_t i = 0; i < width; i++) store(c, c->keys, at + i * LANES, key[i]);
    const float *value = a->v + (t * how->kv_heads + head) * width;
    at = (head * c->capacity + position) * wide;
    for (int64_t i = 0; i < wide; i++) {
        float x = i < width ? value[i] : 0;
        if (how->clip > 0) x = fminf(fmaxf(x, -how->clip), how->clip);
        store(c, c->values, at + i, x);
    }
}

/* Keys and values of all tokens into the cache. Queries are turned where they are used. */
void append(const attend_t *a, int thread, int threads) {
    int64_t first, last, heads = a->how->kv_heads;
    share(a->tokens * heads, 1, thread, threads, &first, &last);
    for (int64_t i = first; i < last; i++) append_token(a, i / heads, i % heads);
}

int64_t heads_scratch(const attention_t *how) {
    return QUERIES * (how->width + padded(how->width) + STRETCH + 4);
}

/* Queries that go together, and what has come of them so far. */
typedef struct {
    int64_t count, head;             /* of queries; the head of keys */
    int64_t from[QUERIES], to[QUERIES]; /* positions that each sees */
    float *q, *y, *score;            /* [QUERIES][width], [QUERIES][wide], [QUERIES][STRETCH] */
    float most[QUERIES], total[QUERIES];
} bundle_t;

/* Scores of a stretch for 4 queries from `row` on (fewer are repeated). */
static inline void score_four(const cache_t *c, const bundle_t *b, int64_t width, int64_t block, int64_t row, int halves) {
    enum { n = STRETCH / LANES };
    const float *q[4];
    floats sum[4][n] = {0};
    for (int r = 0; r < 4; r++) q[r] = b->q + (row + r < b->count ? row + r : row) * width;
    int64_t at = (b->head * c->capacity / LANES + block) * width * LANES;
    for (int64_t i = 0; i < width; i++)
        for (int j = 0; j < n; j++) {
            floats keys = load(c->keys, at + (j * width + i) * LANES, halves);
            for (int r = 0; r < 4; r++) sum[r][j] += keys * q[r][i];
        }
    for (int r = 0; r < 4 && row + r < b->count; r++)
        for (int j = 0; j < n; j++) *(loose *)(b->score + (row + r) * STRETCH + j * LANES) = sum[r][j];
}

static void score_stretch(const cache_t *c, const bundle_t *b, int64_t width, int64_t start) {
    for (int64_t row = 0; row < b->count; row += 4) {
        if (c->halves) score_four(c, b, width, start / LANES, row, 1);
        else score_four(c, b, width, start / LANES, row, 0);
    }
}

/* Scores of one query to weights; the maximum and the sum brought up to date, y scaled with them. */
static void weigh(bundle_t *b, int64_t r, int64_t wide, int64_t start, int64_t count) {
    float *score = b->score + r * STRETCH, most = b->most[r];
    int64_t from = b->from[r] - start, to = b->to[r] - start;
    for (int64_t i = 0; i < count; i++) {
        if (i < from || i >= to) score[i] = -INFINITY;
        most = score[i] > most ? score[i] : most;
    }
    if (most == -INFINITY) { /* nothing of this stretch is seen, nor was before */
        for (int64_t i = 0; i < count; i++) score[i] = 0;
        return;
    }
    float shrink = expf(b->most[r] - most);
    floats sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        floats weight = exp_floats(*(loose *)(score + i) - most);
        *(loose *)(score + i) = weight;
        sum += weight;
    }
    b->total[r] = b->total[r] * shrink + sum_floats(sum);
    b->most[r] = most;
    if (shrink != 1)
        for (int64_t i = 0; i < wide; i++) b->y[r * wide + i] *= shrink;
}

/* y += weights V for 4 queries and up to 4 vectors of columns. */
static inline void mix_four(const cache_t *c, bundle_t *b, int64_t wide, int64_t start, int64_t count, int64_t row, int64_t column, int n, int halves) {
    floats sum[4][4];
    int64_t at = (b->head * c->capacity + start) * wide + column;
    int64_t of[4];
    for (int r = 0; r < 4; r++) {
        of[r] = row + r < b->count ? row + r : row;
        for (int j = 0; j < n; j++) sum[r][j] = *(loose *)(b->y + of[r] * wide + column + j * LANES);
    }
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < n; j++) {
            floats value = load(c->values, at + i * wide + j * LANES, halves);
            for (int r = 0; r < 4; r++) sum[r][j] += value * b->score[of[r] * STRETCH + i];
        }
    for (int r = 0; r < 4 && row + r < b->count; r++)
        for (int j = 0; j < n; j++) *(loose *)(b->y + of[r] * wide + column + j * LANES) = sum[r][j];
}

static void mix_stretch(const cache_t *c, bundle_t *b, int64_t wide, int64_t start, int64_t stop) {
    for (int64_t row = 0; row < b->count; row += 4)
        for (int64_t column = 0; column < wide; column += 4 * LANES) {
            int n = (int)((wide - column < 4 * LANES ? wide - column : 4 * LANES) / LANES);
            if (c->halves && n == 4) mix_four(c, b, wide, start, stop - start, row, column, 4, 1);
            else if (c->halves) mix_four(c, b, wide, start, stop - start, row, column, n, 1);
            else mix_four(c, b, wide, start, stop - start, row, column, n, 0);
        }
}

static void see_all(const attend_t *a, bundle_t *b) {
    int64_t wide = padded(a->how->width), first = b->from[0], last = 0;
    memset(b->y, 0, b->count * wide * sizeof(float));
    for (int64_t r = 0; r < b->count; r++) {
        if (b->from[r] < first) first = b->from[r];
        if (b->to[r] > last) last = b->to[r];
        b->most[r] = -INFINITY;
        b->total[r] = 0;
    }
    for (int64_t start = first / STRETCH * STRETCH; start < last; start += STRETCH) {
        int64_t stop = last < start + STRETCH ? last : start + STRETCH;
        score_stretch(&a->cache, b, a->how->width, start);
        for (int64_t r = 0; r < b->count; r++) weigh(b, r, wide, start, (stop - start + LANES - 1) / LANES * LANES);
        mix_stretch(&a->cache, b, wide, start, stop);
    }
}

/* Tokens t to t + n - 1, queries `group` to `group + share` of one head of keys. */
static void attend_bundle(const attend_t *a, float *scratch, int64_t head, int64_t group, int64_t heads, int64_t t, int64_t n) {
    const attention_t *how = a->how;
    int64_t width = how->width, wide = padded(width), all = how->heads, per = all / how->kv_heads;
    bundle_t b = {.count = heads * n, .head = head, .q = scratch};
    b.y = b.q + QUERIES * width;
    b.score = b.y + QUERIES * wide;
    for (int64_t r = 0; r < b.count; r++) {
        int64_t token = t + r / heads, query = head * per + group + r % heads;
        float *q = b.q + r * width;
        prepare(how, a->q + token * all * width, query, all, how->norm ? how->q_norm : NULL, a->past + token, q);
        for (int64_t i = 0; i < width; i++) q[i] *= how->scale;
        b.to[r] = a->past + token + 1;
        b.from[r] = how->window && b.to[r] > how->window ? b.to[r] - how->window : 0;
    }
    see_all(a, &b);
    for (int64_t r = 0; r < b.count; r++) {
        int64_t token = t + r / heads, query = head * per + group + r % heads;
        float *y = a->y + (token * all + query) * width;
        for (int64_t i = 0; i < width; i++) y[i] = b.y[r * wide + i] / b.total[r];
    }
}

/* After a barrier behind `append`. Bundles of queries that share keys go round the threads. */
void attend(const attend_t *a, int thread, int threads) {
    const attention_t *how = a->how;
    int64_t per = how->heads / how->kv_heads;
    int64_t heads = per < QUERIES ? per : QUERIES;
    if (a->tokens == 1 && how->kv_heads < threads) heads = (per * how->kv_heads + threads - 1) / threads;
    if (heads > per) heads = per;
    int64_t n = QUERIES / heads < TOKENS ? QUERIES / heads : TOKENS, unit = 0;
    float *scratch = a->scratch + thread * heads_scratch(how);
    for (int64_t t = 0; t < a->tokens; t += n)
        for (int64_t head = 0; head < how->kv_heads; head++)
            for (int64_t group = 0; group < per; group += heads, unit++) {
                if (unit % threads != thread) continue;
                int64_t left = per - group < heads ? per - group : heads;
                attend_bundle(a, scratch, head, group, left, t, a->tokens - t < n ? a->tokens - t : n);
            }
}

/* Attention over INT8 and INT4 codes in 16-bit integers, for AVX2 and AVX-512.

   Keys: a lane is a token. Four bytes of 16 (8) tokens' codes are brought side by side; with W = 4
   channels in them (8 of 4 bits), shifting and masking gives pairs of 16-bit channels

       step f of dword u:   (W u + f, W u + W / 2 + f),    f = 0 .. W / 2 - 1

   and k = low + scale code, turned by the angles of the tile, is computed in fixed point, 15-bit
   products rounded to nearest, in units of 2^-13 of the largest |(k_i, k_j)| that a pair of channels
   that turns together can have. These units go into the queries, which become integers of 14 bits.
   Sums of products are exact. What is rounded is below a hundredth of a step of 8-bit codes.

   Values: weights times scales become integers of 15 bits, products of two tokens are added at once.
   Sums are exact and become floats once a tile; their order is that of interleaved registers. */

#include "attention.h"
#include "floats.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
typedef __m512i vec;
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, x) _mm512_storeu_si512(p, x)
#define ALL32(x) _mm512_set1_epi32(x)
#define ALL16(x) _mm512_set1_epi16(x)
#define ZERO() _mm512_setzero_si512()
#define AND(a, b) _mm512_and_si512(a, b)
#define ADD16(a, b) _mm512_add_epi16(a, b)
#define SUB16(a, b) _mm512_sub_epi16(a, b)
#define ADD32(a, b) _mm512_add_epi32(a, b)
#define ROUNDED(a, b) _mm512_mulhrs_epi16(a, b)
#define LEFT(a, n) _mm512_slli_epi16(a, n)
#define RIGHT(a, n) _mm512_srli_epi16(a, n)
#define LOWER(a, b) _mm512_unpacklo_epi16(a, b)
#define UPPER(a, b) _mm512_unpackhi_epi16(a, b)
#define FLOATS(p, x, f) _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(f))))
#define SCALED(p, x, f) _mm512_storeu_ps(p, _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(f)))
#if defined(__AVX512VNNI__)
#define DOT(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#else
#define DOT(sum, a, b) ADD32(sum, _mm512_madd_epi16(a, b))
#endif
#define BLOCK 4
#else
#define LANES 8
typedef __m256i vec;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, x) _mm256_storeu_si256((__m256i *)(p), x)
#define ALL32(x) _mm256_set1_epi32(x)
#define ALL16(x) _mm256_set1_epi16(x)
#define ZERO() _mm256_setzero_si256()
#define AND(a, b) _mm256_and_si256(a, b)
#define ADD16(a, b) _mm256_add_epi16(a, b)
#define SUB16(a, b) _mm256_sub_epi16(a, b)
#define ADD32(a, b) _mm256_add_epi32(a, b)
#define ROUNDED(a, b) _mm256_mulhrs_epi16(a, b)
#define LEFT(a, n) _mm256_slli_epi16(a, n)
#define RIGHT(a, n) _mm256_srli_epi16(a, n)
#define LOWER(a, b) _mm256_unpacklo_epi16(a, b)
#define UPPER(a, b) _mm256_unpackhi_epi16(a, b)
#define FLOATS(p, x, f) _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), _mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(f))))
#define SCALED(p, x, f) _mm256_storeu_ps(p, _mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(f)))
#define DOT(sum, a, b) ADD32(sum, _mm256_madd_epi16(a, b))
#define BLOCK 2
#endif

#define LIMIT 8191.0f /* of keys in fixed point, and of queries unless their sums would not fit */
#define SUMS 2.0e9f   /* below 2^31 by more than what rounding adds */
#define WEIGHT 32767.0f
#define INLINE static inline __attribute__((always_inline))

int attention_lanes(void) { return LANES; }

static int fits(const attention_t *a) {
    int wide = a->kind == CACHE_INT4 ? 8 : 4;
    if (a->kind != CACHE_INT8 && a->kind != CACHE_INT4) return 0;
    if (a->key_width % wide || a->key_width > 256 || a->rotated % wide) return 0;
    return a->neighbours || a->rotated / 2 % wide == 0;
}

/* cos and sin of t in 15 bits, pairs of channels of LANES tokens, in the order that keys are read:
   [ceil(tokens / LANES)][steps][cos, sin][LANES][2]. Gives the bytes; writes where `to` is not NULL. */
int64_t attention_table(int kind, int64_t rotated, int neighbours, const float *turn, int64_t tokens, int16_t *to) {
    int64_t wide = kind == CACHE_INT4 ? 8 : 4, steps = wide / 2, half = rotated / 2;
    int64_t parts = (tokens + LANES - 1) / LANES, turns = rotated / 4;
    if (to == NULL) return parts * turns * 2 * LANES * 2 * (int64_t)sizeof *to;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = 0; i < turns; i++, to += 4 * LANES) {
            int64_t per = neighbours ? steps / 2 : steps, f = neighbours ? i % per * 2 : i % per;
            for (int64_t lane = 0; lane < LANES; lane++)
                for (int64_t c = 0; c < 2; c++) {
                    int64_t channel = i / per * wide + c * steps + f, t = part * LANES + lane;
                    int64_t angle = neighbours ? channel / 2 : channel;
                    const float *at = turn + (t < tokens ? t : tokens - 1) * rotated;
                    to[2 * lane + c] = (int16_t)lrintf(at[angle] * 32767.0f);
                    to[2 * LANES + 2 * lane + c] = (int16_t)lrintf(at[half + angle] * 32767.0f);
                }
        }
    return 0;
}

/* Columns of dwords of LANES rows, `dwords` of them: to[u][lane]. */
#if LANES == 16
static void side_by_side(const uint8_t *const *rows, int64_t dwords, int32_t *to) {
    for (int64_t u = 0; u < dwords; u += 16) {
        __mmask16 held = dwords - u >= 16 ? 0xffff : (__mmask16)((1u << (dwords - u)) - 1);
        vec x[16], y[16];
        for (int i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi32(held, rows[i] + 4 * u);
        for (int i = 0; i < 16; i += 2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
                x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
            }
        for (int j = 0; j < 4; j++) { /* x[i + j]: quarter q has dword 4 q + j of rows i to i + 3 */
            y[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
            y[4 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
            y[8 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
            y[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
        }
        for (int j = 0; j < 4; j++) { /* y[j]: quarters 0 and 2 of rows 0 to 7; y[8 + j]: 1 and 3 */
            STORE(to + 16 * j, _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88));
            STORE(to + 16 * (8 + j), _mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd));
            STORE(to + 16 * (4 + j), _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88));
            STORE(to + 16 * (12 + j), _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd));
        }
        to += 256;
    }
}
#else
static void side_by_side(const uint8_t *const *rows, int64_t dwords, int32_t *to) {
    int64_t u = 0;
    for (; u + 8 <= dwords; u += 8, to += 64) {
        vec x[8], y[8];
        for (int i = 0; i < 8; i++) x[i] = LOAD(rows[i] + 4 * u);
        for (int i = 0; i < 8; i += 2) {
            y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                x[i + 2 * j] = _mm256_unpacklo_epi64(y[i + j], y[i + 2 + j]);
                x[i + 2 * j + 1] = _mm256_unpackhi_epi64(y[i + j], y[i + 2 + j]);
            }
        for (int j = 0; j < 4; j++) {
            STORE(to + 8 * j, _mm256_permute2x128_si256(x[j], x[4 + j], 0x20));
            STORE(to + 8 * (4 + j), _mm256_permute2x128_si256(x[j], x[4 + j], 0x31));
        }
    }
    for (; u < dwords; u++, to += 8)
        for (int i = 0; i < 8; i++) memcpy(to + i, rows[i] + 4 * u, 4);
}
#endif

/* Sixteen channels as 16-bit integers in the order that keys are read: of 8 channels (0, 4), (1, 5),
   (2, 6), (3, 7), or of 4 (0, 2), (1, 3). */
INLINE void place(vf x, int kind, int32_t *to) {
    const __m128i eight = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m128i four = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m128i order = kind == CACHE_INT4 ? eight : four;
    vi n = vf_round(x);
    for (int i = 0; i < 2; i++) {
        __m128i low, high;
        memcpy(&low, (char *)&n + 32 * i, 16);
        memcpy(&high, (char *)&n + 32 * i + 16, 16);
        _mm_storeu_si128((__m128i *)to + i, _mm_shuffle_epi8(_mm_packs_epi32(low, high), order));
    }
}

/* Scales and lowest values in fixed point, [step of a dword][2]; the unit of every channel. */
static void fix_scales(const attention_t *a, const tile_t *t, int32_t *scales, int32_t *lows, float *unit) {
    int64_t width = a->key_width, half = a->rotated / 2;
    int64_t at = t->b * a->key_scale_strides[0] + t->h * a->key_scale_strides[1] + t->group * width;
    float most = a->kind == CACHE_INT4 ? 15.0f : 255.0f, scale[256], low[256], range[256];
    halves_load(a->key_scale + at, width, scale);
    halves_load(a->key_low + at, width, low);
    for (int64_t i = 0; i < width; i += 16) {
        vf x = vf_load(low + i);
        vf_store(range + i, vf_max(vf_abs(x), vf_abs(x + most * vf_load(scale + i))));
    }
    memcpy(unit, range, sizeof range);
    for (int64_t i = 0; a->neighbours && i < half; i++) {
        float x = range[2 * i], y = range[2 * i + 1];
        unit[2 * i] = unit[2 * i + 1] = x * x + y * y;
    }
    for (int64_t i = 0; !a->neighbours && i < half; i++) {
        float x = range[i], y = range[i + half];
        unit[i] = unit[i + half] = x * x + y * y;
    }
    for (int64_t i = 0; i < 2 * half; i += 4) _mm_storeu_ps(unit + i, _mm_sqrt_ps(_mm_loadu_ps(unit + i)));
    for (int64_t i = 0; i < width; i += 16) {
        vf u = vf_load(unit + i), by = vf_pick(u > 0x1p-100f, LIMIT / u, vf_all(0.0f));
        place(vf_load(scale + i) * by * (most + 1), a->kind, scales + i / 2);
        place(vf_load(low + i) * by, a->kind, lows + i / 2);
        vf_store(unit + i, u * (1.0f / LIMIT));
    }
}

/* Queries times units as integers, in the order of scales; gives what one is worth. */
static float fix_query(const attention_t *a, const float *q, const float *unit, int32_t *to) {
    vf top = {0}, sum = {0};
    for (int64_t i = 0; i < a->key_width; i += 16) {
        vf x = vf_abs(vf_load(q + i) * vf_load(unit + i));
        top = vf_max(x, top), sum += x;
    }
    float most = vf_most(top), whole = vf_sum(sum) * (LIMIT * LIMIT / SUMS);
    most = whole > most ? whole : most;
    float by = most > 0x1p-100f ? LIMIT / most : 0;
    for (int64_t i = 0; i < a->key_width; i += 16) place(vf_load(q + i) * vf_load(unit + i) * by, a->kind, to + i / 2);
    return most / LIMIT;
}

INLINE vec code_of(vec x, int bits, int f) {
    if (bits == 8) return AND(f ? RIGHT(x, 1) : LEFT(x, 7), ALL16(0x7f80));
    return AND(f == 0 ? LEFT(x, 11) : f == 1 ? LEFT(x, 7) : f == 2 ? LEFT(x, 3) : RIGHT(x, 1), ALL16(0x7800));
}

typedef struct {
    const int32_t *codes, *scales, *lows, *queries; /* queries: [rows][steps of all dwords] */
    const int16_t *table;
    int64_t dwords, turned, steps; /* turned: dwords whose channels turn; steps: of all */
    int neighbours;
} keys_t;

INLINE vec key_of(const keys_t *k, int bits, int64_t u, int f) {
    int64_t step = u * (bits == 8 ? 2 : 4) + f;
    vec c = code_of(LOAD(k->codes + u * LANES), bits, f);
    return ADD16(ROUNDED(c, ALL32(k->scales[step])), ALL32(k->lows[step]));
}

INLINE void pair_of(const keys_t *k, int bits, int rows, int64_t u, int f, int64_t v, int g, const int16_t **table, vec *sums) {
    int per = bits == 8 ? 2 : 4;
    vec a = key_of(k, bits, u, f), b = key_of(k, bits, v, g);
    vec cosine = LOAD(*table), sine = LOAD(*table + 2 * LANES);
    vec x = SUB16(ROUNDED(a, cosine), ROUNDED(b, sine)), y = ADD16(ROUNDED(b, cosine), ROUNDED(a, sine));
    *table += 4 * LANES;
    for (int r = 0; r < rows; r++) {
        const int32_t *q = k->queries + r * k->steps;
        sums[2 * r] = DOT(sums[2 * r], x, ALL32(q[u * per + f]));
        sums[2 * r + 1] = DOT(sums[2 * r + 1], y, ALL32(q[v * per + g]));
    }
}

INLINE void key_sums(const keys_t *k, const int bits, const int rows, vec *sums) {
    const int16_t *table = k->table;
    int64_t half = k->turned / 2;
    vec s[2 * BLOCK];
    for (int i = 0; i < 2 * rows; i++) s[i] = ZERO();
    if (k->neighbours)
        for (int64_t u = 0; u < k->turned; u++) {
            pair_of(k, bits, rows, u, 0, u, 1, &table, s);
            if (bits == 4) pair_of(k, bits, rows, u, 2, u, 3, &table, s);
        }
    else
        for (int64_t u = 0; u < half; u++) {
            pair_of(k, bits, rows, u, 0, u + half, 0, &table, s);
            pair_of(k, bits, rows, u, 1, u + half, 1, &table, s);
            if (bits == 4) pair_of(k, bits, rows, u, 2, u + half, 2, &table, s);
            if (bits == 4) pair_of(k, bits, rows, u, 3, u + half, 3, &table, s);
        }
    for (int64_t u = k->turned; u < k->dwords; u++)
        for (int f = 0; f < (bits == 8 ? 2 : 4); f++) {
            vec x = key_of(k, bits, u, f);
            for (int r = 0; r < rows; r++)
                s[2 * r] = DOT(s[2 * r], x, ALL32(k->queries[r * k->steps + u * (bits == 8 ? 2 : 4) + f]));
        }
    for (int r = 0; r < rows; r++) sums[r] = ADD32(s[2 * r], s[2 * r + 1]);
}

static void key_sums_of(const keys_t *k, int bits, int rows, vec *sums) {
    if (bits == 8) {
        if (rows == 1) key_sums(k, 8, 1, sums);
        else if (rows == 2) key_sums(k, 8, 2, sums);
#if BLOCK == 4
        else if (rows == 3) key_sums(k, 8, 3, sums);
        else key_sums(k, 8, 4, sums);
#endif
    } else {
        if (rows == 1) key_sums(k, 4, 1, sums);
        else if (rows == 2) key_sums(k, 4, 2, sums);
#if BLOCK == 4
        else if (rows == 3) key_sums(k, 4, 3, sums);
        else key_sums(k, 4, 4, sums);
#endif
    }
}

int attention_fast_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores) {
    if (!fits(a)) return 0;
    int bits = a->kind == CACHE_INT4 ? 4 : 8;
    int64_t width = a->key_width, padded = up(width, 16), bytes = width * bits / 8, steps = padded / 2;
    int32_t *codes = room->codes, *scales = codes + 16 * up(bytes / 4, 16), *lows = scales + steps;
    int32_t *queries = lows + steps;
    float unit[256], worth[MAX_ROWS];
    fix_scales(a, t, scales, lows, unit);
    for (int r = 0; r < rows; r++)
        worth[r] = fix_query(a, room->q + r * padded, unit, queries + r * steps) * a->scaling;
    const uint8_t *from = a->keys + t->b * a->key_strides[0] + t->h * a->key_strides[1] + t->first * bytes;
    keys_t k = {codes, scales, lows, queries, a->table, bytes / 4, a->rotated * bits / 32, steps, a->neighbours};
    for (int64_t n = 0; n < t->tokens; n += LANES, k.table += a->rotated * LANES) {
        const uint8_t *tokens[LANES];
        for (int i = 0; i < LANES; i++) tokens[i] = from + (n + i < t->tokens ? n + i : t->tokens - 1) * bytes;
        side_by_side(tokens, bytes / 4, codes);
        for (int r = 0; r < rows; r += BLOCK) {
            int count = rows - r < BLOCK ? rows - r : BLOCK;
            vec sums[BLOCK];
            k.queries = queries + r * steps;
            key_sums_of(&k, bits, count, sums);
            for (int i = 0; i < count; i++) SCALED(scores + (r + i) * STRIDE + n, sums[i], worth[r + i]);
        }
    }
    return 1;
}

INLINE vec words_at(const uint8_t *p, int64_t held) {
#if LANES == 16
    __mmask32 mask = held >= 32 ? 0xffffffffu : (1u << held) - 1;
    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, p));
#else
    uint8_t tail[16] = {0};
    if (held < 16) p = memcpy(tail, p, held);
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
#endif
}

/* Sums over a tile's tokens of weight * code, of 2 LANES bytes of codes. */
INLINE void value_sums(const uint8_t *from, int64_t bytes, int64_t held, int64_t tokens, const int32_t *weights, const int bits, const int rows, vec *sums) {
    enum { PAIRS = TILE / 2 };
    vec s[4 * BLOCK];
    for (int i = 0; i < 4 * rows; i++) s[i] = ZERO();
    for (int64_t n = 0; n < tokens; n += 2, from += 2 * bytes) {
        vec x = words_at(from, held), y = words_at(n + 1 < tokens ? from + bytes : from, held), p[4];
        if (bits == 8) {
            p[0] = LOWER(x, y), p[1] = UPPER(x, y);
        } else {
            vec low = ALL16(15), x0 = AND(x, low), y0 = AND(y, low);
            p[0] = LOWER(x0, y0), p[1] = UPPER(x0, y0);
            p[2] = LOWER(RIGHT(x, 4), RIGHT(y, 4)), p[3] = UPPER(RIGHT(x, 4), RIGHT(y, 4));
        }
        for (int r = 0; r < rows; r++) {
            vec w = ALL32(weights[r * PAIRS + n / 2]);
            for (int i = 0; i < (bits == 8 ? 2 : 4); i++) s[4 * r + i] = DOT(s[4 * r + i], p[i], w);
        }
    }
    for (int i = 0; i < 4 * rows; i++) sums[i] = s[i];
}

static void value_sums_of(const uint8_t *from, int64_t bytes, int64_t held, int64_t tokens, const int32_t *weights, int bits, int rows, vec *sums) {
    if (bits == 8) {
        if (rows == 1) value_sums(from, bytes, held, tokens, weights, 8, 1, sums);
        else if (rows == 2) value_sums(from, bytes, held, tokens, weights, 8, 2, sums);
#if BLOCK == 4
        else if (rows == 3) value_sums(from, bytes, held, tokens, weights, 8, 3, sums);
        else value_sums(from, bytes, held, tokens, weights, 8, 4, sums);
#endif
    } else {
        if (rows == 1) value_sums(from, bytes, held, tokens, weights, 4, 1, sums);
        else if (rows == 2) value_sums(from, bytes, held, tokens, weights, 4, 2, sums);
#if BLOCK == 4
        else if (rows == 3) value_sums(from, bytes, held, tokens, weights, 4, 3, sums);
        else value_sums(from, bytes, held, tokens, weights, 4, 4, sums);
#endif
    }
}

/* Register i, lane j of interleaved words is word 8 (j / 4) + 4 (i % 2) + j % 4. */
static void spread_sums(const vec *sums, int bits, float worth, float low, int64_t first, int64_t width, float *to) {
    for (int i = 0; i < (bits == 8 ? 2 : 4); i++) {
        float found[LANES];
        SCALED(found, sums[i], worth);
        for (int j = 0; j < LANES; j++) {
            int64_t word = first + j / 4 * 8 + i % 2 * 4 + j % 4;
            int64_t channel = bits == 8 ? word : 2 * word + i / 2;
            if (channel < width) to[channel] += found[j] + low;
        }
    }
}

int attention_fast_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights) {
    if (a->kind != CACHE_INT8 && a->kind != CACHE_INT4) return 0;
    int bits = a->kind == CACHE_INT4 ? 4 : 8;
    int64_t bytes = (a->value_width * bits + 7) / 8, wide = up(a->value_width, 64);
    const uint8_t *from = a->values + t->b * a->value_strides[0] + t->h * a->value_strides[1] + t->first * bytes;
    int64_t at = t->b * a->value_scale_strides[0] + t->h * a->value_scale_strides[1] + t->first;
    int16_t *fixed = (int16_t *)room->codes;
    float scale[TILE], low[TILE], worth[MAX_ROWS], shift[MAX_ROWS];
    halves_load(a->value_scale + at, t->tokens, scale);
    halves_load(a->value_low + at, t->tokens, low);
    for (int r = 0; r < rows; r++, fixed += TILE) {
        const float *w = weights + r * STRIDE;
        vf top = {0}, sum = {0};
        for (int64_t n = 0; n < t->tokens; n += 16) {
            top = vf_max(vf_load(w + n) * vf_load(scale + n), top);
            sum += vf_load(w + n) * vf_load(low + n);
        }
        float most = vf_most(top), by = most > 0x1p-100f ? WEIGHT / most : 0;
        for (int64_t n = 0; n < t->tokens; n += 16) {
            vs fixed16 = __builtin_convertvector(vf_round(vf_load(w + n) * vf_load(scale + n) * by), vs);
            memcpy(fixed + n, &fixed16, sizeof fixed16);
        }
        worth[r] = most / WEIGHT, shift[r] = vf_sum(sum);
    }
    for (int64_t c = 0; c < bytes; c += 2 * LANES)
        for (int r = 0; r < rows; r += BLOCK) {
            int count = rows - r < BLOCK ? rows - r : BLOCK;
            int64_t held = bytes - c < 2 * LANES ? bytes - c : 2 * LANES;
            vec sums[4 * BLOCK];
            value_sums_of(from + c, bytes, held, t->tokens, room->codes + r * (TILE / 2), bits, count, sums);
            for (int i = 0; i < count; i++)
                spread_sums(sums + 4 * i, bits, worth[r + i], shift[r + i], c, a->value_width, room->sums + (r + i) * wide);
        }
    return 1;
}

#else

int attention_lanes(void) { return 0; }

int64_t attention_table(int kind, int64_t rotated, int neighbours, const float *turn, int64_t tokens, int16_t *to) {
    return 0;
}

int attention_fast_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores) { return 0; }

int attention_fast_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights) { return 0; }

#endif

/* Attention over 8-bit floats as bfloat16, for AVX-512 with VBMI and BF16.

   Every 8-bit float is a bfloat16: the two bytes of one are looked up by the seven bits of its
   magnitude, then given the sign. Queries and weights are the sum of two bfloat16 (of one where
   these hold them), within 2^-17; products are summed in float32.

   Keys: a lane is a token, a dword four channels, as in attention_int.c. Values: two tokens of a
   channel side by side. */

#include "attention.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS_AT_ONCE 4

typedef struct {
    __m512i low[2], high[2], sign;
} lookup_t;

INLINE lookup_t lookup_of(const room_t *room) {
    lookup_t l;
    for (int i = 0; i < 2; i++) {
        l.low[i] = _mm512_loadu_si512(room->lookup[0] + 64 * i);
        l.high[i] = _mm512_loadu_si512(room->lookup[1] + 64 * i);
    }
    l.sign = _mm512_set1_epi8((char)0x80);
    return l;
}

/* Low and high bytes of 64 codes. */
INLINE void bytes_of(const lookup_t *l, __m512i x, __m512i *low, __m512i *high) {
    *low = _mm512_permutex2var_epi8(l->low[0], x, l->low[1]);
    *high = _mm512_permutex2var_epi8(l->high[0], x, l->high[1]);
    *high = _mm512_ternarylogic_epi32(*high, x, l->sign, 0xf8); /* high | (x & sign) */
}

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

static uint16_t nearest(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* Rows a and b of x, `count` numbers, as pairs of bfloat16: [2][count / 2]; whether the second
   halves are needed. place(i): where number i goes. */
static int split(float x, uint16_t *high, uint16_t *low) {
    *high = nearest(x);
    *low = nearest(x - of_bf16(*high));
    return (*low & 0x7fff) != 0;
}

static void columns_of(const uint8_t *const *rows, int64_t dwords, int32_t *to) {
    /* 16 x 4 blocks of dwords: gathers of one quarter of four rows, then unpacked */
    for (int64_t u = 0; u < dwords; u += 4) {
        __m512i x[4], y[4];
        int64_t held = dwords - u < 4 ? dwords - u : 4;
        __mmask8 mask = (__mmask8)((1u << held) - 1);
        for (int i = 0; i < 4; i++) { /* quarter q of x[i]: row 4 q + i */
            x[i] = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(mask, rows[i] + 4 * u));
            x[i] = _mm512_inserti32x4(x[i], _mm_maskz_loadu_epi32(mask, rows[4 + i] + 4 * u), 1);
            x[i] = _mm512_inserti32x4(x[i], _mm_maskz_loadu_epi32(mask, rows[8 + i] + 4 * u), 2);
            x[i] = _mm512_inserti32x4(x[i], _mm_maskz_loadu_epi32(mask, rows[12 + i] + 4 * u), 3);
        }
        y[0] = _mm512_unpacklo_epi32(x[0], x[1]), y[1] = _mm512_unpackhi_epi32(x[0], x[1]);
        y[2] = _mm512_unpacklo_epi32(x[2], x[3]), y[3] = _mm512_unpackhi_epi32(x[2], x[3]);
        x[0] = _mm512_unpacklo_epi64(y[0], y[2]), x[1] = _mm512_unpackhi_epi64(y[0], y[2]);
        x[2] = _mm512_unpacklo_epi64(y[1], y[3]), x[3] = _mm512_unpackhi_epi64(y[1], y[3]);
        for (int i = 0; i < held; i++) _mm512_storeu_si512(to + 16 * (u + i), x[i]);
    }
}

INLINE void key_sums(const lookup_t *l, const int32_t *codes, int64_t dwords, const int32_t *q, const int planes, const int rows, __m512 *sums) {
    __m512 s[2 * ROWS_AT_ONCE];
    for (int i = 0; i < 2 * rows; i++) s[i] = _mm512_setzero_ps();
    for (int64_t u = 0; u < dwords; u++) {
        __m512i low, high;
        bytes_of(l, _mm512_loadu_si512(codes + 16 * u), &low, &high);
        __m512i even = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, low, _mm512_slli_epi16(high, 8));
        __m512i odd = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(low, 8), high);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < planes; p++) {
                const int32_t *at = q + ((r * 2 + p) * dwords + u) * 2;
                s[2 * r] = dot(s[2 * r], even, _mm512_set1_epi32(at[0]));
                s[2 * r + 1] = dot(s[2 * r + 1], odd, _mm512_set1_epi32(at[1]));
            }
    }
    for (int r = 0; r < rows; r++) sums[r] = _mm512_add_ps(s[2 * r], s[2 * r + 1]);
}

static void key_sums_of(const lookup_t *l, const int32_t *codes, int64_t dwords, const int32_t *q, int planes, int rows, __m512 *sums) {
    if (planes == 1) {
        if (rows == 1) key_sums(l, codes, dwords, q, 1, 1, sums);
        else if (rows == 2) key_sums(l, codes, dwords, q, 1, 2, sums);
        else if (rows == 3) key_sums(l, codes, dwords, q, 1, 3, sums);
        else key_sums(l, codes, dwords, q, 1, 4, sums);
    } else {
        if (rows == 1) key_sums(l, codes, dwords, q, 2, 1, sums);
        else if (rows == 2) key_sums(l, codes, dwords, q, 2, 2, sums);
        else if (rows == 3) key_sums(l, codes, dwords, q, 2, 3, sums);
        else key_sums(l, codes, dwords, q, 2, 4, sums);
    }
}

int attention_float_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores) {
    int64_t width = a->key_width, padded = up(width, 16), dwords = width / 4;
    if (a->kind < CACHE_E4M3 || width % 4 || a->rotated) return 0;
    int32_t *codes = room->codes, *queries = codes + 16 * dwords;
    int planes = 1;
    for (int r = 0; r < rows; r++) {
        uint16_t *high = (uint16_t *)(queries + 4 * r * dwords), *low = high + 4 * dwords;
        for (int64_t i = 0; i < width; i++) { /* pairs of a dword: channels (0, 2), (1, 3) */
            int64_t place = i / 4 * 4 + i % 2 * 2 + i % 4 / 2;
            if (split(room->q[r * padded + i], high + place, low + place)) planes = 2;
        }
    }
    lookup_t l = lookup_of(room);
    float worth = a->key_factor * a->scaling;
    const uint8_t *from = a->keys + t->b * a->key_strides[0] + t->h * a->key_strides[1] + t->first * width;
    for (int64_t n = 0; n < t->tokens; n += 16) {
        const uint8_t *tokens[16];
        for (int i = 0; i < 16; i++) tokens[i] = from + (n + i < t->tokens ? n + i : t->tokens - 1) * width;
        columns_of(tokens, dwords, codes);
        for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
            int count = rows - r < ROWS_AT_ONCE ? rows - r : ROWS_AT_ONCE;
            __m512 sums[ROWS_AT_ONCE];
            key_sums_of(&l, codes, dwords, queries + 4 * r * dwords, planes, count, sums);
            for (int i = 0; i < count; i++)
                _mm512_storeu_ps(scores + (r + i) * STRIDE + n, _mm512_mul_ps(sums[i], _mm512_set1_ps(worth)));
        }
    }
    return 1;
}

INLINE void value_sums(const lookup_t *l, const uint8_t *from, int64_t bytes, int64_t held, int64_t tokens, const int32_t *weights, const int rows, __m512 *sums) {
    __mmask64 mask = held >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << held) - 1;
    __m512 s[4 * ROWS_AT_ONCE];
    for (int i = 0; i < 4 * rows; i++) s[i] = _mm512_setzero_ps();
    for (int64_t n = 0; n < tokens; n += 2, from += 2 * bytes) {
        __m512i xl, xh, yl, yh, p[4];
        bytes_of(l, _mm512_maskz_loadu_epi8(mask, from), &xl, &xh);
        bytes_of(l, _mm512_maskz_loadu_epi8(mask, n + 1 < tokens ? from + bytes : from), &yl, &yh);
        __m512i x0 = _mm512_unpacklo_epi8(xl, xh), x1 = _mm512_unpackhi_epi8(xl, xh);
        __m512i y0 = _mm512_unpacklo_epi8(yl, yh), y1 = _mm512_unpackhi_epi8(yl, yh);
        p[0] = _mm512_unpacklo_epi16(x0, y0), p[1] = _mm512_unpackhi_epi16(x0, y0);
        p[2] = _mm512_unpacklo_epi16(x1, y1), p[3] = _mm512_unpackhi_epi16(x1, y1);
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) {
                __m512i w = _mm512_set1_epi32(weights[(r * 2 + h) * (TILE / 2) + n / 2]);
                for (int i = 0; i < 4; i++) s[4 * r + i] = dot(s[4 * r + i], p[i], w);
            }
    }
    for (int i = 0; i < 4 * rows; i++) sums[i] = s[i];
}

int attention_float_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights) {
    if (a->kind < CACHE_E4M3) return 0;
    int64_t width = a->value_width, wide = up(width, 64);
    const uint8_t *from = a->values + t->b * a->value_strides[0] + t->h * a->value_strides[1] + t->first * width;
    for (int r = 0; r < rows; r++) {
        uint16_t *high = (uint16_t *)room->codes + 2 * r * TILE, *low = high + TILE;
        for (int64_t n = 0; n < t->tokens; n++) split(weights[r * STRIDE + n], high + n, low + n);
        if (t->tokens % 2) high[t->tokens] = low[t->tokens] = 0;
    }
    lookup_t l = lookup_of(room);
    for (int64_t c = 0; c < width; c += 64)
        for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
            int count = rows - r < ROWS_AT_ONCE ? rows - r : ROWS_AT_ONCE;
            const int32_t *w = room->codes + r * TILE;
            __m512 sums[4 * ROWS_AT_ONCE];
            if (count == 1) value_sums(&l, from + c, width, width - c, t->tokens, w, 1, sums);
            else if (count == 2) value_sums(&l, from + c, width, width - c, t->tokens, w, 2, sums);
            else if (count == 3) value_sums(&l, from + c, width, width - c, t->tokens, w, 3, sums);
            else value_sums(&l, from + c, width, width - c, t->tokens, w, 4, sums);
            for (int i = 0; i < 4 * count; i++) {
                float found[16], *to = room->sums + (r + i / 4) * wide;
                _mm512_storeu_ps(found, sums[i]);
                for (int j = 0; j < 16; j++) {
                    int64_t channel = c + j / 4 * 16 + i % 4 * 4 + j % 4;
                    if (channel < width) to[channel] += found[j] * a->value_factor;
                }
            }
        }
    return 1;
}

#else

int attention_float_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores) { return 0; }

int attention_float_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights) { return 0; }

#endif

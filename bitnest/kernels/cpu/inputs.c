/* Inputs in integers: a scale per block of columns, 8 bits in each plane.

       planes  largest q   scale              code
       1       127         absmax / 127       round(x / scale), as kernels/inputs.py does
       2       32512       absmax / 32512     round(x / scale) = 256 hi + lo
       3       8323072     absmax / 8323072   round(x / scale) = 65536 hi + 256 middle + lo

   Bytes are balanced, -128 to 127: what is left is rounded up from 128. The largest leave room for the
   carry. A block that holds a NaN or an infinity has the scale NaN, so every sum over it is NaN.
   Blocks whose largest number is below 2^-100 count as zero. */

#include "cpu.h"
#include "vectors.h"

#include <math.h>

#define TINY 0x1p-100f

static float largest(int planes) { return planes == 1 ? 127.0f : planes == 2 ? 32512.0f : 8323072.0f; }

/* The bits of the largest magnitude: above those of infinity for NaN. */
static uint32_t peak_bits(const float *x, int64_t count) {
    uint32_t peak = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        peak = bits > peak ? bits : peak;
    }
    return peak;
}

/* Bytes of q in P planes at codes, least significant last, and their sums. */
#if VB == 64
ALWAYS void split(const float *x, int P, float scale, float inverse, int8_t *codes, int64_t columns,
                  int32_t *sums, int64_t entries) {
    vf32 part = LOAD(vf32, x);
    __m512i q = _mm512_cvtps_epi32((__m512)(P == 1 ? part / scale : part * inverse));
    UNROLL for (int p = P - 1; p >= 0; p--) {
        __m512i up = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        __m512i low = p ? _mm512_sub_epi32(q, _mm512_slli_epi32(up, 8)) : q;
        _mm_storeu_si128((__m128i *)(codes + p * columns), _mm512_cvtepi32_epi8(low));
        sums[p * entries] = _mm512_reduce_add_epi32(low);
        q = up;
    }
}
#else
ALWAYS void split(const float *x, int P, float scale, float inverse, int8_t *codes, int64_t columns,
                  int32_t *sums, int64_t entries) {
    int32_t q[SUM_COLUMNS];
    for (int i = 0; i < SUM_COLUMNS; i++) q[i] = (int32_t)rintf(P == 1 ? x[i] / scale : x[i] * inverse);
    UNROLL for (int p = P - 1; p >= 0; p--) {
        int32_t sum = 0;
        for (int i = 0; i < SUM_COLUMNS; i++) {
            int32_t up = p ? (q[i] + 128) >> 8 : 0, low = q[i] - up * 256;
            codes[p * columns + i] = (int8_t)low;
            sum += low;
            q[i] = up;
        }
        sums[p * entries] = sum;
    }
}
#endif

ALWAYS void code_block(const float *x, int64_t count, int P, float scale, float inverse, int8_t *codes,
                       int64_t columns, int32_t *sums, int64_t entries) {
    int64_t at = 0;
    for (; at + SUM_COLUMNS <= count; at += SUM_COLUMNS)
        split(x + at, P, scale, inverse, codes + at, columns, sums + at / SUM_COLUMNS, entries);
    if (at < count) {
        float rest[SUM_COLUMNS] = {0};
        memcpy(rest, x + at, (size_t)(count - at) * 4);
        split(rest, P, scale, inverse, codes + at, columns, sums + at / SUM_COLUMNS, entries);
    }
}

static void code_row(const float *x, int64_t count, const inputs_t *out, int64_t t) {
    int P = out->planes;
    int64_t columns = out->columns, entries = columns / SUM_COLUMNS;
    int64_t blocks = (columns + out->block - 1) / out->block;
    int8_t *codes = (int8_t *)out->codes + t * P * columns;
    int32_t *sums = (int32_t *)out->sums + t * P * entries;
    float *scales = (float *)out->scales + t * blocks;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t start = b * out->block, stop = start + out->block;
        int64_t end = stop < columns ? stop : columns, n = (end < count ? end : count) - start;
        n = n < 0 ? 0 : n;
        uint32_t bits = peak_bits(x + start, n);
        float peak, top = largest(P);
        memcpy(&peak, &bits, 4);
        float scale = peak / top, inverse = top / peak;
        int64_t done = (n + SUM_COLUMNS - 1) / SUM_COLUMNS * SUM_COLUMNS;
        if (!(peak >= TINY && peak <= 0x1.fffffep127f)) {
            scale = peak < TINY ? 1.0f : NAN;
            done = 0;
        } else if (P == 1) {
            code_block(x + start, n, 1, scale, inverse, codes + start, columns, sums + start / 16, entries);
        } else if (P == 2) {
            code_block(x + start, n, 2, scale, inverse, codes + start, columns, sums + start / 16, entries);
        } else {
            code_block(x + start, n, 3, scale, inverse, codes + start, columns, sums + start / 16, entries);
        }
        scales[b] = scale;
        for (int p = 0; p < P; p++) {
            memset(codes + p * columns + start + done, 0, (size_t)(end - start - done));
            memset(sums + p * entries + (start + done) / SUM_COLUMNS, 0,
                   (size_t)((end - start - done) / SUM_COLUMNS) * 4);
        }
    }
}

static float bfloat16(float x, uint16_t *out) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    *out = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    bits = rounded << 16;
    memcpy(&x, &bits, 4);
    return x;
}

/* bfloat16 numbers whose sum is x, ties to even; NaN stays NaN, infinity in the first alone. */
static void halve(const float *x, int64_t count, int64_t columns, int parts, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) {
        float left = x[i];
        for (int p = 0; p < parts; p++) {
            float rest = left - bfloat16(left, out + p * columns + i);
            left = rest - rest == 0.0f ? rest : 0.0f;
        }
    }
    for (int p = 0; p < parts; p++) memset(out + p * columns + count, 0, (size_t)(columns - count) * 2);
}

void code_inputs(const float *x, int64_t stride, int64_t columns, const inputs_t *out, int64_t first,
                 int64_t last) {
    int64_t parts = out->parts ? out->parts : 1;
    for (int64_t t = first; t < last; t++) {
        if (out->planes) code_row(x + t * stride, columns, out, t);
        if (out->halves)
            halve(x + t * stride, columns, out->columns, (int)parts,
                  (uint16_t *)out->halves + t * parts * out->columns);
    }
}

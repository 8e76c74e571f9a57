/* Inputs in integers: a scale per block of columns, 8 bits in each plane.

       planes  largest q   scale              code
       1       127         absmax / 127       round(x / scale), as kernels/inputs.py does
       2       32512       absmax / 32512     round(x / scale) = 256 hi + lo
       3       8323072     absmax / 8323072   round(x / scale) = 65536 hi + 256 middle + lo

   Bytes are balanced, -128 to 127: what is left is rounded up from 128. The largest leave room for the
   carry. A block that holds a NaN or an infinity has the scale NaN, so every sum over it is NaN.
   Blocks whose largest number is below 2^-100 count as zero. */

#include "cpu.h"

#include <math.h>
#include <string.h>

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

/* A rounded number of SUM_COLUMNS columns in P planes, with their sums. */
static inline __attribute__((always_inline)) void split(const int32_t *q, int P, int8_t *codes,
                                                        int64_t columns, int32_t *sums, int64_t entries) {
    int32_t left[SUM_COLUMNS];
    memcpy(left, q, sizeof left);
    for (int p = P - 1; p >= 0; p--) {
        int32_t sum = 0;
        for (int i = 0; i < SUM_COLUMNS; i++) {
            int32_t up = p ? (left[i] + 128) >> 8 : 0, low = left[i] - up * 256;
            codes[p * columns + i] = (int8_t)low;
            sum += low;
            left[i] = up;
        }
        sums[p * entries] = sum;
    }
}

static inline __attribute__((always_inline)) void code_block(const float *x, int64_t count, int P,
                                                             float scale, float inverse, int8_t *codes,
                                                             int64_t columns, int32_t *sums,
                                                             int64_t entries) {
    for (int64_t at = 0; at < count; at += SUM_COLUMNS) {
        float part[SUM_COLUMNS] = {0};
        int32_t q[SUM_COLUMNS];
        int64_t n = count - at < SUM_COLUMNS ? count - at : SUM_COLUMNS;
        if (n == SUM_COLUMNS)
            memcpy(part, x + at, sizeof part);
        else
            memcpy(part, x + at, (size_t)n * 4);
        for (int i = 0; i < SUM_COLUMNS; i++)
            q[i] = (int32_t)rintf(P == 1 ? part[i] / scale : part[i] * inverse);
        split(q, P, codes + at, columns, sums + at / SUM_COLUMNS, entries);
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

/* bfloat16, ties to even; NaN stays NaN. */
static void halve(const float *x, int64_t count, int64_t columns, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
    memset(out + count, 0, (size_t)(columns - count) * 2);
}

void code_inputs(const float *x, int64_t stride, int64_t columns, const inputs_t *out, int64_t first,
                 int64_t last) {
    for (int64_t t = first; t < last; t++) {
        if (out->planes) code_row(x + t * stride, columns, out, t);
        if (out->halves)
            halve(x + t * stride, columns, out->columns, (uint16_t *)out->halves + t * out->columns);
    }
}

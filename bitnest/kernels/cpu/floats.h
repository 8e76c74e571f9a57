/* Sixteen floats as one value, for any machine: compilers split them where registers are narrower. */

#ifndef BITNEST_FLOATS_H
#define BITNEST_FLOATS_H

#include <stdint.h>
#include <string.h>

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int16_t vs __attribute__((vector_size(32)));

static inline vf vf_load(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }

static inline vf vf_all(float x) { return x - (vf){0}; }

static inline vf vf_pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

static inline vf vf_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

static inline vf vf_max(vf a, vf b) { return vf_pick(a > b, a, b); }

static inline float vf_most(vf x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* In a fixed order. */
static inline float vf_sum(vf x) {
    float s[16];
    memcpy(s, &x, sizeof s);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

static inline vf vf_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

/* float16, the exponents 0 and 31 by themselves; no step meets a subnormal float32. */
static inline vf vf_f16(vh x) {
    vu w = __builtin_convertvector(x, vu), body = w & 0x7fff, sign = (w & 0x8000) << 16;
    vf small = __builtin_convertvector((vi)body, vf) * 0x1p-24f;
    vu usual = (body << 13) + (112u << 23);
    vu huge = (body << 13) | 0x7f800000u;
    vi is_small = (vi)(body < 0x400), is_huge = (vi)(body >= 0x7c00);
    vu found = (vu)vf_pick(is_small, small, vf_pick(is_huge, (vf)huge, (vf)usual));
    return (vf)(found | sign);
}

/* The nearest integers, ties to even, of magnitudes below 2^22. */
static inline vi vf_round(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; /* 1.5 2^23 */ }

/* Numbers of float16 as float32, zeros behind them up to a whole vector. */
static inline void halves_load(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 16) {
        vh h = {0};
        if (count - i >= 16)
            memcpy(&h, from + i, 32);
        else
            memcpy(&h, from + i, 2 * (size_t)(count - i));
        vf_store(to + i, vf_f16(h));
    }
}

/* e^x for x <= 0, within 2e-7 of it; 0 below -87. */
static inline vf vf_exp(vf x) {
    vi gone = x < -87.0f;
    x = vf_max(x, vf_all(-87.0f));
    vf n = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: rounds to an integer */
    n = n - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = r * 1.38888889e-3f + 8.33333333e-3f;
    y = y * r + 4.16666667e-2f;
    y = y * r + 1.66666667e-1f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return vf_pick(gone, vf_all(0.0f), y * (vf)power);
}

#endif

/* Arithmetic on rows of float32: exponentials, norms, activations, dot products. */

#include "runtime.h"

#include <math.h>
#include <string.h>

/* e^x to 2e-7: 2^n e^r with |r| <= ln 2 / 2, the polynomial of e^r to degree 6. Below -87: 0. */
floats exp_floats(floats x) {
    floats none = {0}, limit = none + 88.0f, low = none - 87.3f;
    ints tiny = x < low;
    x = (floats)(((ints)x & ~(x > limit)) | ((ints)limit & (x > limit)));
    x = (floats)(((ints)x & ~tiny) | ((ints)low & tiny));
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: rounds to an integer */
    ints n = (ints)shifted - 0x4B400000;
    floats whole = shifted - 12582912.0f;
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = p * (floats)((n + 127) << 23);
    return (floats)((ints)p & ~tiny);
}

float sum_floats(floats x) {
    float total[LANES];
    for (int i = 0; i < LANES; i++) total[i] = x[i];
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) total[i] += total[i + step];
    return total[0];
}

float dot(const float *a, const float *b, int64_t count) {
    floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        s0 += *(const loose *)(a + i) * *(const loose *)(b + i);
        s1 += *(const loose *)(a + i + 16) * *(const loose *)(b + i + 16);
        s2 += *(const loose *)(a + i + 32) * *(const loose *)(b + i + 32);
        s3 += *(const loose *)(a + i + 48) * *(const loose *)(b + i + 48);
    }
    for (; i + 16 <= count; i += 16) s0 += *(const loose *)(a + i) * *(const loose *)(b + i);
    float total = sum_floats((s0 + s1) + (s2 + s3));
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

/* b is bfloat16 */
float dot16(const float *a, const uint16_t *b, int64_t count) {
    typedef uint16_t half_row __attribute__((vector_size(32), aligned(2), may_alias));
    floats s[2] = {{0}};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 2; j++) {
            ints wide = __builtin_convertvector(*(const half_row *)(b + i + 16 * j), ints) << 16;
            s[j] += *(const loose *)(a + i + 16 * j) * (floats)wide;
        }
    float total = sum_floats(s[0] + s[1]);
    for (; i < count; i++) {
        uint32_t bits = (uint32_t)b[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        total += a[i] * value;
    }
    return total;
}

/* x / sqrt(mean(x^2) + eps) * weight */
void norm_row(const float *x, const float *weight, float *out, int64_t count, float eps) {
    float factor = 1.0f / sqrtf(dot(x, x, count) / (float)count + eps);
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

static void gelu(const float *x, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}

/* x * sigmoid(factor * (x + cubic x^3)): SiLU, and GELU with the hyperbolic tangent */
static floats gate_of(floats x, float factor, float cubic) {
    return x / (exp_floats(-factor * (x + cubic * x * x * x)) + 1.0f);
}

/* out = act(gate) * up, or act(gate) where up is NULL. May be in place. */
void activate(const forward_t *layer, const float *gate, const float *up, float *out, int64_t count) {
    int kind = layer->activation;
    float factor = kind == GELU_TANH ? 1.5957691216f : 1.0f, cubic = kind == GELU_TANH ? 0.044715f : 0.0f;
    int64_t i = 0;
    if (kind == SILU || kind == GELU_TANH) {
        for (; i < count; i += LANES) {
            float in[LANES] = {0};
            int64_t left = count - i < LANES ? count - i : LANES;
            floats x, y;
            if (left == LANES) x = *(const loose *)(gate + i);
            else {
                for (int64_t j = 0; j < left; j++) in[j] = gate[i + j];
                x = *(const loose *)in;
            }
            y = gate_of(x, factor, cubic);
            if (left == LANES) *(loose *)(out + i) = up ? y * *(const loose *)(up + i) : y;
            else
                for (int64_t j = 0; j < left; j++) out[i + j] = up ? y[j] * up[i + j] : y[j];
        }
        return;
    }
    float part[256];
    for (; i < count; i += 256) {
        int64_t left = count - i < 256 ? count - i : 256;
        if (kind == GELU) gelu(gate + i, part, left);
        else
            for (int64_t j = 0; j < left; j++) part[j] = gate[i + j] > 0 ? gate[i + j] : 0;
        for (int64_t j = 0; j < left; j++) out[i + j] = up ? part[j] * up[i + j] : part[j];
    }
}

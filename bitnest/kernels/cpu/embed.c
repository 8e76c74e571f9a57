/* Rows of an embedding, decoded from wherever they lie: plain, or packed as cpu.h has it. */

#include "runtime.h"

#include <math.h>
#include <string.h>

static float wide(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static float from_half(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24);
    return half >> 15 ? -size : size;
}

static float from_e4m3(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = exponent == 15 && mantissa == 7 ? NAN
               : exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
    return code >> 7 ? -size : size;
}

static float scale_at(const weight_t *w, int64_t block, int64_t group, int64_t lane) {
    int64_t at = (block * w->groups + group) * ROWS + lane;
    float scale = 1;
    switch (w->scale_kind) {
    case SCALE_F32: scale = ((const float *)w->scales)[at]; break;
    case SCALE_F16: scale = from_half(((const uint16_t *)w->scales)[at]); break;
    case SCALE_BF16: scale = wide(((const uint16_t *)w->scales)[at]); break;
    case SCALE_E8M0: scale = ldexpf(1, ((const uint8_t *)w->scales)[at] - 127); break;
    case SCALE_E4M3: scale = from_e4m3(((const uint8_t *)w->scales)[at]); break;
    case SCALE_U8: scale = ((const uint8_t *)w->scales)[at]; break;
    case SCALE_I8: scale = ((const int8_t *)w->scales)[at]; break;
    }
    if (w->super_kind == SUPER_ROW) scale *= w->super[block * ROWS + lane];
    if (w->super_kind == SUPER_GROUP) scale *= w->super[block * w->groups + group];
    return scale * w->factor;
}

/* A lane's byte j of a vector; tables have theirs elsewhere in its quarter. */
static int64_t byte_of(const weight_t *w, int64_t lane, int64_t j) {
    if (w->engine == INTEGER) return lane * 4 + j;
    return lane / 4 * 16 + (j & 2) * 4 + lane % 4 * 2 + (j & 1);
}

static int code_at(const weight_t *w, int64_t block, int64_t lane, int64_t column) {
    int64_t unit = column / UNIT, within = column % UNIT;
    int code = 0;
    for (int p = 0; p < w->planes; p++) {
        int bits = w->plane_bits[p], per = UNIT / bits; /* columns of a vector */
        const uint8_t *at = w->plane[p] + (block * w->units + unit) * w->plane_stride[p];
        uint8_t byte = at[within / per * 64 + byte_of(w, lane, within % 4)];
        code = code << bits | (byte >> within % per / 4 * bits & ((1 << bits) - 1));
    }
    return code;
}

/* Without its scale. */
static float value_at(const weight_t *w, int64_t block, int64_t lane, int64_t column, int64_t group) {
    if (w->engine == DENSE) {
        int64_t pair = (block * w->units + column / UNIT) * 16 + column % UNIT / 2;
        return wide(w->dense[(pair * ROWS + lane) * 2 + column % 2]);
    }
    int code = code_at(w, block, lane, column);
    if (w->engine == TABLE) {
        uint16_t half = (uint16_t)(w->table[code] << 8 | w->table[(1 << w->bits) + code]);
        return wide(half);
    }
    int value = w->table ? ((const int8_t *)w->table)[code] : code;
    int zero = w->zeros ? w->zeros[(block * w->groups + group) * ROWS + lane] : w->zero;
    return (float)(value - zero);
}

static void packed_row(const weight_t *w, int64_t block, int64_t lane, float *out) {
    int64_t run = w->engine == DENSE ? w->columns : w->group;
    for (int64_t start = 0, group = 0; start < w->columns; start += run, group++) {
        int64_t stop = start + run < w->columns ? start + run : w->columns;
        float scale = w->engine == DENSE ? 1 : scale_at(w, block, group, lane);
        for (int64_t i = start; i < stop; i++) out[i] = value_at(w, block, lane, i, group) * scale;
    }
}

void embed_row(const linear_t *table, int64_t row, float *out) {
    const weight_t *w = &table->w;
    if (table->rows32) memcpy(out, table->rows32 + row * w->columns, w->columns * sizeof(float));
    else if (table->rows16)
        for (int64_t i = 0; i < w->columns; i++) out[i] = wide(table->rows16[row * w->columns + i]);
    else packed_row(w, row / ROWS, row % ROWS, out);
}

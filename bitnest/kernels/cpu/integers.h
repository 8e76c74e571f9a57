/* Integer weights: what their kernels for one token and for many share.

   A cell is a run of columns under one scale of the weight and one of the inputs, at most as long
   as its integers fit 32 bits. Its sum of products is exact; then

       y += (float(sum) * scale of the inputs) * scale of the weight

   in the order of kernels/products.py. With P > 1 planes of inputs the sum is of 256 a + b for two
   planes' sums a and b; of three the first is added by itself, times 65536. */

#ifndef BITNEST_INTEGERS_H
#define BITNEST_INTEGERS_H

#include "cpu.h"
#include "vectors.h"

#define STEP 16        /* columns decoded at once: half a unit, 4 vectors of codes */
#define LONGEST 65536  /* columns: 255 * 128 * 65536 < 2^31 */

typedef struct {
    int32_t start, steps; /* in units of STEP columns */
    int32_t group;        /* of the weight's scales */
    int32_t block;        /* of the inputs' scales */
    int32_t resumes;      /* its sum begins in the cell before */
    int32_t goes_on;      /* and ends in a later one */
} cell_t;

typedef struct {
    int64_t count;
    cell_t *cell;
    float *scale;     /* [count][tokens], of the inputs */
    int32_t *zero[2]; /* [count][tokens]: sums of input codes (of the first of three planes: [0]; the
                         others [1]), times the zero point where it is one number; NULL: zero is 0 */
    int whole_rows;   /* integer scales are multiplied before the sum is rounded (dual grain) */
} cells_t;

/* Cells of a product, in this thread's scratch; at most `longest` columns each, longer ones in parts
   that go on where `parts`. */
cells_t make_cells(const weight_t *w, const inputs_t *x, int64_t longest, int parts);

/* Memory of the calling thread for a use (below 16; 8 and above are of callers of `product`), of at least so many bytes, aligned to 64. */
void *scratch(int use, size_t bytes);

void product_one(const weight_t *w, const inputs_t *x, float *y, int64_t first, int64_t last);
int product_few(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last);
void product_many(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first,
                  int64_t last);

/* Codes (or what they stand for) of a block, STEP columns of 256 bytes each: steps first to
   first + steps - 1. */
void unpack(const weight_t *w, int64_t block, int64_t first, int64_t steps, uint8_t *out);

/* The plane widths that have code of their own, as hexadecimal digits; 0: any other. */
static inline int plane_widths(const weight_t *w) {
    int widths = 0;
    if (w->planes > 3) return 0;
    for (int k = 0; k < w->planes; k++) widths = widths << 4 | w->plane_bits[k];
    return widths;
}

/* Scales of LANES rows from row 16 block + LANES s, without factor and rows' super-scale. */
ALWAYS vf32 weight_scale(const weight_t *w, int64_t block, int64_t group, int s) {
    int64_t at = (block * w->groups + group) * ROWS + s * LANES;
    vf32 scale;
    switch (w->scale_kind) {
    case SCALE_F32: scale = LOAD(vf32, (const float *)w->scales + at); break;
    case SCALE_F16: scale = from_f16((const uint16_t *)w->scales + at); break;
    case SCALE_BF16: scale = from_bf16((const uint16_t *)w->scales + at); break;
    case SCALE_E8M0: scale = (vf32)(from_u8((const uint8_t *)w->scales + at) << 23); break;
    case SCALE_E4M3: /* a float16 of the same mantissa: 2^8 too small */
        scale = half_to_f32(from_u8((const uint8_t *)w->scales + at) << 7) * 256.0f;
        break;
    case SCALE_U8: scale = to_f32(from_u8((const uint8_t *)w->scales + at)); break;
    case SCALE_I8: scale = to_f32(from_i8((const int8_t *)w->scales + at)); break;
    default: scale = all_f32(1.0f);
    }
    if (w->super_kind == SUPER_GROUP) scale *= w->super[block * w->groups + group];
    return scale;
}

ALWAYS vi32 zero_points(const weight_t *w, int64_t block, int64_t group, int s) {
    return from_u8(w->zeros + (block * w->groups + group) * ROWS + s * LANES);
}

/* A cell's sums less its zero point. z: cells.zero's entry. */
ALWAYS vi32 less_zero(const weight_t *w, vi32 sum, int32_t z, int64_t block, int64_t group, int s) {
    vi32 all = all_i32(z);
    return sub(sum, w->zeros ? mul(zero_points(w, block, group, s), all) : all);
}

ALWAYS vi32 integer_scale(const weight_t *w, int64_t block, int64_t group, int s) {
    return from_u8((const uint8_t *)w->scales + (block * w->groups + group) * ROWS + s * LANES);
}

/* What the sum of a row is multiplied with in the end. */
ALWAYS vf32 row_factor(const weight_t *w, int64_t block, int s) {
    vf32 factor = all_f32(w->factor);
    if (w->super_kind == SUPER_ROW) factor *= LOAD(vf32, w->super + block * ROWS + s * LANES);
    return factor;
}

/* y[i] = v[i] for rows of the matrix. */
ALWAYS void put_rows(const weight_t *w, float *y, int64_t block, int s, vf32 v) {
    int64_t row = block * ROWS + s * LANES, left = w->rows - row;
    if (left >= LANES)
        STORE(vf32, y + row, v);
    else
        for (int64_t i = 0; i < left; i++) y[row + i] = v[i];
}

/* Vectors of LANES rows that hold STEP columns of every plane. */
typedef struct {
    vu8 v[MAX_PLANES][4];
} raw_t;

/* plane: of the unit, at the rows; half: of the unit; widths: digits as plane_widths. half, widths and
   count are constants where it shall be fast. */
ALWAYS raw_t load_raw(const uint8_t *const *plane, int half, int widths, int count) {
    raw_t raw;
    UNROLL for (int k = 0; k < count; k++) {
        int b = widths >> (4 * (count - 1 - k)) & 15, vectors = b == 1 ? 1 : b / 2;
        UNROLL for (int v = 0; v < vectors; v++)
            raw.v[k][v] = LOAD(vu8, plane[k] + 64 * (b == 1 ? 0 : half * vectors + v));
        if (b < 8) UNROLL for (int v = 0; v < vectors; v++) raw.v[k][v] = kept(raw.v[k][v]);
    }
    return raw;
}

/* Codes of columns 4 i and on of the step. */
ALWAYS vu8 decode(const raw_t *raw, int half, int i, int widths, int count) {
    int low = 0;
    vu8 c = {0};
    UNROLL for (int k = 0; k < count; k++) low += widths >> (4 * k) & 15;
    UNROLL for (int k = 0; k < count; k++) {
        int b = widths >> (4 * (count - 1 - k)) & 15, mask = (1 << b) - 1;
        int field = b == 1 ? 4 * half + i : i % (8 / b);
        vu8 v = raw->v[k][b == 1 ? 0 : i / (8 / b)];
        low -= b;
        if (b == 8) return v;
        v = moved(v, low - field * b);
        c = k ? joined(c, v, mask << low) : masked(v, mask << low);
    }
    return c;
}

#endif

/* A low-rank residual behind a product: y += ((x right^T) scale) left^T, factors of 8 bits. */

#ifndef BITNEST_LOWRANK_H
#define BITNEST_LOWRANK_H

#include "cpu.h"

typedef struct {
    int64_t rows, columns, rank;
    const int8_t *right; /* [rank][columns padded to 32] */
    const int8_t *left;  /* [blocks of 16 rows][rank][16] */
    const float *scale;  /* [rank]: of a column of left times that of a row of right */
} lowrank_t;

/* between[t rank + j] = scale[j] sum over i of x[t, i] right[j, i], j from first to last - 1. */
void lowrank_right(const lowrank_t *r, const inputs_t *x, float *between, int64_t first, int64_t last);

/* y[t stride + o] += sum over j of left[o, j] between[t, j], rows of blocks first to last - 1. */
void lowrank_left(const lowrank_t *r, const float *between, int64_t tokens, float *y, int64_t stride, int64_t first, int64_t last);

#endif

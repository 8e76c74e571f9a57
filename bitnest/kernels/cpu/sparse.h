/* Weights of which a mask says what is there: 2:4, n:m and unstructured. */

#ifndef BITNEST_SPARSE_H
#define BITNEST_SPARSE_H

#include "cpu.h"

#define PIECE 64 /* columns that are expanded at once */

/* Survivors of a row lie one after another, piece by piece; each piece of 4-bit codes begins a byte
   (even survivors in low halves). 64 bytes behind the last one may be read. */
typedef struct {
    int64_t rows, columns, pieces; /* pieces = ceil(columns / 64) of a row */
    int32_t bits;                  /* 4, 8: codes; 16: bfloat16; 17: float16 */
    int32_t zero;                  /* the code of zero where no zeros are stored */
    int32_t group, groups;         /* columns per scale, a multiple of 64 unless there is one group */
    const uint64_t *mask;          /* [rows][pieces] */
    const uint8_t *values;
    const int64_t *starts;         /* [rows]: byte of a row's first survivor */
    const float *scales;           /* [rows][groups], of codes */
    const uint8_t *zeros;          /* [rows][groups], or NULL */
} sparse_t;

#endif

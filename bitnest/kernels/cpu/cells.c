/* Where the integer sums of a product begin and end, and what they share; see integers.h. */

#define _POSIX_C_SOURCE 200112L
#include "integers.h"

#include <stdlib.h>

#define USES 16

static _Thread_local struct {
    void *memory;
    size_t bytes;
} held[USES];

void *scratch(int use, size_t bytes) {
    if (held[use].bytes < bytes) {
        void *memory = NULL;
        size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        if (posix_memalign(&memory, 64, rounded)) abort();
        free(held[use].memory);
        held[use].memory = memory;
        held[use].bytes = rounded;
    }
    return held[use].memory;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The largest number that codes stand for. */
static int64_t largest_code(const weight_t *w) {
    int64_t largest = (1 << w->bits) - 1;
    if (!w->table) return largest;
    int64_t found = 1;
    for (int64_t i = 0; i <= largest; i++) found = w->table[i] > found ? w->table[i] : found;
    return found;
}

/* Columns whose sum fits 32 bits. Two planes of inputs together do not exceed 32896. */
static int64_t fitting(const weight_t *w, const inputs_t *x) {
    if (x->planes == 1) return LONGEST;
    int64_t columns = 0x7FFFFFFF / (largest_code(w) * 32896) / STEP * STEP;
    return columns < STEP ? STEP : columns;
}

static int64_t cut(const weight_t *w, const inputs_t *x, int64_t longest, int parts, cell_t *cell) {
    int64_t count = 0, columns = w->units * UNIT, start = 0, fit = fitting(w, x);
    int whole_rows = x->planes == 1 && w->scale_kind == SCALE_U8;
    while (start < columns) {
        int64_t group = start / w->group, block = start / x->block;
        if (group >= w->groups) group = w->groups - 1;
        int64_t stop = group == w->groups - 1 ? columns : (group + 1) * w->group;
        int64_t border = least((block + 1) * x->block, columns);
        int64_t end = least(least(stop, border), start + fit);
        int resumes = 0;
        for (int64_t at = start; at < end;) { /* parts end at multiples of `longest` */
            int64_t next = parts ? least(end, (at / longest + 1) * longest) : end;
            int goes_on = next < end && x->planes == 1; /* otherwise parts are cells of their own */
            cell[count++] = (cell_t){(int32_t)(at / STEP), (int32_t)((next - at) / STEP),
                                     (int32_t)group, (int32_t)block, resumes, goes_on};
            resumes = goes_on;
            at = next;
        }
        start = end;
    }
    if (whole_rows)
        for (int64_t i = 0; i < count; i++) {
            cell[i].resumes = i > 0 && cell[i - 1].block == cell[i].block;
            cell[i].goes_on = i + 1 < count && cell[i + 1].block == cell[i].block;
        }
    return count;
}

static int32_t sum_of(const int32_t *sums, const cell_t *cell) {
    uint32_t sum = 0;
    for (int32_t i = 0; i < cell->steps; i++) sum += (uint32_t)sums[cell->start + i];
    return (int32_t)sum;
}

cells_t make_cells(const weight_t *w, const inputs_t *x, int64_t longest, int parts) {
    int64_t columns = w->units * UNIT, entries = x->columns / SUM_COLUMNS;
    int64_t most = columns / STEP, T = x->tokens, P = x->planes;
    int64_t blocks = (x->columns + x->block - 1) / x->block;
    cell_t *cell = scratch(0, (size_t)most * sizeof(cell_t));
    cells_t made = {.cell = cell, .whole_rows = P == 1 && w->scale_kind == SCALE_U8};
    made.count = cut(w, x, longest, parts, cell);
    int with_zero = w->zeros || w->zero;
    int64_t size = T * made.count;
    float *numbers = scratch(1, (size_t)size * (with_zero ? 3 : 1) * 4);
    made.scale = numbers;
    if (with_zero)
        for (int k = 0; k < 2; k++) made.zero[k] = (int32_t *)(numbers + (k + 1) * size);
    uint32_t zero = w->zeros ? 1 : (uint32_t)w->zero;
    for (int64_t i = 0; i < made.count; i++)
        for (int64_t t = 0; t < T; t++) {
            made.scale[i * T + t] = x->scales[t * blocks + cell[i].block];
            if (!with_zero) continue;
            const int32_t *sums = x->sums + t * P * entries;
            uint32_t total = 0, first = 0;
            for (int p = 0; p < P; p++) {
                uint32_t sum = (uint32_t)sum_of(sums + p * entries, cell + i);
                if (P == 3 && p == 0)
                    first = sum;
                else
                    total = total * 256 + sum;
            }
            made.zero[0][i * T + t] = (int32_t)(first * zero);
            made.zero[1][i * T + t] = (int32_t)(total * zero);
            if (cell[i].resumes && !made.whole_rows)
                made.zero[1][i * T + t] += made.zero[1][(i - 1) * T + t];
        }
    return made;
}

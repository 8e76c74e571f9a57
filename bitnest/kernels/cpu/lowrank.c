/* A low-rank residual fused behind a product: one job, the inputs as they were coded for it, the
   (tokens, rank) between the factors in scratch, and the output while it is in the cache. */

#include "lowrank.h"
#include "floats.h"

typedef int8_t vb __attribute__((vector_size(16)));

static int32_t dot(const int8_t *a, const int8_t *b, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (int32_t)a[i] * b[i];
    return sum;
}

void lowrank_right(const lowrank_t *r, const inputs_t *x, float *between, int64_t first, int64_t last) {
    int64_t padded = (r->columns + UNIT - 1) / UNIT * UNIT, blocks = (x->columns + x->block - 1) / x->block;
    for (int64_t t = 0; t < x->tokens; t++)
        for (int64_t j = first; j < last; j++) {
            float sum = 0;
            for (int64_t b = 0; b < blocks; b++) {
                int64_t start = b * x->block, count = padded - start < x->block ? padded - start : x->block;
                float part = 0;
                for (int p = 0; p < x->planes; p++) {
                    const int8_t *codes = x->codes + (t * x->planes + p) * x->columns + start;
                    part = part * 256.0f + (float)dot(codes, r->right + j * padded + start, count);
                }
                sum += part * x->scales[t * blocks + b];
            }
            between[t * r->rank + j] = sum * r->scale[j];
        }
}

void lowrank_left(const lowrank_t *r, const float *between, int64_t tokens, float *y, int64_t stride, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const int8_t *left = r->left + b * r->rank * ROWS;
        int64_t rows = r->rows - b * ROWS < ROWS ? r->rows - b * ROWS : ROWS;
        for (int64_t t = 0; t < tokens; t++) {
            vf sum = {0};
            for (int64_t j = 0; j < r->rank; j++) {
                vb codes;
                memcpy(&codes, left + j * ROWS, sizeof codes);
                sum += __builtin_convertvector(codes, vf) * between[t * r->rank + j];
            }
            float *to = y + t * stride + b * ROWS;
            for (int64_t i = 0; i < rows; i++) to[i] += sum[i];
        }
    }
}

typedef struct {
    const weight_t *w;
    const inputs_t *x, *own;
    const lowrank_t *r;
    float *y, *between;
    int64_t stride;
} lowrank_job_t;

static void job(void *argument, int thread, int threads) {
    const lowrank_job_t *a = argument;
    int64_t first, last, blocks = (a->r->rows + ROWS - 1) / ROWS;
    share(a->r->rank, 1, thread, threads, &first, &last);
    lowrank_right(a->r, a->own, a->between, first, last);
    share(blocks, 1, thread, threads, &first, &last);
    if (a->w) product(a->w, a->x, a->y, a->stride, first, last);
    barrier();
    lowrank_left(a->r, a->between, a->own->tokens, a->y, a->stride, first, last);
}

/* y = x W^T + own right^T left^T; with w NULL, y as it is + the second. own: the inputs before any
   transform of W's basis, x itself where there is none. between: scratch, [tokens][rank]. */
void lowrank_linear(const weight_t *w, const inputs_t *x, const inputs_t *own, const lowrank_t *r, float *y, int64_t stride, float *between) {
    lowrank_job_t a = {w, x, own, r, y, between, stride};
    run(job, &a);
}

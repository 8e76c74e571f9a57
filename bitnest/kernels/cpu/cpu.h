/* What the CPU kernels share: how a weight and its inputs lie in memory, vectors, threads.

   A weight of N rows and K columns is cut into blocks of 16 rows and units of 32 columns, both padded
   with zeros. A plane holds b of a code's bits, b = 1, 2, 4 or 8: of one block and unit it takes b
   vectors of 64 bytes. Vector v of these, lane r (4 bytes), byte j, bits [f b, f b + b) are of

       row 16 block + r,    column 32 unit + v (32 / b) + 4 f + j         (integer weights)

   so (vector >> f b) & mask is 16 rows by 4 columns, which is what a 4-way dot product of bytes eats,
   and one accumulator lane is one row: no horizontal sums, and scales of 16 rows are one vector.
   Weights that look numbers up (TABLE) are read as 32 words a vector: word 2 r + c, bits [b f, b f + b)
   of vector v are row 16 block + r, column 32 unit + 2 (b f + v) + c, so that a word looked up for each
   is 16 rows by 2 columns of 16-bit numbers, and a lane of 4 bytes is a row here too.

   A code's planes are read most significant first. Planes of a weight of one width lie together, unit
   by unit; nested planes lie apart, and a narrower code reads fewer of them.

       w[o, i] = (value(code) - zero[o, g]) * scale[o, g] * factor * super,    g = i / group

   Inputs are integers of 8 P bits cut into P planes of signed bytes, a scale per `block` columns:

       x[t, i] = scale[t, i / block] * sum over p of 256^(P-1-p) code[t, p, i]

   P = 1 is for models whose inputs are rounded to 8 bits or fewer, P = 2 for 16-bit inputs, P = 3 for
   float32. Sums of products of bytes are exact in 32 bits for at most 65,536 columns at a time. */

#ifndef BITNEST_CPU_H
#define BITNEST_CPU_H

#include <stddef.h>
#include <stdint.h>

#define ROWS 16       /* of a block */
#define UNIT 32       /* columns of a unit */
#define SUM_COLUMNS 16 /* columns of one entry of inputs.sums */
#define MAX_PLANES 8

enum engine { INTEGER = 0, TABLE = 1, DENSE = 2 };
enum scale_kind { SCALE_NONE = 0, SCALE_F32, SCALE_F16, SCALE_BF16, SCALE_E8M0, SCALE_E4M3, SCALE_U8, SCALE_I8 };
enum super_kind { SUPER_NONE = 0, SUPER_ROW, SUPER_GROUP }; /* f32 [blocks][16], f32 [blocks][groups] */

/* One matrix. The caller owns all memory; Python mirrors this struct field by field. */
typedef struct {
    int64_t rows, columns;   /* N, K, not padded */
    int64_t blocks, units;   /* ceil(N / 16), ceil(K / 32) */
    int32_t engine;
    int32_t bits;            /* of a code as it is read: the sum of plane_bits */
    int32_t planes;
    int32_t plane_bits[MAX_PLANES];
    int64_t plane_stride[MAX_PLANES]; /* bytes from one unit to the next; blocks are units apart */
    const uint8_t *plane[MAX_PLANES];
    int32_t group;           /* columns per scale, a multiple of 16; 32 units: one per row */
    int32_t groups;
    int32_t scale_kind;
    int32_t super_kind;
    const void *scales;      /* [blocks][groups][16] */
    const float *super;
    float factor;            /* times every scale */
    int32_t zero;            /* the code of zero where none are stored */
    const uint8_t *zeros;    /* [blocks][groups][16], or NULL */
    const uint8_t *table;    /* INTEGER: what codes of 6 bits or fewer stand for, 64 bytes, or NULL.
                                TABLE: 2^bits high bytes, then 2^bits low bytes, of bfloat16 */
    const uint16_t *dense;   /* DENSE: bfloat16 [blocks][units][16][16 rows][2 columns] */
} weight_t;

/* Rows of inputs, already coded. Padding columns are zero. */
typedef struct {
    int64_t tokens, columns; /* columns: 32 units of the weight */
    int32_t planes;          /* P; 0: only `halves` is there */
    int32_t block;           /* columns per scale, a multiple of 16 */
    const int8_t *codes;     /* [tokens][P][columns], most significant plane first */
    const float *scales;     /* [tokens][ceil(columns / block)] */
    const int32_t *sums;     /* [tokens][P][columns / 16]: of the codes, for zero points */
    const uint16_t *halves;  /* bfloat16 [tokens][parts][columns], for TABLE and DENSE, or NULL */
    int32_t parts;           /* of halves, whose sum the input is: 2 hold a float16, 3 a float32; 0: 1 */
} inputs_t;

/* y[t * stride + o] = x W^T for the rows of blocks first to last - 1, every token. Writes no row
   beyond `rows`. Runs on the calling thread: threads split blocks between them. */
void product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last);

/* Code float32 rows [tokens][stride] as planes, scales and sums (and halves where not NULL), for the
   tokens first to last - 1; out's arrays are the caller's. */
void code_inputs(const float *x, int64_t stride, int64_t columns, const inputs_t *out, int64_t first, int64_t last);

/* Threads: one team per process, as many as `set_threads` said; members spin shortly between jobs,
   then sleep. `run` calls job(argument, thread, threads) on every member and waits for all. `barrier`
   may be called inside a job by all members. Nested runs run alone. */
typedef void (*job_t)(void *argument, int thread, int threads);
void set_threads(int threads);
int get_threads(void);
void run(job_t job, void *argument);
void barrier(void);

/* [first, last) of `count` things for a thread, in whole steps, evenly. */
static inline void share(int64_t count, int64_t step, int thread, int threads, int64_t *first, int64_t *last) {
    int64_t steps = (count + step - 1) / step;
    int64_t a = steps * thread / threads * step, b = steps * (thread + 1) / threads * step;
    *first = a < count ? a : count;
    *last = b < count ? b : count;
}

#endif

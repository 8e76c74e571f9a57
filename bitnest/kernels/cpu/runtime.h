/* What the parts of a decoder's step share: matrices, networks, scratch memory, vectors of floats.

   A stage is work that all threads of the team split between them and end with a barrier. Within a
   step, memory comes from an arena that was laid out before the team started, so no stage allocates.

   Sums are in a fixed order that no number of threads changes: one thread computes a row of a matrix,
   a token's norm, a head's attention, from beginning to end. */

#ifndef BITNEST_RUNTIME_H
#define BITNEST_RUNTIME_H

#include "cpu.h"

#define LANES 16
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias)); /* anywhere in memory */

/* One matrix in whatever form it has: packed (w.rows > 0), or row-major float32 or bfloat16 of the
   same sizes, which multiply float32 inputs as they are. */
typedef struct {
    weight_t w;
    const float *rows32;
    const uint16_t *rows16;
    const float *bias; /* [rows] or NULL */
} linear_t;

enum activation { SILU = 0, GELU, GELU_TANH, RELU };

/* down(act(gate x) * up x). up.w.rows = 0: gate holds both, its upper half first, or, not gated,
   gate's output is all there is. down.w.rows = 0: gives nothing (a dropped expert). */
typedef struct {
    linear_t gate, up, down;
} network_t;

/* A feed-forward layer: experts, or one network for all tokens, or both. */
typedef struct {
    int32_t experts, gated, activation, planes; /* planes: of inputs */
    int64_t hidden, inner; /* the widest network's */
    const network_t *expert; /* [experts] */
    const network_t *shared; /* NULL: none */
    const float *shared_gate; /* [hidden]: the shared network's weight is sigmoid(gate . x); NULL: 1 */
} forward_t;

/* Rows of inputs as every engine wants them. rows: float32 [tokens][stride]. */
typedef struct {
    inputs_t in;
    const float *rows;
    int64_t stride;
} coded_t;

/* A product to do: y[t * stride + o] = linear x + bias. */
typedef struct {
    const linear_t *linear;
    coded_t x;
    float *y;
    int64_t stride;
} task_t;

/* Memory handed out front to back, 64 bytes aligned; base NULL only counts. */
typedef struct {
    char *base;
    size_t used;
} arena_t;

enum needs { NEED_CODES = 1, NEED_HALVES = 2 };

void *take(arena_t *arena, size_t bytes);
int needs_of(const linear_t *linear);
int network_needs(const network_t *network, int down);
coded_t take_coded(arena_t *arena, int64_t tokens, int64_t columns, int planes, int needs);
coded_t part_of(const coded_t *x, int64_t first, int64_t tokens, int64_t columns);
void code_rows(const coded_t *x, int64_t columns, int64_t first, int64_t last);
void multiply(const task_t *tasks, int64_t count, int thread, int threads);

void norm_row(const float *x, const float *weight, float *out, int64_t count, float eps);
floats exp_floats(floats x);
float sum_floats(floats x);
float dot(const float *a, const float *b, int64_t count);
float dot16(const float *a, const uint16_t *b, int64_t count);
void activate(const forward_t *layer, const float *gate, const float *up, float *out, int64_t count);
void embed_row(const linear_t *table, int64_t row, float *out);

/* Routing: scores (softmax or sigmoid) of logits [experts], the best `top` of them. */
typedef struct {
    int32_t experts, top, sigmoid, normalise;
    float scale;       /* times the chosen scores */
    const float *rows32;    /* [experts][hidden], or else */
    const uint16_t *rows16; /* bfloat16; both NULL: no router */
    const float *bias; /* of logits, or NULL */
} router_t;
void choose(const router_t *router, float *logits, int64_t *index, float *gates);

/* One pass of tokens through a feed-forward layer. */
typedef struct {
    const forward_t *layer;
    int64_t tokens, top;
    const int64_t *index; /* [tokens][top]; beyond the experts, or negative: none */
    const float *gates;   /* [tokens][top] */
    coded_t x;            /* [tokens][hidden] */
    float *y;             /* [tokens][hidden]: added to */
    /* scratch */
    int64_t pairs;
    int64_t *start, *token, *place; /* [experts + 1], [pairs], [tokens][top] */
    task_t *tasks;
    int64_t task_count;
    coded_t gathered, inner, shared_inner;
    float *up, *shared_up, *out, *shared_out;
} pass_t;
void lay_out_pass(pass_t *pass, arena_t *arena);
void feed_forward(pass_t *pass, int thread, int threads);

#define CACHE_STEP 64

/* Keys and values of one layer. Keys lie in blocks of 16 positions, [heads][capacity / 16][width][16],
   so that a query meets 16 positions at once; values [heads][capacity][padded width]. */
typedef struct {
    void *keys, *values;
    int64_t capacity; /* a multiple of CACHE_STEP: what lies beyond the positions is read, not used */
    int32_t halves;   /* float16 rather than float32 */
} cache_t;

typedef struct {
    int32_t heads, kv_heads, width, rotary; /* width: of a head; rotary: of it, the part that turns */
    int32_t window;        /* positions seen, 0: all */
    int32_t norm;          /* of queries and keys. 0: none, 1: each head, 2: all heads as one row */
    float scale, eps, clip; /* clip: queries, keys, values to [-clip, clip]; 0: not */
    const float *q_norm, *k_norm;
    const float *cosines, *sines; /* [positions][rotary] */
} attention_t;

typedef struct {
    const attention_t *how;
    cache_t cache;
    int64_t tokens, past;
    float *q, *k, *v; /* [tokens][heads * width] as projected; q is turned in place */
    float *y;         /* [tokens][heads * width] */
    float *scratch;   /* [threads][heads_scratch] */
} attend_t;
int64_t heads_scratch(const attention_t *how);
void append(const attend_t *a, int thread, int threads);
void attend(const attend_t *a, int thread, int threads);

typedef struct {
    const float *first_norm, *second_norm; /* [hidden] */
    linear_t q, k, v, o;
    attention_t attention;
    router_t router;
    forward_t forward;
} layer_t;

typedef struct {
    int32_t layers, planes;
    int64_t hidden, vocabulary;
    float eps, embedding_scale;
    const layer_t *layer;
    const linear_t *embedding, *head;
    const float *norm;
} model_t;

enum stage { EMBED = 0, QKV, ATTENTION, OUTPUT, ROUTER, FORWARD, HEAD, STAGES };

/* Tokens to run behind `past` others. */
typedef struct {
    int64_t count, past;
    const int64_t *ids;
    int64_t capacity;      /* of the cache */
    int32_t halves;        /* the cache is float16 */
    int32_t every;         /* logits of every token rather than of the last */
    void *keys, *values;   /* of all layers, one behind the other */
    float *logits;         /* [count or 1][vocabulary], or NULL */
    double *seconds;       /* [STAGES], added to, or NULL */
} step_t;

typedef struct context context_t;
context_t *model_open(const model_t *model);
void model_close(context_t *context);
int model_step(context_t *context, const step_t *step);

#endif

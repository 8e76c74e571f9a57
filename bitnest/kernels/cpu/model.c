/* One step of a decoder: some tokens through all layers, as one job of the team of threads.

       x = embed(token)
       x += o(attention(q, k, v of norm(x)))          for every layer
       x += forward(norm(x))
       logits = head(norm(x))

   Activations are float32. What several matrices read is coded once. Work on one token (norms, sums)
   is its thread's; products are split by rows; a barrier lies between. */

#define _GNU_SOURCE
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct context {
    const model_t *model;
    arena_t arena;
    size_t size;
    int64_t laid_out; /* tokens that the arena was laid out for */
    int threads;
    pass_t *pass; /* [layers], which share their scratch memory */
    float *x, *normed, *q, *k, *v, *mixed, *y, *logits, *gates, *scratch;
    int64_t *index;
    coded_t input, output; /* what layers read from `normed`, and from `mixed` */
    const step_t *step;
};

static int hidden_needs(const model_t *m) {
    int needs = needs_of(m->head);
    for (int l = 0; l < m->layers; l++) {
        const layer_t *layer = m->layer + l;
        needs |= needs_of(&layer->q) | needs_of(&layer->k) | needs_of(&layer->v);
        for (int e = 0; e < layer->forward.experts; e++) needs |= network_needs(layer->forward.expert + e, 0);
        if (layer->forward.shared) needs |= network_needs(layer->forward.shared, 0);
    }
    return needs;
}

typedef struct { int64_t q, k, experts, top, attention, outputs; int needs; } sizes_t;

/* The largest of each kind over all layers. */
static sizes_t largest(const model_t *m) {
    sizes_t s = {0};
#define GROW(field, value) if ((value) > s.field) s.field = (value)
    for (int l = 0; l < m->layers; l++) {
        const layer_t *layer = m->layer + l;
        GROW(q, layer->q.w.rows);
        GROW(k, layer->k.w.rows);
        GROW(experts, layer->router.experts);
        GROW(top, layer->router.top);
        GROW(attention, heads_scratch(&layer->attention));
        s.needs |= needs_of(&layer->o);
    }
#undef GROW
    return s;
}

static void lay_out(context_t *c, int64_t tokens, int threads) {
    const model_t *m = c->model;
    sizes_t s = largest(m);
    arena_t *arena = &c->arena;
    arena->used = 0;
    c->pass = take(arena, m->layers * sizeof(pass_t));
    c->x = take(arena, tokens * m->hidden * sizeof(float));
    c->normed = take(arena, tokens * m->hidden * sizeof(float));
    c->y = take(arena, tokens * m->hidden * sizeof(float));
    c->q = take(arena, tokens * s.q * sizeof(float));
    c->k = take(arena, tokens * s.k * sizeof(float));
    c->v = take(arena, tokens * s.k * sizeof(float));
    c->mixed = take(arena, tokens * s.q * sizeof(float));
    c->logits = take(arena, tokens * s.experts * sizeof(float));
    c->gates = take(arena, tokens * s.top * sizeof(float));
    c->index = take(arena, tokens * s.top * sizeof(int64_t));
    c->scratch = take(arena, threads * s.attention * sizeof(float));
    c->input = take_coded(arena, tokens, m->hidden, m->planes, hidden_needs(m));
    c->output = take_coded(arena, tokens, s.q, m->planes, s.needs);
    c->input.rows = c->normed;
    c->output.rows = c->mixed;
    size_t before = arena->used, most = before;
    for (int l = 0; l < m->layers; l++) {
        pass_t pass = {.layer = &m->layer[l].forward, .tokens = tokens, .top = m->layer[l].router.top};
        pass.index = c->index, pass.gates = c->gates, pass.x = c->input, pass.y = c->x;
        arena->used = before;
        lay_out_pass(&pass, arena);
        most = arena->used > most ? arena->used : most;
        if (arena->base) c->pass[l] = pass;
    }
    arena->used = most;
}

/* Memory for a step of `tokens`; 0 where there is not enough. */
static int make_room(context_t *c, int64_t tokens, int threads) {
    if (c->laid_out == tokens && c->threads == threads) return 1;
    char *base = c->arena.base;
    c->arena.base = NULL;
    lay_out(c, tokens, threads);
    if (c->arena.used > c->size) {
        free(base);
        c->size = c->arena.used;
        base = aligned_alloc(64, c->size);
        if (!base) {
            c->size = c->laid_out = 0;
            return 0;
        }
        memset(base, 0, c->size); /* rows that experts read as padding are numbers */
    }
    c->arena.base = base;
    lay_out(c, tokens, threads);
    c->laid_out = tokens;
    c->threads = threads;
    return 1;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* End of a stage: everybody waits; the first thread looks at the clock if anybody asked. */
static void finish(const context_t *c, int stage, double *began, int thread) {
    barrier();
    if (thread || !c->step->seconds) return;
    double time = now();
    c->step->seconds[stage] += time - *began;
    *began = time;
}

/* normed = norm(x), coded, for a thread's tokens */
static void norm_tokens(context_t *c, const float *weight, int64_t first, int64_t last) {
    int64_t hidden = c->model->hidden;
    for (int64_t t = first; t < last; t++)
        norm_row(c->x + t * hidden, weight, c->normed + t * hidden, hidden, c->model->eps);
    code_rows(&c->input, hidden, first, last);
}

static void self_attention(context_t *c, int number, int thread, int threads, double *began) {
    const layer_t *layer = c->model->layer + number;
    const step_t *step = c->step;
    int64_t tokens = step->count, width = layer->attention.width, hidden = c->model->hidden, first, last;
    int64_t wide = (width + LANES - 1) / LANES * LANES, heads = layer->attention.kv_heads;
    int64_t size = step->halves ? 2 : 4;
    task_t three[3] = {{&layer->q, c->input, c->q, layer->q.w.rows},
                       {&layer->k, c->input, c->k, layer->k.w.rows},
                       {&layer->v, c->input, c->v, layer->v.w.rows}};
    multiply(three, 3, thread, threads);
    finish(c, QKV, began, thread);
    attend_t a = {&layer->attention,
                  {(char *)step->keys + number * heads * step->capacity * width * size,
                   (char *)step->values + number * heads * step->capacity * wide * size,
                   step->capacity, step->halves},
                  tokens, step->past, c->q, c->k, c->v, c->mixed, c->scratch};
    append(&a, thread, threads);
    barrier();
    attend(&a, thread, threads);
    finish(c, ATTENTION, began, thread);
    share(tokens, 1, thread, threads, &first, &last);
    coded_t mixed = part_of(&c->output, 0, tokens, layer->o.w.columns);
    mixed.stride = layer->o.w.columns;
    code_rows(&mixed, layer->o.w.columns, first, last);
    barrier();
    task_t out = {&layer->o, mixed, c->y, hidden};
    multiply(&out, 1, thread, threads);
    finish(c, OUTPUT, began, thread);
}

static void route_tokens(context_t *c, const layer_t *layer, int thread, int threads) {
    const router_t *r = &layer->router;
    int64_t tokens = c->step->count, hidden = c->model->hidden, first, last;
    share(tokens * r->experts, 1, thread, threads, &first, &last);
    for (int64_t i = first; i < last; i++) {
        const float *x = c->normed + i / r->experts * hidden;
        int64_t at = i % r->experts * hidden;
        c->logits[i] = r->rows32 ? dot(x, r->rows32 + at, hidden) : dot16(x, r->rows16 + at, hidden);
    }
    barrier();
    share(tokens, 1, thread, threads, &first, &last);
    for (int64_t t = first; t < last; t++)
        choose(r, c->logits + t * r->experts, c->index + t * r->top, c->gates + t * r->top);
    if (tokens > 1) barrier(); /* one token is the last thread's, who goes on with it */
}

static void run_layer(context_t *c, int number, int thread, int threads, double *began) {
    const model_t *m = c->model;
    const layer_t *layer = m->layer + number;
    int64_t first, last, hidden = m->hidden;
    self_attention(c, number, thread, threads, began);
    share(c->step->count, 1, thread, threads, &first, &last);
    for (int64_t i = first * hidden; i < last * hidden; i++) c->x[i] += c->y[i];
    norm_tokens(c, layer->second_norm, first, last);
    barrier();
    if (layer->router.experts) route_tokens(c, layer, thread, threads);
    if (c->step->seconds) finish(c, ROUTER, began, thread);
    feed_forward(c->pass + number, thread, threads);
    norm_tokens(c, number + 1 < m->layers ? layer[1].first_norm : m->norm, first, last);
    finish(c, FORWARD, began, thread);
}

static void whole_step(void *argument, int thread, int threads) {
    context_t *c = argument;
    const model_t *m = c->model;
    const step_t *step = c->step;
    double began = step->seconds && !thread ? now() : 0;
    int64_t first, last, hidden = m->hidden;
    share(step->count, 1, thread, threads, &first, &last);
    for (int64_t t = first; t < last; t++) {
        embed_row(m->embedding, step->ids[t], c->x + t * hidden);
        for (int64_t i = 0; i < hidden; i++) c->x[t * hidden + i] *= m->embedding_scale;
    }
    norm_tokens(c, m->layer[0].first_norm, first, last);
    finish(c, EMBED, &began, thread);
    for (int l = 0; l < m->layers; l++) run_layer(c, l, thread, threads, &began);
    if (!step->logits) return;
    int64_t from = step->every ? 0 : step->count - 1;
    task_t head = {m->head, part_of(&c->input, from, step->count - from, hidden), step->logits, m->vocabulary};
    multiply(&head, 1, thread, threads);
    finish(c, HEAD, &began, thread);
}

context_t *model_open(const model_t *model) {
    context_t *c = calloc(1, sizeof *c);
    if (c) c->model = model;
    return c;
}

void model_close(context_t *c) {
    free(c->arena.base);
    free(c);
}

/* 0, or -1 where memory does not suffice. One step of a context at a time. */
int model_step(context_t *c, const step_t *step) {
    if (step->count <= 0) return 0;
    if (!make_room(c, step->count, get_threads())) return -1;
    c->step = step;
    run(whole_step, c);
    return 0;
}

/* Feed-forward layers: tokens sorted by expert, every expert its own widths, formats and engine.

       y[t] += sum over chosen experts e, ascending:  gate[t, e] * down_e(act(gate_e x) * up_e x)
             + sigmoid(shared_gate . x) * shared(x)

   Pairs of a token and an expert are sorted by expert, a token's place kept within one; an expert's
   pairs lie together, so each expert is one small matrix product. One token needs no sorting of
   inputs: all its experts read the same row. Threads split the rows of all chosen experts together. */

#include "runtime.h"

#include <math.h>
#include <string.h>

static int64_t first_rows(const network_t *n) { return n->gate.w.rows + n->up.w.rows; }

static int64_t widest(const forward_t *layer) {
    int64_t most = 0;
    for (int e = 0; e < layer->experts; e++)
        if (first_rows(layer->expert + e) > most) most = first_rows(layer->expert + e);
    return most;
}

static int experts_need(const forward_t *layer, int down) {
    int needs = 0;
    for (int e = 0; e < layer->experts; e++) needs |= network_needs(layer->expert + e, down);
    return needs;
}

/* Scratch memory of a pass of at most pass->tokens tokens; layer, tokens and top are set. */
void lay_out_pass(pass_t *p, arena_t *arena) {
    const forward_t *layer = p->layer;
    int64_t most = p->tokens * p->top, experts = layer->experts;
    p->start = take(arena, (experts + 1) * sizeof(int64_t));
    p->token = take(arena, most * sizeof(int64_t));
    p->place = take(arena, most * sizeof(int64_t));
    p->tasks = take(arena, 2 * (experts + p->top + 1) * sizeof(task_t));
    if (experts) {
        int64_t up = widest(layer);
        p->gathered = take_coded(arena, most, layer->hidden, layer->planes, experts_need(layer, 0));
        p->gathered.rows = take(arena, most * layer->hidden * sizeof(float));
        p->inner = take_coded(arena, most, layer->inner, layer->planes, experts_need(layer, 1));
        p->up = take(arena, most * up * sizeof(float));
        p->inner.rows = p->up;
        p->inner.stride = up;
        p->out = take(arena, most * layer->hidden * sizeof(float));
    }
    if (layer->shared) {
        const network_t *n = layer->shared;
        p->shared_inner = take_coded(arena, p->tokens, n->down.w.columns, layer->planes, network_needs(n, 1));
        p->shared_up = take(arena, p->tokens * first_rows(n) * sizeof(float));
        p->shared_inner.rows = p->shared_up;
        p->shared_inner.stride = first_rows(n);
        p->shared_out = take(arena, p->tokens * layer->hidden * sizeof(float));
    }
}

static int live(const pass_t *p, int64_t expert) {
    return expert >= 0 && expert < p->layer->experts && p->layer->expert[expert].down.w.rows > 0;
}

/* Where every pair goes: start[e] its expert's first, token[pair], place[token, choice] or -1. */
static void sort_pairs(pass_t *p) {
    int64_t experts = p->layer->experts, most = p->tokens * p->top;
    memset(p->start, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < most; i++)
        if (live(p, p->index[i])) p->start[p->index[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) p->start[e + 1] += p->start[e];
    p->pairs = p->start[experts];
    for (int64_t i = 0; i < most; i++) {
        p->place[i] = -1;
        if (!live(p, p->index[i])) continue;
        p->place[i] = p->start[p->index[i]]++;
        p->token[p->place[i]] = i / p->top;
    }
    for (int64_t e = experts; e > 0; e--) p->start[e] = p->start[e - 1];
    p->start[0] = 0;
}

static void add_task(pass_t *p, const linear_t *linear, coded_t x, float *y, int64_t stride) {
    if (linear->w.rows > 0 && x.in.tokens > 0) p->tasks[p->task_count++] = (task_t){linear, x, y, stride};
}

static void plan_first(pass_t *p) {
    const forward_t *layer = p->layer;
    p->task_count = 0;
    if (layer->experts) sort_pairs(p);
    for (int64_t e = 0; e < layer->experts; e++) {
        int64_t start = p->start[e], count = p->start[e + 1] - start, stride = p->inner.stride;
        if (!count) continue;
        const network_t *n = layer->expert + e;
        coded_t x = p->tokens == 1 ? p->x : part_of(&p->gathered, start, count, layer->hidden);
        /* one token may name an expert more than once */
        for (int64_t at = start; at < start + count; at += x.in.tokens) {
            add_task(p, &n->gate, x, p->up + at * stride, stride);
            add_task(p, &n->up, x, p->up + at * stride + n->gate.w.rows, stride);
        }
    }
    if (layer->shared) {
        const network_t *n = layer->shared;
        int64_t stride = p->shared_inner.stride;
        coded_t x = part_of(&p->x, 0, p->tokens, layer->hidden);
        add_task(p, &n->gate, x, p->shared_up, stride);
        add_task(p, &n->up, x, p->shared_up + n->gate.w.rows, stride);
    }
}

static void plan_down(pass_t *p) {
    const forward_t *layer = p->layer;
    int64_t hidden = layer->hidden;
    p->task_count = 0;
    for (int64_t e = 0; e < layer->experts; e++) {
        const linear_t *down = &layer->expert[e].down;
        int64_t start = p->start[e], count = p->start[e + 1] - start;
        if (count) add_task(p, down, part_of(&p->inner, start, count, down->w.columns), p->out + start * hidden, hidden);
    }
    if (layer->shared) {
        const linear_t *down = &layer->shared->down;
        coded_t x = part_of(&p->shared_inner, 0, p->tokens, down->w.columns);
        add_task(p, down, x, p->shared_out, hidden);
    }
}

/* Copy coded rows of pairs first to last - 1 from where their tokens are. */
static void gather(const pass_t *p, int64_t first, int64_t last) {
    const inputs_t *from = &p->x.in, *to = &p->gathered.in;
    int64_t wide = to->columns, planes = to->planes, hidden = p->layer->hidden;
    int64_t blocks = (wide + to->block - 1) / to->block, sums = planes * (wide / SUM_COLUMNS);
    for (int64_t i = first; i < last; i++) {
        int64_t t = p->token[i];
        memcpy((float *)p->gathered.rows + i * hidden, p->x.rows + t * p->x.stride, hidden * sizeof(float));
        if (to->codes) {
            memcpy((int8_t *)to->codes + i * planes * wide, from->codes + t * planes * wide, planes * wide);
            memcpy((float *)to->scales + i * blocks, from->scales + t * blocks, blocks * sizeof(float));
            memcpy((int32_t *)to->sums + i * sums, from->sums + t * sums, sums * sizeof(int32_t));
        }
        if (to->halves)
            memcpy((uint16_t *)to->halves + i * wide, from->halves + t * wide, wide * sizeof(uint16_t));
    }
}

static void activate_rows(const pass_t *p, const network_t *n, const coded_t *x, int64_t first, int64_t last) {
    int64_t inner = n->down.w.columns;
    for (int64_t i = first; i < last; i++) {
        float *row = (float *)x->rows + i * x->stride;
        activate(p->layer, row, p->layer->gated ? row + inner : NULL, row, inner);
    }
    code_rows(x, inner, first, last);
}

static void activate_pairs(const pass_t *p, int thread, int threads) {
    const forward_t *layer = p->layer;
    int64_t first, last;
    share(p->pairs, 1, thread, threads, &first, &last);
    for (int64_t e = 0; e < layer->experts; e++) {
        int64_t start = p->start[e], stop = p->start[e + 1];
        int64_t a = first > start ? first : start, b = last < stop ? last : stop;
        if (a >= b) continue;
        coded_t x = part_of(&p->inner, start, stop - start, layer->expert[e].down.w.columns);
        activate_rows(p, layer->expert + e, &x, a - start, b - start);
    }
    if (!layer->shared) return;
    share(p->tokens, 1, threads - 1 - thread, threads, &first, &last);
    coded_t x = part_of(&p->shared_inner, 0, p->tokens, layer->shared->down.w.columns);
    activate_rows(p, layer->shared, &x, first, last);
}

static void add_row(float *y, const float *x, float weight, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) y[i] += weight * x[i];
}

/* A token's experts in ascending order, which is the order of their places. */
static void combine_token(const pass_t *p, int64_t t, int64_t first, int64_t last) {
    int64_t hidden = p->layer->hidden, done = -1;
    float *y = p->y + t * hidden;
    for (int64_t n = 0; n < p->top; n++) {
        int64_t next = -1, choice = 0;
        for (int64_t c = 0; c < p->top; c++) {
            int64_t place = p->place[t * p->top + c];
            if (place > done && (next < 0 || place < next)) next = place, choice = c;
        }
        if (next < 0) break;
        add_row(y, p->out + next * hidden, p->gates[t * p->top + choice], first, last);
        done = next;
    }
    if (!p->layer->shared) return;
    float weight = 1;
    if (p->layer->shared_gate)
        weight = 1 / (1 + expf(-dot(p->x.rows + t * p->x.stride, p->layer->shared_gate, hidden)));
    add_row(y, p->shared_out + t * hidden, weight, first, last);
}

/* Called by all threads, after a barrier if there is more than one token; the last thread has the
   choices of one. Ends without a barrier: a thread has finished the tokens that `share` gives it. */
void feed_forward(pass_t *p, int thread, int threads) {
    int64_t first, last;
    int leader = thread == threads - 1; /* who has the only token, where there is one */
    if (leader) plan_first(p);
    barrier();
    if (p->layer->experts && p->tokens > 1) {
        share(p->pairs, 1, thread, threads, &first, &last);
        gather(p, first, last);
        barrier();
    }
    multiply(p->tasks, p->task_count, thread, threads);
    barrier();
    if (leader) plan_down(p);
    activate_pairs(p, thread, threads);
    barrier();
    multiply(p->tasks, p->task_count, thread, threads);
    barrier();
    share(p->tokens, 1, thread, threads, &first, &last);
    for (int64_t t = first; t < last; t++) combine_token(p, t, 0, p->layer->hidden);
}

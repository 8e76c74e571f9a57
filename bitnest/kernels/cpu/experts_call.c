/* The grouped experts as an operation of their own, for callers that have the router's choices. */

#include "runtime.h"

#include <stdlib.h>
#include <string.h>

static int needs_of_all(const forward_t *layer) {
    int needs = 0;
    for (int e = 0; e < layer->experts; e++) needs |= network_needs(layer->expert + e, 0);
    return layer->shared ? needs | network_needs(layer->shared, 0) : needs;
}

static void lay_out_call(pass_t *pass, arena_t *arena, const float *x) {
    const forward_t *layer = pass->layer;
    pass->x = take_coded(arena, pass->tokens, layer->hidden, layer->planes, needs_of_all(layer));
    pass->x.rows = x;
    lay_out_pass(pass, arena);
}

static void job(void *argument, int thread, int threads) {
    pass_t *pass = argument;
    int64_t first, last, hidden = pass->layer->hidden;
    share(pass->tokens, 1, thread, threads, &first, &last);
    memset(pass->y + first * hidden, 0, (last - first) * hidden * sizeof(float));
    code_rows(&pass->x, hidden, first, last);
    barrier();
    feed_forward(pass, thread, threads);
}

/* y [tokens][hidden] of x [tokens][hidden]; 0, or -1 where memory does not suffice. */
int experts_call(const forward_t *layer, int64_t tokens, int64_t top, const int64_t *index, const float *gates,
                 const float *x, float *y) {
    if (tokens <= 0) return 0;
    pass_t pass = {.layer = layer, .tokens = tokens, .top = top, .index = index, .gates = gates, .y = y};
    arena_t arena = {0};
    lay_out_call(&pass, &arena, x);
    arena.base = aligned_alloc(64, arena.used);
    if (!arena.base) return -1;
    memset(arena.base, 0, arena.used);
    arena.used = 0;
    lay_out_call(&pass, &arena, x);
    run(job, &pass);
    free(arena.base);
    return 0;
}

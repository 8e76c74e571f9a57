/* Caches of every size at once on a trace of expert requests: Mattson's stack algorithm.
 *
 *     stack   the c experts at its top are what a cache of c experts holds
 *     keys    who stays: own priority, set at an expert's request; with a window also
 *             COUNT per token among the next `window` that uses it, IN_USE for the present token's
 *     request of x at depth d: x to the top; from there down to d, of the expert carried and the
 *             one met the higher key stays and the other is carried on
 *
 * trace: (tokens, k) experts, distinct within a token. priority: one per request, in its order.
 * hits: (experts), by depth; a cache of c experts has the sum of the first c.
 * The reference is in cache_trace.py. Left out: checks, which are there, and threads.
 */

#include <stdint.h>
#include <stdlib.h>

#define COUNT ((int64_t)1 << 32)
#define IN_USE ((int64_t)1 << 61)

/* Depth at which x was found, or -1. */
static int64_t touch(int32_t *stack, int64_t *size, const int64_t *key, int32_t x) {
    int32_t carry = x;
    for (int64_t d = 0; d < *size; d++) {
        int32_t met = stack[d];
        if (met == x) {
            stack[d] = carry;
            return d;
        }
        if (d == 0 || key[met] < key[carry]) {
            stack[d] = carry;
            carry = met;
        }
    }
    stack[(*size)++] = carry;
    return -1;
}

static void add(int64_t *key, const int32_t *token, int64_t k, int64_t amount) {
    for (int64_t j = 0; j < k; j++) key[token[j]] += amount;
}

/* Returns 0, or -1 without memory. */
int cache_trace(const int32_t *trace, int64_t tokens, int64_t k, const int64_t *priority,
                int64_t experts, int64_t window, int64_t *hits) {
    int64_t *key = calloc(experts, sizeof *key), *own = calloc(experts, sizeof *own), size = 0;
    int32_t *stack = calloc(experts, sizeof *stack);
    int failed = !key || !own || !stack;
    for (int64_t t = 0; !failed && t < window && t < tokens; t++) add(key, trace + t * k, k, COUNT);
    for (int64_t t = 0; !failed && t < tokens; t++) {
        const int32_t *token = trace + t * k;
        if (window) {
            add(key, token, k, IN_USE - COUNT);
            if (t) add(key, token - k, k, -IN_USE);
            if (window < tokens - t) add(key, token + window * k, k, COUNT);
        }
        for (int64_t j = 0; j < k; j++) {
            int32_t x = token[j];
            key[x] += priority[t * k + j] - own[x];
            own[x] = priority[t * k + j];
            int64_t depth = touch(stack, &size, key, x);
            if (depth >= 0) hits[depth]++;
        }
    }
    free(key), free(own), free(stack);
    return failed ? -1 : 0;
}

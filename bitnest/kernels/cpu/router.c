/* Routers: from logits to the chosen experts and their weights. */

#include "runtime.h"

#include <math.h>

static void softmax(float *x, int64_t count) {
    float most = x[0], total = 0;
    for (int64_t i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < count; i++) total += x[i] = expf(x[i] - most);
    for (int64_t i = 0; i < count; i++) x[i] /= total;
}

/* The best expert not taken yet; of equals the first. */
static int64_t best(const float *score, int64_t count) {
    int64_t at = 0;
    for (int64_t i = 1; i < count; i++)
        if (score[i] > score[at]) at = i;
    return at;
}

/* logits [experts], which are overwritten, to index [top] and gates [top]. */
void choose(const router_t *r, float *logits, int64_t *index, float *gates) {
    if (r->bias)
        for (int64_t e = 0; e < r->experts; e++) logits[e] += r->bias[e];
    if (r->sigmoid)
        for (int64_t e = 0; e < r->experts; e++) logits[e] = 1 / (1 + expf(-logits[e]));
    else softmax(logits, r->experts);
    float total = 0;
    for (int64_t k = 0; k < r->top; k++) {
        index[k] = best(logits, r->experts);
        total += gates[k] = logits[index[k]];
        logits[index[k]] = -1;
    }
    for (int64_t k = 0; k < r->top; k++) gates[k] *= r->scale / (r->normalise ? total : 1);
}

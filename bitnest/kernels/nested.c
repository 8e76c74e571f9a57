/* Codes that serve several widths at once; see nested.py.
 *
 * Depth first through the tree of codes, the cheaper child first; a subtree whose cost so far
 * reaches the best code's is skipped, which leaves some tens of 500 nodes. */

#include <float.h>
#include <stdint.h>

#define MAX_WIDTHS 8
#define MAX_CHILDREN 256

typedef struct {
    int widths;
    int gap[MAX_WIDTHS];
    const float *table[MAX_WIDTHS];
    float share[MAX_WIDTHS];
    float x[MAX_WIDTHS];
    float best;
    int code;
} Search;

/* Equal costs: the lower code, whatever the order of the walk. */
static void offer(Search *s, int code, float cost)
{
    if (cost < s->best || (cost == s->best && code < s->code)) {
        s->best = cost;
        s->code = code;
    }
}

static float cost_of(const Search *s, int k, int node, float above)
{
    const float miss = s->x[k] - s->table[k][node];
    return above + s->share[k] * (miss * miss);
}

static void walk(Search *s, int k, int parent, float above)
{
    const int gap = s->gap[k], last = k + 1 == s->widths;
    if (gap == 1) {
        const int low = parent << 1;
        const float one = cost_of(s, k, low, above), two = cost_of(s, k, low | 1, above);
        if (last) {
            offer(s, low, one);
            offer(s, low | 1, two);
            return;
        }
        const int second = two < one;
        const float near = second ? two : one, far = second ? one : two;
        if (near <= s->best)
            walk(s, k + 1, low | second, near);
        if (far <= s->best)
            walk(s, k + 1, low | !second, far);
        return;
    }
    const int children = 1 << gap;
    float cost[MAX_CHILDREN];
    int cheapest = 0;
    for (int c = 0; c < children; c++) {
        cost[c] = cost_of(s, k, (parent << gap) | c, above);
        if (cost[c] < cost[cheapest])
            cheapest = c;
    }
    for (int turn = 0; turn <= children; turn++) { /* the cheapest, then all others in order */
        const int c = turn ? turn - 1 : cheapest;
        if ((turn && c == cheapest) || cost[c] > s->best)
            continue;
        if (last)
            offer(s, (parent << gap) | c, cost[c]);
        else
            walk(s, k + 1, (parent << gap) | c, cost[c]);
    }
}

/* targets (widths, count); tables one after another, 2^bits[k] entries each. */
void nested_choose(const float *targets, int64_t count, int widths, const int *bits,
                   const float *tables, const float *share, uint8_t *codes)
{
    Search s;
    s.widths = widths;
    for (int k = 0; k < widths; k++) {
        s.gap[k] = bits[k] - (k ? bits[k - 1] : 0);
        s.table[k] = tables;
        s.share[k] = share[k];
        tables += (int64_t)1 << bits[k];
    }
    for (int64_t i = 0; i < count; i++) {
        for (int k = 0; k < widths; k++)
            s.x[k] = targets[k * count + i];
        s.best = FLT_MAX;
        s.code = 0;
        walk(&s, 0, 0, 0.0f);
        codes[i] = (uint8_t)s.code;
    }
}

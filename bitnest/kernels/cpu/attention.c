/* Attention of few query tokens over a quantised cache: items, softmax, merging, plain loops. */

#include "attention.h"
#include "floats.h"

#include <math.h>
#include <stdatomic.h>

typedef struct {
    const attention_t *a;
    int64_t tiles, group_tiles, tile, item_tiles; /* of a KV head; of a group; tokens; of an item */
    int64_t items, stored_items;                  /* of a KV head */
    int rows;
    float *partial; /* [batch heads][items][rows][2 + E] */
    uint8_t *rooms;
    int64_t room_bytes;
    _Atomic int64_t next;
} plan_t;

float half_float(uint16_t h) {
    uint32_t body = h & 0x7fff, bits;
    float x;
    if (body < 0x400) {
        x = (float)body * 0x1p-24f;
    } else {
        bits = body >= 0x7c00 ? (body << 13) | 0x7f800000u : (body << 13) + (112u << 23);
        memcpy(&x, &bits, 4);
    }
    return h & 0x8000 ? -x : x;
}

static int64_t room_bytes(const attention_t *a, int rows) {
    int64_t widest = a->key_width > a->value_width ? a->key_width : a->value_width;
    int64_t floats = rows * (up(a->key_width, 16) + STRIDE + up(a->value_width, 64)) + TILE * up(widest, 16);
    int64_t codes = (rows + 19) * (a->key_width + 64) + rows * TILE;
    return up(4 * (floats + codes) + (int64_t)sizeof(room_t) + 512, 64);
}

static void make_plan(const attention_t *a, plan_t *p) {
    int64_t span = a->span > 1 ? a->span : TILE, per = (span + TILE - 1) / TILE;
    p->a = a;
    p->group_tiles = per;
    p->tile = (span + per - 1) / per;
    p->tiles = a->stored / span * per;
    if (a->stored % span) p->tiles += (a->stored % span + p->tile - 1) / p->tile; /* of 8-bit floats */
    p->item_tiles = ITEM / p->tile;
    p->stored_items = (p->tiles + p->item_tiles - 1) / p->item_tiles;
    p->items = p->stored_items + (a->recent + ITEM - 1) / ITEM;
    p->rows = (int)(a->share * a->queries);
    p->room_bytes = room_bytes(a, p->rows);
    p->next = 0;
}

static int64_t partial_bytes(const plan_t *p) {
    const attention_t *a = p->a;
    return up(4 * a->batch * a->heads * p->items * p->rows * (2 + a->value_width), 64);
}

int64_t attention_scratch(const attention_t *a, int threads) {
    plan_t p;
    make_plan(a, &p);
    return partial_bytes(&p) + threads * p.room_bytes;
}

/* Queries of a KV head turned back by the angles of a tile's first token. */
static void turn_queries(const attention_t *a, const tile_t *t, int rows, float *to) {
    int64_t width = up(a->key_width, 16), half = a->rotated / 2;
    const float *from = a->q + (t->b * a->heads + t->h) * rows * a->key_width;
    const float *cosine = a->base + t->number * 2 * half, *sine = cosine + half;
    for (int r = 0; r < rows; r++, from += a->key_width, to += width) {
        memcpy(to, from, 4 * a->key_width);
        for (int64_t i = a->key_width; i < width; i++) to[i] = 0;
        for (int64_t i = 0; a->neighbours && i < half; i++) {
            float x = from[2 * i], y = from[2 * i + 1];
            to[2 * i] = x * cosine[i] + y * sine[i];
            to[2 * i + 1] = y * cosine[i] - x * sine[i];
        }
        for (int64_t i = 0; !a->neighbours && i < half; i++) {
            float x = from[i], y = from[half + i];
            to[i] = x * cosine[i] + y * sine[i];
            to[half + i] = y * cosine[i] - x * sine[i];
        }
    }
}

static float small_float(uint8_t code, int kind) {
    if (kind == CACHE_E5M2) return half_float((uint16_t)(code << 8));
    float x = half_float((uint16_t)((code & 0x7f) << 7)) * 256.0f;
    if ((code & 0x7f) == 0x7f) x = NAN;
    return code & 0x80 ? -x : x;
}

static inline int code_at(const uint8_t *row, int64_t i, int kind) {
    return kind == CACHE_INT4 ? (row[i / 2] >> (i % 2 * 4)) & 15 : row[i];
}

static int64_t row_bytes(int64_t width, int kind) { return kind == CACHE_INT4 ? (width + 1) / 2 : width; }

static void plain_keys(const attention_t *a, const tile_t *t, float *to) {
    int64_t width = up(a->key_width, 16), bytes = row_bytes(a->key_width, a->kind), half = a->rotated / 2;
    const uint8_t *row = a->keys + t->b * a->key_strides[0] + t->h * a->key_strides[1] + t->first * bytes;
    int64_t at = t->b * a->key_scale_strides[0] + t->h * a->key_scale_strides[1] + t->group * a->key_width;
    int64_t step = a->neighbours ? 2 : 1, other = a->neighbours ? 1 : half;
    float scale[MAX_WIDTH], low[MAX_WIDTH];
    if (a->kind < CACHE_E4M3)
        for (int64_t i = 0; i < a->key_width; i++)
            scale[i] = half_float(a->key_scale[at + i]), low[i] = half_float(a->key_low[at + i]);
    for (int64_t n = 0; n < t->tokens; n++, row += bytes, to += width) {
        for (int64_t i = 0; i < a->key_width; i++)
            to[i] = a->kind >= CACHE_E4M3 ? small_float(row[i], a->kind) * a->key_factor
                                          : (float)code_at(row, i, a->kind) * scale[i] + low[i];
        for (int64_t i = a->key_width; i < width; i++) to[i] = 0;
        const float *cosine = a->turn + n * 2 * half, *sine = cosine + half;
        for (int64_t i = 0; i < half; i++) {
            float x = to[i * step], y = to[i * step + other];
            to[i * step] = x * cosine[i] - y * sine[i];
            to[i * step + other] = y * cosine[i] + x * sine[i];
        }
    }
}

static void plain_values(const attention_t *a, const tile_t *t, float *to) {
    int64_t width = up(a->value_width, 16), bytes = row_bytes(a->value_width, a->kind);
    const uint8_t *row = a->values + t->b * a->value_strides[0] + t->h * a->value_strides[1] + t->first * bytes;
    int64_t at = t->b * a->value_scale_strides[0] + t->h * a->value_scale_strides[1] + t->first;
    for (int64_t n = 0; n < t->tokens; n++, row += bytes, to += width) {
        float scale = 0, low = 0;
        if (a->kind < CACHE_E4M3) scale = half_float(a->value_scale[at + n]), low = half_float(a->value_low[at + n]);
        for (int64_t i = 0; i < a->value_width; i++)
            to[i] = a->kind >= CACHE_E4M3 ? small_float(row[i], a->kind) * a->value_factor
                                          : (float)code_at(row, i, a->kind) * scale + low;
        for (int64_t i = a->value_width; i < width; i++) to[i] = 0;
    }
}

/* Rows of 16-bit or 32-bit numbers as float32, padded with zeros. */
static void dense_rows(const void *from, int kind, int64_t tokens, int64_t columns, float *to) {
    int64_t width = up(columns, 16), size = kind == DENSE_F32 ? 4 : 2;
    for (int64_t n = 0; n < tokens; n++, to += width) {
        const uint8_t *row = (const uint8_t *)from + n * columns * size;
        for (int64_t i = 0; i < columns; i += 16) {
            int64_t held = columns - i < 16 ? columns - i : 16;
            union {
                float floats[16];
                uint16_t halves[16];
            } part = {{0}};
            const void *at = row + i * size;
            if (held < 16) at = memcpy(&part, at, held * size);
            vh h;
            memcpy(&h, at, sizeof h);
            vf_store(to + i, kind == DENSE_F32 ? vf_load(at) : kind == DENSE_BF16 ? vf_bf16(h) : vf_f16(h));
        }
    }
}

static void row_scores(const attention_t *a, const float *q, const float *keys, int64_t tokens, int rows, float *scores) {
    int64_t width = up(a->key_width, 16);
    for (int64_t n = 0; n < tokens; n++)
        for (int r = 0; r < rows; r++) {
            vf sum = {0};
            for (int64_t i = 0; i < width; i += 16) sum += vf_load(q + r * width + i) * vf_load(keys + n * width + i);
            scores[r * STRIDE + n] = vf_sum(sum) * a->scaling;
        }
}

static void row_values(const attention_t *a, const float *values, int64_t tokens, int rows, const float *weights, float *sums) {
    int64_t width = up(a->value_width, 16), wide = up(a->value_width, 64);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += 16) {
            vf sum = vf_load(sums + r * wide + i);
            for (int64_t n = 0; n < tokens; n++) sum += weights[r * STRIDE + n] * vf_load(values + n * width + i);
            vf_store(sums + r * wide + i, sum);
        }
}

/* Softcap, mask and what is out of sight, then weights relative to the largest: (largest, sum) of a
   row. Scores of `tokens` from `position` on; padding behind them becomes 0. */
static void weigh(const attention_t *a, const tile_t *t, int rows, int64_t position, int64_t tokens, float *scores, float *found, int64_t step) {
    int64_t ahead = a->start + a->stored + a->recent - a->queries;
    for (int r = 0; r < rows; r++, scores += STRIDE, found += step) {
        int64_t query = r % a->queries, at = ahead + query, last = at - position + 1;
        int64_t first = a->sliding ? at - a->sliding + 1 - position : 0;
        if (a->softcap > 0)
            for (int64_t n = 0; n < tokens; n++) scores[n] = a->softcap * tanhf(scores[n] / a->softcap);
        if (a->mask) {
            const float *mask = a->mask + t->b * a->mask_strides[0] + query * a->mask_strides[1] + position - a->mask_first;
            int64_t from = a->mask_first - position > 0 ? a->mask_first - position : 0;
            for (int64_t n = from; n < tokens && n < last; n++) scores[n] += mask[n];
        }
        for (int64_t n = 0; n < first && n < tokens; n++) scores[n] = -INFINITY;
        for (int64_t n = last < 0 ? 0 : last; n < tokens; n++) scores[n] = -INFINITY;
        for (int64_t n = tokens; n < up(tokens, 16); n++) scores[n] = -INFINITY;
        vf top = vf_load(scores), sum = {0};
        for (int64_t n = 16; n < tokens; n += 16) top = vf_max(vf_load(scores + n), top);
        float most = vf_most(top);
        for (int64_t n = 0; n < tokens; n += 16) {
            vf w = most == -INFINITY ? vf_all(0.0f) : vf_exp(vf_load(scores + n) - most);
            vf_store(scores + n, w);
            sum += w;
        }
        found[0] = most, found[1] = vf_sum(sum);
    }
}

static void make_tile(const plan_t *p, int64_t b, int64_t h, int64_t number, tile_t *t) {
    const attention_t *a = p->a;
    int64_t span = a->span > 1 ? a->span : TILE, in = number % p->group_tiles * p->tile;
    t->b = b, t->h = h, t->group = number / p->group_tiles, t->first = t->group * span + in;
    t->tokens = span - in < p->tile ? span - in : p->tile;
    if (a->stored - t->first < t->tokens) t->tokens = a->stored - t->first;
    t->number = a->start / span * p->group_tiles + number;
}

static void stored_item(const plan_t *p, int64_t b, int64_t h, int64_t item, room_t *room, float *found) {
    const attention_t *a = p->a;
    int64_t first = item * p->item_tiles, last = first + p->item_tiles, done = 0, begin = 0;
    tile_t t;
    if (last > p->tiles) last = p->tiles;
    for (int64_t i = first; i < last; i++, done += t.tokens) {
        make_tile(p, b, h, i, &t);
        if (i == first) begin = t.first;
        if (i == first || a->rotated) turn_queries(a, &t, p->rows, room->q);
        if (a->fast && attention_fast_scores(a, &t, room, p->rows, room->scores + done)) continue;
        if (a->fast && attention_float_scores(a, &t, room, p->rows, room->scores + done)) continue;
        plain_keys(a, &t, room->rows);
        row_scores(a, room->q, room->rows, t.tokens, p->rows, room->scores + done);
    }
    weigh(a, &t, p->rows, a->start + begin, done, room->scores, found, 2 + a->value_width);
    for (int r = 0; r < p->rows; r++) memset(room->scores + r * STRIDE + done, 0, 64);
    done = 0;
    for (int64_t i = first; i < last; i++, done += t.tokens) {
        make_tile(p, b, h, i, &t);
        if (a->fast && attention_fast_values(a, &t, room, p->rows, room->scores + done)) continue;
        if (a->fast && attention_float_values(a, &t, room, p->rows, room->scores + done)) continue;
        plain_values(a, &t, room->rows);
        row_values(a, room->rows, t.tokens, p->rows, room->scores + done, room->sums);
    }
}

static void recent_item(const plan_t *p, int64_t b, int64_t h, int64_t item, room_t *room, float *found) {
    const attention_t *a = p->a;
    int64_t first = item * ITEM, last = first + ITEM < a->recent ? first + ITEM : a->recent;
    int64_t size = a->dense == DENSE_F32 ? 4 : 2, width = up(a->key_width, 16);
    const uint8_t *keys = (const uint8_t *)a->recent_keys + size * (b * a->recent_key_strides[0] + h * a->recent_key_strides[1]);
    const uint8_t *values = (const uint8_t *)a->recent_values + size * (b * a->recent_value_strides[0] + h * a->recent_value_strides[1]);
    const float *q = a->q + (b * a->heads + h) * p->rows * a->key_width;
    tile_t t = {b, h, 0, 0, 0, 0};
    for (int r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < width; i++) room->q[r * width + i] = i < a->key_width ? q[r * a->key_width + i] : 0;
    for (int64_t n = first; n < last; n += TILE) {
        int64_t tokens = last - n < TILE ? last - n : TILE;
        dense_rows(keys + n * a->key_width * size, a->dense, tokens, a->key_width, room->rows);
        row_scores(a, room->q, room->rows, tokens, p->rows, room->scores + n - first);
    }
    weigh(a, &t, p->rows, a->start + a->stored + first, last - first, room->scores, found, 2 + a->value_width);
    for (int64_t n = first; n < last; n += TILE) {
        int64_t tokens = last - n < TILE ? last - n : TILE;
        dense_rows(values + n * a->value_width * size, a->dense, tokens, a->value_width, room->rows);
        row_values(a, room->rows, tokens, p->rows, room->scores + n - first, room->sums);
    }
}

/* Add up the items of a row, in their order. A row that sees nothing gives zeros. */
static void merge(const plan_t *p, int64_t head, int r) {
    const attention_t *a = p->a;
    int64_t step = 2 + a->value_width, query = r % a->queries, h = head % a->heads * a->share + r / a->queries;
    const float *from = p->partial + (head * p->items * p->rows + r) * step;
    float most = a->sinks ? a->sinks[h] : -INFINITY, sum = 0;
    float *to = a->out + ((head / a->heads * a->queries + query) * a->heads * a->share + h) * a->value_width;
    for (int64_t i = 0; i < p->items; i++) most = from[i * p->rows * step] > most ? from[i * p->rows * step] : most;
    for (int64_t c = 0; c < a->value_width; c++) to[c] = 0;
    if (most == -INFINITY) return;
    if (a->sinks) sum = expf(a->sinks[h] - most);
    for (int64_t i = 0; i < p->items; i++, from += p->rows * step) {
        float weight = from[0] == -INFINITY ? 0 : expf(from[0] - most);
        sum += weight * from[1];
        for (int64_t c = 0; c < a->value_width; c++) to[c] += weight * from[2 + c];
    }
    for (int64_t c = 0; c < a->value_width; c++) to[c] /= sum;
}

static float *take(uint8_t **at, int64_t floats) {
    float *found = (float *)*at;
    *at += up(4 * floats, 64);
    return found;
}

static void job(void *argument, int thread, int threads) {
    plan_t *p = argument;
    const attention_t *a = p->a;
    int64_t heads = a->batch * a->heads, step = 2 + a->value_width, wide = up(a->value_width, 64);
    int64_t widest = a->key_width > a->value_width ? a->key_width : a->value_width;
    uint8_t *at = p->rooms + thread * p->room_bytes;
    room_t *room = (room_t *)at;
    at += up(sizeof *room, 64);
    room->q = take(&at, p->rows * up(a->key_width, 16));
    room->scores = take(&at, p->rows * STRIDE);
    room->sums = take(&at, p->rows * wide);
    room->rows = take(&at, TILE * up(widest, 16));
    room->codes = (int32_t *)at;
    for (int i = 0; i < 128 && a->kind >= CACHE_E4M3; i++) {
        float x = small_float((uint8_t)i, a->kind);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        room->lookup[0][i] = (uint8_t)(bits >> 16), room->lookup[1][i] = (uint8_t)(bits >> 24);
    }
    for (int64_t i; (i = atomic_fetch_add(&p->next, 1)) < heads * p->items;) {
        int64_t head = i / p->items, item = i % p->items, b = head / a->heads, h = head % a->heads;
        float *found = p->partial + i * p->rows * step;
        memset(room->sums, 0, 4 * p->rows * wide);
        if (item < p->stored_items)
            stored_item(p, b, h, item, room, found);
        else
            recent_item(p, b, h, item - p->stored_items, room, found);
        for (int r = 0; r < p->rows; r++) memcpy(found + r * step + 2, room->sums + r * wide, 4 * a->value_width);
    }
    barrier();
    int64_t first, last;
    share(heads * p->rows, 1, thread, threads, &first, &last);
    for (int64_t i = first; i < last; i++) merge(p, i / p->rows, (int)(i % p->rows));
}

void attention(const attention_t *a) {
    plan_t p;
    make_plan(a, &p);
    p.partial = (float *)a->scratch;
    p.rooms = a->scratch + partial_bytes(&p);
    run(job, &p);
}

/* Inputs of a stage and its products, split between threads by how long they take. */

#include "runtime.h"

#include <string.h>

void *take(arena_t *arena, size_t bytes) {
    void *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += (bytes + 63) / 64 * 64;
    return at;
}

static int present(const linear_t *linear) { return linear->w.rows > 0; }
static int plain(const linear_t *linear) { return linear->rows32 || linear->rows16; }

int needs_of(const linear_t *linear) {
    if (!present(linear) || plain(linear)) return 0;
    return linear->w.engine == INTEGER ? NEED_CODES : NEED_HALVES;
}

int network_needs(const network_t *network, int down) {
    if (!present(&network->down)) return 0;
    return down ? needs_of(&network->down) : needs_of(&network->gate) | needs_of(&network->up);
}

static int64_t padded(int64_t columns) { return (columns + UNIT - 1) / UNIT * UNIT; }

/* Columns per scale of inputs: few where codes are short. */
static int32_t input_block(int planes, int64_t columns) {
    int64_t whole = padded(columns);
    return planes > 1 && whole <= 65536 ? (int32_t)whole : 32;
}

coded_t take_coded(arena_t *arena, int64_t tokens, int64_t columns, int planes, int needs) {
    int64_t wide = padded(columns);
    coded_t out = {.stride = columns};
    out.in = (inputs_t){.tokens = tokens, .columns = wide, .block = input_block(planes, columns)};
    out.in.planes = needs & NEED_CODES ? planes : 0;
    if (needs & NEED_CODES) {
        int64_t blocks = (wide + out.in.block - 1) / out.in.block;
        out.in.codes = take(arena, tokens * planes * wide);
        out.in.scales = take(arena, tokens * blocks * sizeof(float));
        out.in.sums = take(arena, tokens * planes * (wide / SUM_COLUMNS) * sizeof(int32_t));
    }
    if (needs & NEED_HALVES) out.in.halves = take(arena, tokens * wide * sizeof(uint16_t));
    return out;
}

/* `tokens` rows from `first` on, of `columns` (rows of networks narrower than the widest one have
   the memory of the widest, but lie close together). */
coded_t part_of(const coded_t *x, int64_t first, int64_t tokens, int64_t columns) {
    coded_t out = *x;
    int64_t wide = x->in.columns, block = x->in.block;
    int64_t own = padded(columns);
    out.in.tokens = tokens;
    out.in.columns = own;
    if (block >= wide) out.in.block = (int32_t)(own > 0 ? own : UNIT);
    if (x->in.codes) {
        out.in.codes = x->in.codes + first * x->in.planes * wide;
        out.in.scales = x->in.scales + first * ((wide + block - 1) / block);
        out.in.sums = x->in.sums + first * x->in.planes * (wide / SUM_COLUMNS);
    }
    if (x->in.halves) out.in.halves = x->in.halves + first * wide;
    if (x->rows) out.rows = x->rows + first * x->stride;
    return out;
}

/* Code rows first to last - 1 of x->rows, as far as any engine needs them. */
void code_rows(const coded_t *x, int64_t columns, int64_t first, int64_t last) {
    if (first < last && (x->in.codes || x->in.halves))
        code_inputs(x->rows, x->stride, columns, &x->in, first, last);
}

/* The time of one block of rows, up to a factor: bytes to read, or products to make. */
static int64_t block_cost(const task_t *task) {
    const linear_t *l = task->linear;
    int64_t tokens = task->x.in.tokens;
    if (plain(l)) return l->w.columns * (tokens + 4);
    int64_t bits = l->w.engine == DENSE ? 16 : l->w.bits;
    return l->w.units * (bits + tokens * (task->x.in.planes > 0 ? task->x.in.planes : 4) / 2 + 1);
}

static int64_t blocks_of(const task_t *task) {
    return (task->linear->w.rows + ROWS - 1) / ROWS;
}

static void wide_row(const uint16_t *row, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)row[i] << 16;
        memcpy(out + i, &bits, 4);
    }
}

/* Rows first to last - 1 of a matrix that is not packed. */
static void plain_product(const task_t *task, int64_t first, int64_t last) {
    const linear_t *l = task->linear;
    int64_t columns = l->w.columns;
    float buffer[1024];
    for (int64_t o = first; o < last; o++) {
        for (int64_t t = 0; t < task->x.in.tokens; t++) task->y[t * task->stride + o] = 0;
        for (int64_t start = 0; start < columns; start += 1024) {
            int64_t count = columns - start < 1024 ? columns - start : 1024;
            const float *row = l->rows32 ? l->rows32 + o * columns + start : buffer;
            if (!l->rows32) wide_row(l->rows16 + o * columns + start, buffer, count);
            for (int64_t t = 0; t < task->x.in.tokens; t++)
                task->y[t * task->stride + o] += dot(task->x.rows + t * task->x.stride + start, row, count);
        }
    }
}

static void do_blocks(const task_t *task, int64_t first, int64_t last) {
    const linear_t *l = task->linear;
    int64_t rows = last * ROWS < l->w.rows ? last * ROWS : l->w.rows;
    if (plain(l)) plain_product(task, first * ROWS, rows);
    else product(&l->w, &task->x.in, task->y, task->stride, first, last);
    if (!l->bias) return;
    for (int64_t t = 0; t < task->x.in.tokens; t++)
        for (int64_t o = first * ROWS; o < rows; o++) task->y[t * task->stride + o] += l->bias[o];
}

/* All tasks, as one row of blocks cut where each thread has its share of the time. */
void multiply(const task_t *tasks, int64_t count, int thread, int threads) {
    int64_t total = 0, before = 0;
    for (int64_t i = 0; i < count; i++) total += block_cost(tasks + i) * blocks_of(tasks + i);
    int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    for (int64_t i = 0; i < count; i++) {
        int64_t cost = block_cost(tasks + i), blocks = blocks_of(tasks + i);
        if (cost > 0 && blocks > 0) {
            int64_t first = from > before ? (from - before + cost - 1) / cost : 0;
            int64_t last = to > before ? (to - before + cost - 1) / cost : 0;
            if (first > blocks) first = blocks;
            if (last > blocks) last = blocks;
            if (first < last && tasks[i].x.in.tokens > 0) do_blocks(tasks + i, first, last);
        }
        before += cost * blocks;
    }
}

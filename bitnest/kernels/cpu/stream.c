/* How fast this machine reads memory: what benchmarks hold kernels against. */

#include "vectors.h"

#include "cpu.h"

typedef struct {
    const uint8_t *from;
    int64_t bytes;
    uint64_t found[256];
} stream_t;

static void read_job(void *argument, int thread, int threads) {
    stream_t *s = argument;
    int64_t first, last;
    share(s->bytes, 4096, thread, threads, &first, &last);
    vi32 sum[4] = {{0}};
    for (int64_t at = first; at + 256 <= last; at += 256)
        for (int i = 0; i < 256 / VB; i++) sum[i % 4] ^= LOAD(vi32, s->from + at + i * VB);
    vi32 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    for (int i = 0; i < LANES; i++) s->found[thread] ^= (uint32_t)all[i];
}

/* Reads all of it, a multiple of 4096 bytes, on the team of threads; returns what keeps compilers
   from leaving it out. */
uint64_t stream_read(const void *from, int64_t bytes) {
    stream_t s = {.from = from, .bytes = bytes};
    uint64_t found = 0;
    run(read_job, &s);
    for (int i = 0; i < 256; i++) found ^= s.found[i];
    return found;
}

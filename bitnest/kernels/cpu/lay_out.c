/* Packed rows of codes (a little-endian bitstream each, kernels/packing.py) into planes, and back. */

#include "cpu.h"

#include <string.h>

typedef struct {
    int64_t rows, columns;
    int64_t row_bytes;  /* of the stream */
    int32_t bits;       /* of a code in the stream */
    int32_t planes;
    int32_t plane_bits[MAX_PLANES];
    int64_t plane_stride[MAX_PLANES];
    uint8_t *plane[MAX_PLANES]; /* most significant first; their bits are the lowest of a code */
    uint8_t *stream;
    int32_t back;       /* planes to stream */
    int32_t words;      /* the layout of TABLE */
} packed_t;

/* 8 codes are `bits` bytes; of the last ones only those that are there are touched. */
static void read_codes(const uint8_t *from, int64_t left, int bits, uint8_t *codes, int64_t count) {
    uint64_t mask = (1u << bits) - 1;
    memset(codes, 0, UNIT);
    for (int64_t i = 0; i < count; i += 8, from += bits, left -= bits) {
        uint64_t word = 0, spread = 0;
        memcpy(&word, from, left < bits ? (size_t)left : (size_t)bits);
        for (int j = 0; j < 8; j++) spread |= (word >> (j * bits) & mask) << (8 * j);
        memcpy(codes + i, &spread, 8);
    }
    if (count < UNIT) memset(codes + count, 0, (size_t)(UNIT - count));
}

static void write_codes(uint8_t *to, int64_t left, int bits, const uint8_t *codes, int64_t count) {
    uint64_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; i += 8, to += bits, left -= bits) {
        uint64_t word = 0, spread;
        memcpy(&spread, codes + i, 8);
        for (int j = 0; j < 8; j++) word |= (spread >> (8 * j) & mask) << (j * bits);
        memcpy(to, &word, left < bits ? (size_t)left : (size_t)bits);
    }
}

/* Where the layout of words has what that of bytes has in byte m of field k % (8 / b) of vector
   k / (8 / b): quarter and byte of it. */
static inline uint8_t *in_words(uint8_t quarter[8][64], int b, int k, int m) {
    int f = (m & 1) * (8 / b) + k % (8 / b), t = b * f + k / (8 / b);
    return &quarter[t / 2][(m & ~3) | (t & 1) << 1 | (m >> 1 & 1)];
}

static void order_words(uint8_t quarter[8][64], int b, uint8_t ordered[8][64]) {
    for (int k = 0; k < 8; k++)
        for (int m = 0; m < 64; m++) ordered[k][m] = *in_words(quarter, b, k, m);
}

/* A unit of a block: quarter[q][4 r + j] is row r, column 4 q + j. */
static void to_planes(const packed_t *p, uint8_t codes[8][64], int64_t unit) {
    int low = 0;
    uint8_t ordered[8][64], (*quarter)[64] = codes;
    for (int k = p->planes - 1; k >= 0; low += p->plane_bits[k--]) {
        int b = p->plane_bits[k], mask = (1 << b) - 1;
        uint8_t *to = p->plane[k] + unit * p->plane_stride[k];
        if (p->words) order_words(codes, b, quarter = ordered);
        for (int v = 0; v < b; v++) {
            uint8_t vector[64] = {0};
            for (int f = 0; f < 8 / b; f++)
                for (int i = 0; i < 64; i++)
                    vector[i] |= (uint8_t)((quarter[v * (8 / b) + f][i] >> low & mask) << (f * b));
            memcpy(to + 64 * v, vector, 64);
        }
    }
}

static void from_planes(const packed_t *p, uint8_t codes[8][64], int64_t unit) {
    int low = 0;
    uint8_t ordered[8][64], (*quarter)[64] = p->words ? ordered : codes;
    memset(codes, 0, 512);
    for (int k = p->planes - 1; k >= 0; low += p->plane_bits[k--]) {
        int b = p->plane_bits[k], mask = (1 << b) - 1;
        const uint8_t *from = p->plane[k] + unit * p->plane_stride[k];
        if (p->words) memset(ordered, 0, 512);
        for (int v = 0; v < b; v++)
            for (int f = 0; f < 8 / b; f++)
                for (int i = 0; i < 64; i++)
                    quarter[v * (8 / b) + f][i] |= (uint8_t)((from[64 * v + i] >> (f * b) & mask) << low);
        for (int q = 0; p->words && q < 8; q++)
            for (int m = 0; m < 64; m++) *in_words(codes, b, q, m) |= ordered[q][m];
    }
}

static void lay_blocks(void *argument, int thread, int threads) {
    const packed_t *p = argument;
    int64_t units = (p->columns + UNIT - 1) / UNIT, first, last;
    share((p->rows + ROWS - 1) / ROWS, 1, thread, threads, &first, &last);
    for (int64_t block = first; block < last; block++)
        for (int64_t u = 0; u < units; u++) {
            uint8_t quarter[8][64], codes[UNIT];
            int64_t rows = p->rows - block * ROWS, count = p->columns - u * UNIT;
            int64_t at = u * UNIT / 8 * p->bits;
            rows = rows < ROWS ? rows : ROWS;
            count = count < UNIT ? count : UNIT;
            if (p->back)
                from_planes(p, quarter, block * units + u);
            else
                memset(quarter, 0, sizeof quarter);
            for (int64_t r = 0; r < rows; r++) {
                uint8_t *stream = p->stream + (block * ROWS + r) * p->row_bytes + at;
                if (!p->back) read_codes(stream, p->row_bytes - at, p->bits, codes, count);
                for (int q = 0; q < 8; q++)
                    memcpy(p->back ? codes + 4 * q : quarter[q] + 4 * r,
                           p->back ? quarter[q] + 4 * r : codes + 4 * q, 4);
                if (p->back) write_codes(stream, p->row_bytes - at, p->bits, codes, count);
            }
            if (!p->back) to_planes(p, quarter, block * units + u);
        }
}

/* Whole matrix, on the team of threads. */
void lay_out(packed_t *p) { run(lay_blocks, p); }
int64_t packed_size(void) { return sizeof(packed_t); }

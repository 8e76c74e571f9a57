/* Attention of few query tokens over a quantised cache: what its parts share.

   Tokens stored as codes are cut into tiles of at most 128, none of which crosses a group of scales;
   neighbouring tiles make an item, whose scores are all computed before its values are read. What an
   item gives, its largest score, the sum of its weights and its sum of values, depends on nothing
   else, and items are merged in their order: the result does not depend on the number of threads.

   Keys k are stored before the rotation R. With p = base + t the position of token t of a tile

       q R(p) k = (R(-base) q) (R(t) k)

   so queries are turned once a tile, and keys by angles that are the same in all tiles. */

#ifndef BITNEST_ATTENTION_H
#define BITNEST_ATTENTION_H

#include "cpu.h"

#define TILE 128        /* most tokens of one */
#define ITEM 512        /* most tokens of one */
#define STRIDE (ITEM + 16) /* of scores: fast paths write 16 tokens at a time */
#define MAX_ROWS 64     /* query heads of a KV head, times queries */
#define MAX_WIDTH 512   /* channels of a head */

enum cache_kind { CACHE_NONE = 0, CACHE_INT8, CACHE_INT4, CACHE_E4M3, CACHE_E5M2 };
enum dense_kind { DENSE_F32 = 0, DENSE_BF16, DENSE_F16 };

/* Strides are in entries, of batch rows and of heads; tokens are contiguous. Positions count tokens
   from the first that ever came. Query i is at position start + stored + recent - queries + i. */
typedef struct {
    int64_t batch, heads, share, queries; /* share: query heads of a KV head */
    int64_t key_width, value_width;       /* D, E */
    int64_t stored, start, recent;        /* tokens as codes, the first one's position, 16-bit ones */
    int64_t sliding;                      /* tokens a query sees, itself included; 0: all */
    int32_t kind, span;                   /* span: tokens that share a key channel's scale */
    int32_t dense, neighbours, rotated;   /* rotated: channels, r; 0: none */
    int32_t fast;                         /* 0: the plain loops, for comparison */
    float key_factor, value_factor;       /* scales of 8-bit floats */
    float scaling, softcap;               /* softcap: 0 for none */
    const float *q;                       /* [B][heads share][queries][D] */
    const uint8_t *keys, *values;
    const uint16_t *key_scale, *key_low, *value_scale, *value_low; /* float16 */
    const void *recent_keys, *recent_values;
    int64_t key_strides[2], value_strides[2], key_scale_strides[2], value_scale_strides[2];
    int64_t recent_key_strides[2], recent_value_strides[2];
    const float *sinks;                   /* [heads share], or NULL */
    const float *mask;                    /* added to scores, or NULL */
    int64_t mask_strides[2], mask_first;  /* batch, query; position of its first column */
    const float *base;                    /* [tiles][cos, sin][r / 2], tiles from position 0 */
    const float *turn;                    /* [TILE][cos, sin][r / 2] of t */
    const int16_t *table;                 /* the same as `attention_table` lays it out */
    float *out;                           /* [B][queries][heads share][E] */
    uint8_t *scratch;                     /* attention_scratch bytes, 64-byte aligned */
} attention_t;

/* Consecutive stored tokens of one KV head under one group of key scales. */
typedef struct {
    int64_t b, h, first, tokens; /* first: counted from the first stored one */
    int64_t group, number;       /* group of scales; row of `base` */
} tile_t;

/* Per thread: queries turned to a tile, and what paths need besides. */
typedef struct {
    float *q;        /* [rows][D padded to 16] */
    float *scores;   /* [rows][STRIDE] */
    float *sums;     /* [rows][E padded to 64] */
    float *rows;     /* [TILE][widest padded to 16] */
    int32_t *codes;  /* for the fast paths */
    uint8_t lookup[2][128];
} room_t;

static inline int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

float half_float(uint16_t h);

/* Fast paths: scores[row STRIDE + t] = q k scaling, and sums[row][channel] += sum of weights v. Zero
   where there is none for this shape and machine. */
int attention_fast_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores);
int attention_fast_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights);
int attention_float_scores(const attention_t *a, const tile_t *t, room_t *room, int rows, float *scores);
int attention_float_values(const attention_t *a, const tile_t *t, room_t *room, int rows, const float *weights);

#endif

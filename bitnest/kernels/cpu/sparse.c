/* Sparse weights: load what is there, multiply as if all were.

   A piece of 64 columns of a row: its survivors are loaded, put where the mask has bits (vpexpandb,
   vpexpandw; tables of 8 bits, or one by one, elsewhere), and multiplied with 64 inputs. Codes go
   beside the code of zero, so that what is dropped counts nothing once

       sum (c - z) x = sum c x - z sum x

   has its second term, a sum of inputs known beforehand. Lane l adds columns 4 l to 4 l + 3, so
   groups of 4 columns or more are a scale per lane. Sums of codes are exact integers in a cell,
   columns under one scale on both sides. 16-bit values are multiplied in float32. */

#include "sparse.h"
#include "floats.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define EXPAND 512
#elif defined(__AVX2__)
#define EXPAND 256
#else
#define EXPAND 0
#endif
#if EXPAND
#include <immintrin.h>
#endif

#define AT_ONCE 4 /* tokens */
#define MAX_INPUTS 3

/* Inputs as rows of whole pieces. */
typedef struct {
    int64_t tokens, pieces, cell, cells; /* cell: pieces of one; cells of a row */
    int planes;
    int8_t *codes;  /* [tokens][planes][pieces 64] */
    float *sums;    /* [tokens][cells][16], over 4 columns each */
    float *scales;  /* [tokens][cells] */
    float *numbers; /* [tokens][pieces 64] of 16-bit weights, in the order that they are expanded in */
} prepared_t;

#if EXPAND == 256
static uint8_t places[256][8];

__attribute__((constructor)) static void fill_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, k = 0; i < 8; i++) places[mask][i] = mask >> i & 1 ? (uint8_t)k++ : 15;
}
#endif

/* 64 codes, survivors of the mask from p on, others `zero`. */
static inline void expand_codes(const uint8_t *p, int bits, uint64_t mask, int zero, uint8_t *to) {
    uint8_t held[72];
    if (bits == 4) {
        for (int i = 0; i < 32; i++) held[2 * i] = p[i] & 15, held[2 * i + 1] = p[i] >> 4;
    } else {
        memcpy(held, p, 64);
    }
#if EXPAND == 256
    const uint8_t *from = held;
    for (int i = 0; i < 8; i++) {
        unsigned part = mask >> 8 * i & 255;
        __m128i codes = _mm_insert_epi8(_mm_loadl_epi64((const __m128i *)from), zero, 15);
        _mm_storel_epi64((__m128i *)(to + 8 * i), _mm_shuffle_epi8(codes, _mm_loadl_epi64((const __m128i *)places[part])));
        from += __builtin_popcount(part);
    }
#else
    for (int i = 0, k = 0; i < PIECE; i++) to[i] = mask >> i & 1 ? held[k++] : (uint8_t)zero;
#endif
}

static inline vi dot64(vi sum, const uint8_t *w, const int8_t *x) {
#if EXPAND == 256
    __m256i pairs[4], sums[2];
    for (int i = 0; i < 4; i++) {
        __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(w + 16 * i)));
        pairs[i] = _mm256_madd_epi16(a, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + 16 * i))));
    }
    for (int i = 0; i < 2; i++) sums[i] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(pairs[2 * i], pairs[2 * i + 1]), 0xd8);
    vi found;
    memcpy(&found, sums, sizeof found);
    return sum + found;
#else
    for (int l = 0; l < 16; l++)
        for (int j = 0; j < 4; j++) sum[l] += w[4 * l + j] * x[4 * l + j];
    return sum;
#endif
}

/* Scales of the lanes of a piece where groups do not hold whole pieces. */
static vf lane_numbers(const sparse_t *w, int64_t row, int64_t piece, vf *zeros) {
    vf scales = {0};
    for (int l = 0; l < 16; l++) {
        int64_t g = (piece * PIECE + 4 * l) / w->group;
        if (g >= w->groups) g = w->groups - 1;
        scales[l] = w->scales[row * w->groups + g];
        (*zeros)[l] = w->zeros ? w->zeros[row * w->groups + g] : w->zero;
    }
    return scales;
}

static inline __attribute__((always_inline)) void
code_row(const sparse_t *w, const prepared_t *x, int64_t token, const int tokens, const int bits, const int planes, int64_t row, float *y, int64_t stride) {
    const uint8_t *p = w->values + w->starts[row];
    const uint64_t *mask = w->mask + row * w->pieces;
    const int8_t *codes = x->codes + token * planes * x->pieces * PIECE;
    int whole = w->groups == 1 || w->group % PIECE == 0;
    int64_t per = w->groups == 1 || !whole ? INT64_MAX : w->group / PIECE / x->cell, left = per, g = 0;
    vf total[AT_ONCE];
    for (int t = 0; t < tokens; t++) total[t] = vf_all(0);
    for (int64_t cell = 0; cell < x->cells; cell++) {
        int64_t first = cell * x->cell, last = first + x->cell < x->pieces ? first + x->cell : x->pieces;
        if (left == 0) g++, left = per; /* no division in this loop: it costs as much as a piece */
        left--;
        vf scales, zeros = vf_all(0);
        int zero = w->zeros ? 0 : w->zero; /* of what is dropped */
        if (whole) {
            if (w->zeros) zero = w->zeros[row * w->groups + g];
            scales = vf_all(w->scales[row * w->groups + g]), zeros = vf_all((float)zero);
        } else {
            scales = lane_numbers(w, row, first, &zeros);
        }
#if EXPAND == 512
        __m512i sums[AT_ONCE][MAX_INPUTS], fill = _mm512_set1_epi8((char)zero);
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < planes; k++) sums[t][k] = _mm512_setzero_si512();
        if (!whole && w->zeros) { /* a zero point per lane: four columns of it */
            vu bytes = __builtin_convertvector(zeros, vu) * 0x01010101u;
            fill = (__m512i)bytes;
        }
        for (int64_t i = first; i < last; i++) {
            __m512i c;
            if (bits == 4) {
                __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
                c = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
                p += (_mm_popcnt_u64(mask[i]) + 1) / 2;
            } else {
                c = _mm512_loadu_si512(p);
                p += _mm_popcnt_u64(mask[i]);
            }
            c = _mm512_mask_expand_epi8(fill, mask[i], c);
            for (int t = 0; t < tokens; t++)
                for (int k = 0; k < planes; k++)
                    sums[t][k] = _mm512_dpbusd_epi32(sums[t][k], c, _mm512_loadu_si512(codes + ((t * planes + k) * x->pieces + i) * PIECE));
        }
#else
        vi sums[AT_ONCE][MAX_INPUTS];
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < planes; k++) sums[t][k] = (vi){0};
        for (int64_t i = first; i < last; i++) {
            uint8_t c[PIECE];
            expand_codes(p, bits, mask[i], zero, c);
            if (!whole && w->zeros)
                for (int j = 0; j < PIECE; j++)
                    if (!(mask[i] >> j & 1)) c[j] = (uint8_t)zeros[j / 4];
            int count = __builtin_popcountll(mask[i]);
            p += bits == 4 ? (count + 1) / 2 : count;
            for (int t = 0; t < tokens; t++)
                for (int k = 0; k < planes; k++) sums[t][k] = dot64(sums[t][k], c, codes + ((t * planes + k) * x->pieces + i) * PIECE);
        }
#endif
        for (int t = 0; t < tokens; t++) {
            vf found = __builtin_convertvector((vi)sums[t][0], vf);
            for (int k = 1; k < planes; k++) found = found * 256.0f + __builtin_convertvector((vi)sums[t][k], vf);
            found -= zeros * vf_load(x->sums + ((token + t) * x->cells + cell) * 16);
            total[t] += found * scales * x->scales[(token + t) * x->cells + cell];
        }
    }
    for (int t = 0; t < tokens; t++) y[(token + t) * stride + row] = vf_sum(total[t]);
}

#define CODE_ROWS(BITS, PLANES)                                                                       \
    static void code_rows_##BITS##_##PLANES(const sparse_t *w, const prepared_t *x, float *y,         \
                                            int64_t stride, int64_t first, int64_t last) {            \
        for (int64_t t = 0; t < x->tokens;) {                                                         \
            int one = x->tokens - t < AT_ONCE;                                                        \
            for (int64_t row = first; row < last; row++)                                              \
                if (one)                                                                              \
                    code_row(w, x, t, 1, BITS, PLANES, row, y, stride);                               \
                else                                                                                  \
                    code_row(w, x, t, AT_ONCE, BITS, PLANES, row, y, stride);                         \
            t += one ? 1 : AT_ONCE;                                                                   \
        }                                                                                             \
    }
CODE_ROWS(4, 1)
CODE_ROWS(4, 2)
CODE_ROWS(4, 3)
CODE_ROWS(8, 1)
CODE_ROWS(8, 2)
CODE_ROWS(8, 3)

static inline __attribute__((always_inline)) void
half_row(const sparse_t *w, const prepared_t *x, int64_t token, const int tokens, const int bits, int64_t row, float *y, int64_t stride) {
    const uint16_t *p = (const uint16_t *)(w->values + w->starts[row]);
    const uint64_t *mask = w->mask + row * w->pieces;
    const float *numbers = x->numbers + token * x->pieces * PIECE;
    vf total[AT_ONCE][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = vf_all(0);
    for (int64_t i = 0; i < x->pieces; i++)
        for (int half = 0; half < 2; half++) {
            uint32_t part = (uint32_t)(mask[i] >> 32 * half);
            vf a, b;
#if EXPAND == 512
            __m512i v = _mm512_maskz_expand_epi16(part, _mm512_loadu_si512(p));
            p += _mm_popcnt_u32(part);
            if (bits == 16) {
                a = (vf)_mm512_slli_epi32(v, 16);
                b = (vf)_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000));
            } else {
                a = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(v));
                b = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
            }
#else
            uint16_t held[32];
            vh low, high;
            for (int j = 0; j < 32; j++) held[j] = part >> j & 1 ? *p++ : 0;
            memcpy(&low, held, 32), memcpy(&high, held + 16, 32);
            a = bits == 16 ? vf_bf16(low) : vf_f16(low);
            b = bits == 16 ? vf_bf16(high) : vf_f16(high);
#endif
            for (int t = 0; t < tokens; t++) {
                const float *at = numbers + (t * x->pieces + i) * PIECE + 32 * half;
#if EXPAND == 512
                total[t][0] = (vf)_mm512_fmadd_ps((__m512)a, _mm512_loadu_ps(at), (__m512)total[t][0]);
                total[t][1] = (vf)_mm512_fmadd_ps((__m512)b, _mm512_loadu_ps(at + 16), (__m512)total[t][1]);
#else
                total[t][0] += a * vf_load(at);
                total[t][1] += b * vf_load(at + 16);
#endif
            }
        }
    for (int t = 0; t < tokens; t++) y[(token + t) * stride + row] = vf_sum(total[t][0] + total[t][1]);
}

#define HALF_ROWS(BITS)                                                                               \
    static void half_rows_##BITS(const sparse_t *w, const prepared_t *x, float *y, int64_t stride,    \
                                 int64_t first, int64_t last) {                                       \
        for (int64_t t = 0; t < x->tokens;) {                                                         \
            int one = x->tokens - t < AT_ONCE;                                                        \
            for (int64_t row = first; row < last; row++)                                              \
                if (one)                                                                              \
                    half_row(w, x, t, 1, BITS, row, y, stride);                                       \
                else                                                                                  \
                    half_row(w, x, t, AT_ONCE, BITS, row, y, stride);                                 \
            t += one ? 1 : AT_ONCE;                                                                   \
        }                                                                                             \
    }
HALF_ROWS(16)
HALF_ROWS(17)

typedef struct {
    const sparse_t *w;
    const inputs_t *x;
    const float *numbers;
    int64_t number_stride, stride;
    float *y;
    prepared_t to;
} sparse_job_t;

static void prepare_codes(const sparse_job_t *a, int64_t t) {
    const inputs_t *x = a->x;
    const prepared_t *to = &a->to;
    int64_t width = to->pieces * PIECE, per = x->block / PIECE, blocks = (x->columns + x->block - 1) / x->block;
    float *sums = to->sums + t * to->cells * 16;
    memset(sums, 0, 4 * to->cells * 16);
    for (int k = 0; k < to->planes; k++) {
        int8_t *codes = to->codes + (t * to->planes + k) * width;
        memcpy(codes, x->codes + (t * to->planes + k) * x->columns, x->columns);
        memset(codes + x->columns, 0, width - x->columns);
    }
    for (int64_t i = 0; i < to->pieces; i++)
        for (int l = 0; l < 16; l++) {
            int32_t sum = 0;
            for (int k = 0; k < to->planes; k++) {
                const int8_t *codes = to->codes + (t * to->planes + k) * width + i * PIECE + 4 * l;
                sum = sum * 256 + codes[0] + codes[1] + codes[2] + codes[3];
            }
            sums[i / to->cell * 16 + l] += (float)sum;
        }
    for (int64_t c = 0; c < to->cells; c++) {
        int64_t block = per ? c * to->cell / per : 0;
        to->scales[t * to->cells + c] = x->scales[t * blocks + (block < blocks ? block : blocks - 1)];
    }
}

static void prepare_numbers(const sparse_job_t *a, int64_t t) {
    int64_t width = a->to.pieces * PIECE;
    float *to = a->to.numbers + t * width;
    const float *from = a->numbers + t * a->number_stride;
    for (int64_t i = 0; i < width; i++) {
        int64_t at = i;
#if EXPAND == 512
        if (a->w->bits == 16) at = i / 32 * 32 + i % 16 * 2 + i / 16 % 2; /* even columns, then odd ones */
#endif
        to[i] = at < a->w->columns ? from[at] : 0;
    }
}

static void job(void *argument, int thread, int threads) {
    const sparse_job_t *a = argument;
    const sparse_t *w = a->w;
    int64_t first, last;
    share(a->to.tokens, 1, thread, threads, &first, &last);
    for (int64_t t = first; t < last; t++)
        if (a->x)
            prepare_codes(a, t);
        else
            prepare_numbers(a, t);
    barrier();
    share(w->rows, 16, thread, threads, &first, &last);
    if (w->bits == 16) half_rows_16(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 17) half_rows_17(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 4 && a->to.planes == 1) code_rows_4_1(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 4 && a->to.planes == 2) code_rows_4_2(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 4 && a->to.planes == 3) code_rows_4_3(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 8 && a->to.planes == 1) code_rows_8_1(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 8 && a->to.planes == 2) code_rows_8_2(w, &a->to, a->y, a->stride, first, last);
    if (w->bits == 8 && a->to.planes == 3) code_rows_8_3(w, &a->to, a->y, a->stride, first, last);
}

int64_t sparse_scratch(const sparse_t *w, int64_t tokens, int planes) {
    return tokens * w->pieces * (PIECE * (planes > 0 ? planes : 4) + 17 * 4) + 256;
}

static int64_t common(int64_t a, int64_t b) {
    while (b) {
        int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* x: planes under one scale a block, which holds whole pieces. scratch: 64-byte aligned. */
void sparse_codes(const sparse_t *w, const inputs_t *x, float *y, int64_t stride, uint8_t *scratch) {
    int64_t cell = x->block / PIECE ? x->block / PIECE : 1;
    if (w->groups > 1) cell = w->group % PIECE ? 1 : common(cell, w->group / PIECE);
    sparse_job_t a = {.w = w, .x = x, .y = y, .stride = stride};
    a.to = (prepared_t){.tokens = x->tokens, .pieces = w->pieces, .cell = cell, .planes = x->planes};
    a.to.cells = (w->pieces + cell - 1) / cell;
    a.to.codes = (int8_t *)scratch;
    a.to.sums = (float *)(scratch + x->tokens * x->planes * w->pieces * PIECE);
    a.to.scales = a.to.sums + x->tokens * a.to.cells * 16;
    run(job, &a);
}

/* x: float32 [tokens][x_stride]. */
void sparse_halves(const sparse_t *w, const float *x, int64_t tokens, int64_t x_stride, float *y, int64_t stride, uint8_t *scratch) {
    sparse_job_t a = {.w = w, .numbers = x, .number_stride = x_stride, .y = y, .stride = stride};
    a.to = (prepared_t){.tokens = tokens, .pieces = w->pieces, .numbers = (float *)scratch};
    run(job, &a);
}

/* Numbers of 16 bits by index, and their products: what tables.h needs of a machine.

   A vector is VB / 2 words: LANES rows by a pair of columns. Indices are words whose upper bits are
   anything. With AVX-512 a lookup is one instruction among 32 or 64 words, or, with VBMI, 128 bytes;
   with AVX2 it is two among 16 bytes, or a gather; elsewhere a loop. */

#ifndef BITNEST_LOOKUP_H
#define BITNEST_LOOKUP_H

#include "integers.h"

#if VB == 64 && defined(__AVX512VBMI__)
#define BYTE_TABLES 1
#else
#define BYTE_TABLES 0
#endif

#if VB == 64 && defined(__AVX512BF16__)
#define PAIRS 1 /* products of pairs of bfloat16 at once */
#else
#define PAIRS 0
#endif

/* Tables as they are looked up, in the order of the index that tables.h makes. */
typedef struct {
    uint16_t words[256];
    uint32_t floats[256];        /* the same as float32 */
    uint8_t high[4][16], low[4][16]; /* of each variant of 3 bits; of up to 4 bits */
    uint8_t bytes[512];          /* high, then low, in the code's order */
    int mirrored;                /* 8 bits: the upper half is the lower one with the sign set */
} lookup_t;

typedef uint16_t vu16_at __attribute__((vector_size(VB), aligned(1), may_alias));

ALWAYS vu16 load16(const void *p) { return *(const vu16_at *)p; }
ALWAYS vu16 up(vu16 v, int n) { return n ? v << n : v; }
ALWAYS vu16 down(vu16 v, int n) { return n ? v >> n : v; }

/* Bits of a where the mask of bytes has ones, else of b. */
ALWAYS vu16 chosen(int mask, vu16 a, vu16 b) {
#if VB == 64
    return (vu16)_mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), (__m512i)a, (__m512i)b, 0xca);
#else
    vu8 m = (vu8){} + (uint8_t)mask;
    return (a & (vu16)m) | (b & ~(vu16)m);
#endif
}

/* Low bytes of words from a, high bytes from b. */
ALWAYS vu16 low_high(vu16 a, vu16 b) {
#if VB == 64
    return (vu16)_mm512_ternarylogic_epi32(_mm512_set1_epi16(255), (__m512i)a, (__m512i)b, 0xca);
#else
    return (a & 255) | (b & 0xff00);
#endif
}

#if VB == 16
static __attribute__((noinline)) vu16 each_word(const uint16_t *table, vu16 i) {
    for (int k = 0; k < VB / 2; k++) i[k] = table[i[k]];
    return i;
}
#endif

/* Words by indices of `bits` bits; of 3 bits, the 4 that variant v reads. */
ALWAYS vu16 word_at(const lookup_t *l, vu16 i, const int bits, const int v) {
#if VB == 64
    const uint16_t *t = l->words + 32 * v;
    if (bits <= 5) return (vu16)_mm512_permutexvar_epi16((__m512i)i, _mm512_loadu_si512(t));
    vu16 low = (vu16)_mm512_permutex2var_epi16(_mm512_loadu_si512(t), (__m512i)i, _mm512_loadu_si512(t + 32));
    if (bits == 6) return low;
    __mmask32 bit6 = _mm512_test_epi16_mask((__m512i)i, _mm512_set1_epi16(0x40));
    __m512i more = _mm512_permutex2var_epi16(_mm512_loadu_si512(t + 64), (__m512i)i, _mm512_loadu_si512(t + 96));
    low = (vu16)_mm512_mask_blend_epi16(bit6, (__m512i)low, more);
    if (bits == 7) return low;
    __mmask32 bit7 = _mm512_test_epi16_mask((__m512i)i, _mm512_set1_epi16(0x80));
    __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(t + 128), (__m512i)i, _mm512_loadu_si512(t + 160));
    more = _mm512_permutex2var_epi16(_mm512_loadu_si512(t + 192), (__m512i)i, _mm512_loadu_si512(t + 224));
    return (vu16)_mm512_mask_blend_epi16(bit7, (__m512i)low, _mm512_mask_blend_epi16(bit6, high, more));
#elif VB == 32
    if (bits <= 4) {
        vu16 four = i & 15;
        vu16 high = (vu16)_mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)l->high[v])), (__m256i)four);
        vu16 low = (vu16)_mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)l->low[v])), (__m256i)four);
        return low_high(low, high << 8);
    }
    vu32 mask = (vu32){} + ((1u << bits) - 1), even = (vu32)i & mask, odd = (vu32)i >> 16 & mask;
    vu32 a = (vu32)_mm256_i32gather_epi32((const int *)l->floats, (__m256i)even, 4);
    vu32 b = (vu32)_mm256_i32gather_epi32((const int *)l->floats, (__m256i)odd, 4);
    return (vu16)(a >> 16 | b);
#else
    return each_word(l->words + 32 * v, i & (uint16_t)(bits <= 4 ? 15 : (1 << bits) - 1));
#endif
}

/* The index that `tables.h` makes of a code: to the code. */
static inline int code_at(int bits, int variant, int i) {
    if (bits == 3) { /* variant 2 w + u: a nibble has the code's pair of bits, and its last one */
        int w = variant >> 1, u = variant & 1;
        return (w ? i >> 2 & 3 : i & 3) << 1 | (w ? i >> u & 1 : i >> (2 + u) & 1);
    }
    if (bits == 5) return (i & 15) << 1 | (i >> 4 & 1);
    if (bits == 6) return (i & 15) << 2 | (i >> 4 & 3);
    return i & ((1 << bits) - 1);
}

static inline void build_lookup(const weight_t *w, lookup_t *out) {
    int bits = w->bits, size = 1 << bits, count = bits == 3 ? 128 : size < 32 ? 32 : size;
    memcpy(out->bytes, w->table, (size_t)(2 * size));
    out->mirrored = bits == 8 && memcmp(w->table + 256, w->table + 384, 128) == 0;
    for (int i = 0; i < 128 && out->mirrored; i++) out->mirrored = (w->table[i] ^ 0x80) == w->table[128 + i];
    if (bits >= 7 && BYTE_TABLES) return;
    for (int i = 0; i < count; i++) {
        int v = bits == 3 ? i >> 5 : 0, code = code_at(bits, v, bits == 3 ? i & 31 : i);
        out->words[i] = (uint16_t)(w->table[code] << 8 | w->table[size + code]);
        out->floats[i] = (uint32_t)out->words[i] << 16;
        if (bits <= 4 && (i & 31) < 16) {
            out->high[v][i & 15] = w->table[code];
            out->low[v][i & 15] = w->table[size + code];
        }
    }
}

#if PAIRS
ALWAYS vf32 dot2(vf32 sum, vu16 w, vu32 x) {
    return (vf32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#endif

ALWAYS vf32 plus_product(vf32 sum, vf32 a, vf32 b) {
#if VB == 64
    return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif VB == 32 && defined(__FMA__)
    return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(NEON)
    return (vf32)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

ALWAYS vf32 even(vu16 pair) { return (vf32)((vu32)pair << 16); }
ALWAYS vf32 odd(vu16 pair) { return (vf32)((vu32)pair & 0xffff0000u); }

/* sum += weights of a pair of columns times the pair of inputs at x. */
ALWAYS vf32 plus_pair(vf32 sum, vu16 w, const uint16_t *x) {
    uint32_t pair;
    memcpy(&pair, x, 4);
    vu32 all = (vu32){} + pair;
#if PAIRS
    return dot2(sum, w, all);
#else
    return plus_product(plus_product(sum, even(w), even((vu16)all)), odd(w), odd((vu16)all));
#endif
}

#endif

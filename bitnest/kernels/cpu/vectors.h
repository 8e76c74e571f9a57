/* Vectors of VB bytes: 64 with AVX-512, 32 with AVX2, else 16. A block's 64-byte vectors are read as
   SUBS of these, LANES rows each. Everything is written with the vector types of GCC and Clang but
   what they cannot say well: the 4-way dot product, look-ups, and conversions of short integers.

   dot4(a, c, x, wide): a[r] + sum over j < 4 of c[4 r + j] * x[j], codes c unsigned and x signed
   bytes, x in every lane. Exact: no step of it saturates. wide: codes may exceed 127. */

#ifndef BITNEST_VECTORS_H
#define BITNEST_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(BITNEST_PORTABLE)
#define VB 16
#elif defined(__AVX512BW__) && defined(__AVX512F__)
#define VB 64
#elif defined(__AVX2__)
#define VB 32
#else
#define VB 16
#endif

#if VB >= 32
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(BITNEST_PORTABLE)
#include <arm_neon.h>
#define NEON 1
#endif

/* Whether code for each width is worth its compilation: without vectors of its own kind it is not. */
#if VB >= 32 || defined(NEON)
#define SPECIAL 1
#else
#define SPECIAL 0
#endif
#define LANES (VB / 4)
#define SUBS (64 / VB)
#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint8_t vu8 __attribute__((vector_size(VB)));
typedef uint16_t vu16 __attribute__((vector_size(VB)));
typedef int16_t vi16 __attribute__((vector_size(VB)));
typedef int32_t vi32 __attribute__((vector_size(VB)));
typedef uint32_t vu32 __attribute__((vector_size(VB)));
typedef float vf32 __attribute__((vector_size(VB)));

/* In memory at any address, and of any type. */
#define ANYWHERE __attribute__((vector_size(VB), aligned(1), may_alias))
typedef uint8_t vu8_at ANYWHERE;
typedef int32_t vi32_at ANYWHERE;
typedef float vf32_at ANYWHERE;
#define LOAD(type, p) (*(const type##_at *)(p))
#define STORE(type, p, v) (*(type##_at *)(p) = (v))

ALWAYS vi32 all_i32(int32_t x) { return x - (vi32){}; }
ALWAYS vf32 all_f32(float x) { return x - (vf32){}; }
ALWAYS vf32 to_f32(vi32 x) { return __builtin_convertvector(x, vf32); }
ALWAYS vi32 add(vi32 a, vi32 b) { return (vi32)((vu32)a + (vu32)b); }
ALWAYS vi32 sub(vi32 a, vi32 b) { return (vi32)((vu32)a - (vu32)b); }
ALWAYS vi32 mul(vi32 a, vi32 b) { return (vi32)((vu32)a * (vu32)b); }
ALWAYS vi32 times256(vi32 a) { return (vi32)((vu32)a << 8); }

/* A vector that stays in a register: compilers rather load it again for each use, and loads are what
   kernels run out of. */
ALWAYS vu8 kept(vu8 v) {
#if VB == 64
    __asm__("" : "+v"(v));
#elif VB == 32
    __asm__("" : "+x"(v));
#endif
    return v;
}

/* Bytes moved up by `by` bits, down where negative; bits of the neighbour come along: mask them. */
ALWAYS vu8 moved(vu8 v, int by) {
    if (by == 0) return v;
    return by > 0 ? (vu8)((vu16)v << by) : (vu8)((vu16)v >> -by);
}

ALWAYS vu8 masked(vu8 v, int mask) { return v & (uint8_t)mask; }

/* c | (v & mask) */
ALWAYS vu8 joined(vu8 c, vu8 v, int mask) {
#if VB == 64
    return (vu8)_mm512_ternarylogic_epi32((__m512i)c, (__m512i)v, _mm512_set1_epi8((char)mask), 0xF8);
#else
    return c | (v & (uint8_t)mask);
#endif
}

/* Four bytes in every lane. Not left to the compiler with AVX-512: as an operand of the dot product,
   which it likes, a broadcast takes Zen 4 two cycles, and alone none that anything waits for. */
ALWAYS vi32 four(const int8_t *x) {
#if VB == 64
    __m512i all;
    __asm__("vpbroadcastd %1, %0" : "=v"(all) : "m"(*(const char(*)[4])x));
    return (vi32)all;
#else
    int32_t word;
    memcpy(&word, x, 4);
    return all_i32(word);
#endif
}

#if VB == 64 && defined(__AVX512VNNI__)
#define ISA "avx512-vnni"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    (void)wide;
    return (vi32)_mm512_dpbusd_epi32((__m512i)a, (__m512i)c, (__m512i)x);
}
#elif VB == 64
#define ISA "avx512bw"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    __m512i one = _mm512_set1_epi16(1);
    if (!wide)
        return add(a, (vi32)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)c, (__m512i)x), one));
    __m512i low = _mm512_maddubs_epi16((__m512i)(c & (uint8_t)15), (__m512i)x);
    __m512i high = _mm512_maddubs_epi16((__m512i)masked(moved(c, -4), 15), (__m512i)x);
    a = add(a, (vi32)_mm512_madd_epi16(low, one));
    return add(a, (vi32)_mm512_madd_epi16(high, _mm512_set1_epi16(16)));
}
#elif VB == 32 && defined(__AVXVNNI__)
#define ISA "avx-vnni"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    (void)wide;
    return (vi32)_mm256_dpbusd_avx_epi32((__m256i)a, (__m256i)c, (__m256i)x);
}
#elif VB == 32
#define ISA "avx2"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    __m256i one = _mm256_set1_epi16(1);
    if (!wide)
        return add(a, (vi32)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)c, (__m256i)x), one));
    __m256i low = _mm256_maddubs_epi16((__m256i)(c & (uint8_t)15), (__m256i)x);
    __m256i high = _mm256_maddubs_epi16((__m256i)masked(moved(c, -4), 15), (__m256i)x);
    a = add(a, (vi32)_mm256_madd_epi16(low, one));
    return add(a, (vi32)_mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
#elif defined(NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#define ISA "neon-i8mm"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    (void)wide;
    return (vi32)vusdotq_s32((int32x4_t)a, (uint8x16_t)c, (int8x16_t)x);
}
#elif defined(NEON) && defined(__ARM_FEATURE_DOTPROD)
#define ISA "neon-dotprod"
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    if (!wide) return (vi32)vdotq_s32((int32x4_t)a, (int8x16_t)c, (int8x16_t)x);
    vi32 low = (vi32)vdotq_s32((int32x4_t)a, (int8x16_t)(c & (uint8_t)127), (int8x16_t)x);
    vi32 high = (vi32)vdotq_s32((int32x4_t){}, (int8x16_t)masked(moved(c, -7), 1), (int8x16_t)x);
    return add(low, (vi32)((vu32)high << 7));
}
#else
#define ISA "portable"
/* Even and odd bytes as 16-bit numbers: 255 * -128 still fits. */
ALWAYS vi32 dot4(vi32 a, vu8 c, vi32 x, int wide) {
    (void)wide;
    vi16 even = (vi16)((vu16)c & 255) * ((vi16)((vu16)x << 8) >> 8);
    vi16 odd = (vi16)((vu16)c >> 8) * ((vi16)x >> 8);
    a = add(a, add((vi32)((vu32)even << 16) >> 16, (vi32)even >> 16));
    return add(a, add((vi32)((vu32)odd << 16) >> 16, (vi32)odd >> 16));
}
#endif

/* What codes of `bits` <= 6 bits stand for; table: 64 bytes. */
ALWAYS vu8 looked_up(vu8 c, const uint8_t *table, int bits) {
#if VB == 64
    if (bits <= 4)
        return (vu8)_mm512_shuffle_epi8(
            _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), (__m512i)c);
#if defined(__AVX512VBMI__)
    return (vu8)_mm512_permutexvar_epi8((__m512i)c, _mm512_loadu_si512(table));
#endif
#elif VB == 32
    if (bits <= 4)
        return (vu8)_mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), (__m256i)c);
#elif defined(NEON)
    if (bits <= 4) return (vu8)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)c);
    uint8x16x4_t whole = {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32),
                           vld1q_u8(table + 48)}};
    return (vu8)vqtbl4q_u8(whole, (uint8x16_t)c);
#endif
    (void)bits;
    for (int i = 0; i < VB; i++) c[i] = table[c[i] & 63];
    return c;
}

/* LANES numbers in memory as int32 or float32. */
ALWAYS vi32 from_u8(const uint8_t *p) {
#if VB == 64
    return (vi32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif VB == 32
    return (vi32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vi32 v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

ALWAYS vi32 from_u16(const uint16_t *p) {
#if VB == 64
    return (vi32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif VB == 32
    return (vi32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    vi32 v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

ALWAYS vi32 from_i8(const int8_t *p) { return ((from_u8((const uint8_t *)p)) << 24) >> 24; }

ALWAYS vf32 from_bf16(const uint16_t *p) { return (vf32)(from_u16(p) << 16); }

/* float16 in the low halves of 32-bit lanes. 2^112 moves the exponent's bias; Inf and NaN do not
   occur among scales. */
ALWAYS vf32 half_to_f32(vi32 h) {
#if VB == 64
    return (vf32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
#else
    vf32 magnitude = (vf32)((h & 0x7FFF) << 13) * 0x1p112f;
    return (vf32)((vi32)magnitude | ((h & 0x8000) << 16));
#endif
}

ALWAYS vf32 from_f16(const uint16_t *p) {
#if VB == 64
    return (vf32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VB == 32 && defined(__F16C__)
    return (vf32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    return half_to_f32(from_u16(p));
#endif
}

#endif

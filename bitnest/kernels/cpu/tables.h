/* Codes to bfloat16 through a table, LANES rows by 2 columns at a time.

   A plane of b bits has b vectors of 32 words a unit. Word 2 r + c, bits [b f, b f + b) of vector v:

       row r, columns 2 t + c of the unit, step t = b f + v

   so a step is one vector of 16 rows by a pair of columns, which is what a dot product of pairs eats.
   Planes of 2^n and 2^n bits make one of 2^(n+1) bits by a shift and a select per vector, with every
   code where the layout of 2^(n+1) bits has it: eight planes of one bit cost three shifts and three
   selects per vector of codes, not seven of each. Words need no masks: a lookup reads so many bits,
   and tables of fewer codes are repeated over the bits above them.

       forms      PACKED   bits as powers of two, largest first (7 = 4 + 2 + 1), unit by unit
                  TWOS     planes apart: 2 bits, then one each     (nested, from 2 bits on)
                  ONES     planes apart: one bit each              (nested, from 1 bit on) */

#ifndef BITNEST_TABLES_H
#define BITNEST_TABLES_H

#include "lookup.h"

enum form { PACKED = 0, TWOS, ONES };

#define STEPS 16 /* of a unit */
#define EACH4(M) M(0) M(1) M(2) M(3)
#define EACH8(M) EACH4(M) M(4) M(5) M(6) M(7)
#define EACH16(M) EACH8(M) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)

void table_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last);
void panel_product(const weight_t *w, const inputs_t *x, float *y, int64_t stride, int64_t first, int64_t last);

static inline enum form form_of(const weight_t *w) {
    if (w->planes < 2 || w->plane_stride[0] == 64 * w->bits) return PACKED;
    return w->plane_bits[0] == 2 ? TWOS : ONES;
}

/* Where steps go: to sums for T tokens, or, T = 0, to a panel. */
typedef struct {
    vf32 sum[16]; /* token, half of the unit, parity of the step */
    const uint16_t *x[4];
    vu16 *panel; /* a step after the other, as pairs, or as float32 of the even and the odd column */
} sink_t;

ALWAYS void emit(sink_t *s, const int T, const int t, vu16 w) {
    if (T == 0) {
#if PAIRS
        s->panel[t] = w;
#else
        s->panel[2 * t] = (vu16)even(w);
        s->panel[2 * t + 1] = (vu16)odd(w);
#endif
    }
#define TOKEN(k)                                                                 \
    if (T > k) {                                                                 \
        const int at = 4 * k + 2 * (t / 8) + (T < 3 ? t & 1 : 0);                \
        s->sum[at] = plus_pair(s->sum[at], w, s->x[k] + 2 * t);                  \
    }
    TOKEN(0) TOKEN(1) TOKEN(2) TOKEN(3)
#undef TOKEN
}

ALWAYS vu16 at(const uint8_t *p, int v) { return load16(p + 64 * v); }

/* Two planes of one bit as one of two; of two as one of four. */
ALWAYS void merge1(vu16 high, vu16 low, vu16 *out) {
    out[0] = chosen(0x55, low, up(high, 1));
    out[1] = chosen(0x55, down(low, 1), high);
}

ALWAYS void merge2(const vu16 *high, const vu16 *low, vu16 *out) {
    out[0] = chosen(0x33, low[0], up(high[0], 2));
    out[1] = chosen(0x33, low[1], up(high[1], 2));
    out[2] = chosen(0x33, down(low[0], 2), high[0]);
    out[3] = chosen(0x33, down(low[1], 2), high[1]);
}

/* The first two bits of a code. */
ALWAYS void first_pair(const uint8_t *const *p, const int form, vu16 *out) {
    if (form == ONES) {
        merge1(at(p[0], 0), at(p[1], 0), out);
    } else {
        out[0] = at(p[0], 0);
        out[1] = at(p[0], 1);
    }
}

/* Bit i (0 the most significant, i >= 2) of nested codes; the last bit of packed ones. */
ALWAYS vu16 single(const uint8_t *const *p, const int form, const int bits, const int i) {
    return at(p[form == PACKED ? (bits == 7 ? 2 : 1) : form == TWOS ? i - 1 : i], 0);
}

/* Bits i and i + 1. */
ALWAYS void later_pair(const uint8_t *const *p, const int form, const int bits, const int i, vu16 *out) {
    if (form == PACKED) {
        out[0] = at(p[1], 0);
        out[1] = at(p[1], 1);
    } else {
        merge1(single(p, form, bits, i), single(p, form, bits, i + 1), out);
    }
}

ALWAYS void first_four(const uint8_t *const *p, const int form, const int bits, vu16 *out) {
    if (form == PACKED) {
        out[0] = at(p[0], 0), out[1] = at(p[0], 1), out[2] = at(p[0], 2), out[3] = at(p[0], 3);
    } else {
        vu16 high[2], low[2];
        first_pair(p, form, high);
        later_pair(p, form, bits, 2, low);
        merge2(high, low, out);
    }
}

/* Steps v and v + 8 of bytes that are codes of 7 (bit 7 anything) or 8 bits. */
ALWAYS void emit_bytes(sink_t *s, const int T, const lookup_t *l, const int bits, const int mirrored, const int v, vu16 b) {
#if BYTE_TABLES
    const uint8_t *t = l->bytes, *u = l->bytes + (1 << bits);
#define LOOK(t) _mm512_permutex2var_epi8(_mm512_loadu_si512(t), (__m512i)b, _mm512_loadu_si512((t) + 64))
    __m512i high = LOOK(t), low = LOOK(u);
    if (bits == 8 && mirrored) { /* high ^ (b & 0x80) */
        high = _mm512_ternarylogic_epi32(high, (__m512i)b, _mm512_set1_epi8((char)0x80), 0x78);
    } else if (bits == 8) {
        __mmask64 upper = _mm512_movepi8_mask((__m512i)b);
        high = _mm512_mask_blend_epi8(upper, high, LOOK(t + 128));
        low = _mm512_mask_blend_epi8(upper, low, LOOK(u + 128));
    }
#undef LOOK
    emit(s, T, v, low_high((vu16)low, up((vu16)high, 8)));
    emit(s, T, v + 8, low_high(down((vu16)low, 8), (vu16)high));
#else
    emit(s, T, v, word_at(l, b, bits, 0));
    emit(s, T, v + 8, word_at(l, down(b, 8), bits, 0));
    (void)mirrored;
#endif
}

/* One unit. p: its planes, at the rows. bits, form, mirrored and T are constants. */
ALWAYS void steps(const uint8_t *const *p, const lookup_t *l, sink_t *s, const int bits, const int form, const int mirrored,
                  const int T) {
    vu16 pair[2], n[4], q[2], m[4];
#define WORD(i) word_at(l, i, bits, 0)
    if (bits == 1) {
        vu16 one = at(p[0], 0);
#define M(t) emit(s, T, t, WORD(down(one, t)));
        EACH16(M)
#undef M
    } else if (bits == 2) {
        first_pair(p, form, pair);
#define M(k) emit(s, T, 2 * k, WORD(down(pair[0], 2 * k))); emit(s, T, 2 * k + 1, WORD(down(pair[1], 2 * k)));
        EACH8(M)
#undef M
    } else if (bits == 3) {
        /* nibbles with one bit of a neighbour's: which of them it is, four tables know */
        first_pair(p, form, pair);
        vu16 one = single(p, form, bits, 2), left = up(one, 2), right = down(one, 2);
        n[0] = chosen(0x33, pair[0], left);
        n[1] = chosen(0x33, pair[1], left);
        n[2] = chosen(0x33, right, pair[0]);
        n[3] = chosen(0x33, right, pair[1]);
#define ONE(k, i) emit(s, T, 4 * k + i, word_at(l, down(n[i], 4 * k), bits, i));
#define M(k) ONE(k, 0) ONE(k, 1) ONE(k, 2) ONE(k, 3)
        EACH4(M)
#undef ONE
    } else if (bits == 4) {
        first_four(p, form, bits, n);
#define ONE(k, i) emit(s, T, 4 * k + i, WORD(down(n[i], 4 * k)));
        EACH4(M)
#undef M
#undef ONE
    } else if (bits == 5) {
        first_four(p, form, bits, n);
        vu16 one = single(p, form, bits, 4);
#define M(i)                                                                \
    q[0] = chosen(0x0f, n[i], up(one, 4 - i));                              \
    q[1] = chosen(0x0f, down(n[i], 4), down(one, i));                       \
    emit(s, T, i, WORD(q[0])); emit(s, T, 8 + i, WORD(down(q[0], 8)));      \
    emit(s, T, 4 + i, WORD(q[1])); emit(s, T, 12 + i, WORD(down(q[1], 8)));
        EACH4(M)
#undef M
    } else if (bits == 6) {
        first_four(p, form, bits, n);
        later_pair(p, form, bits, 4, q);
#define M(i)                                                                             \
    m[0] = chosen(0x0f, n[i], up(q[(i) & 1], 4 - 2 * ((i) / 2)));                        \
    m[1] = chosen(0x0f, down(n[i], 4), down(q[(i) & 1], 2 * ((i) / 2)));                 \
    emit(s, T, i, WORD(m[0])); emit(s, T, 8 + i, WORD(down(m[0], 8)));                   \
    emit(s, T, 4 + i, WORD(m[1])); emit(s, T, 12 + i, WORD(down(m[1], 8)));
        EACH4(M)
#undef M
    } else if (form == PACKED && bits == 8) {
#define M(v) emit_bytes(s, T, l, bits, mirrored, v, at(p[0], v));
        EACH8(M)
#undef M
    } else {
        first_four(p, form, bits, n);
        later_pair(p, form, bits, 4, q);
        if (bits == 7) { /* the last bit, and one of a neighbour's */
            vu16 one = single(p, form, bits, 6);
            pair[0] = up(one, 1), pair[1] = one;
        } else {
            later_pair(p, form, bits, 6, pair);
        }
        merge2(q, pair, m);
#define M(i)                                                                                        \
    emit_bytes(s, T, l, bits, mirrored, i, down(chosen(0x0f, m[i], up(n[i], 4)), 8 - bits));        \
    emit_bytes(s, T, l, bits, mirrored, 4 + i, down(chosen(0x0f, down(m[i], 4), n[i]), 8 - bits));
        EACH4(M)
#undef M
    }
#undef WORD
}

/* Planes at a block's unit, from its row LANES sub on. */
ALWAYS void planes_at(const weight_t *w, int64_t block, int64_t unit, int sub, const uint8_t **p) {
    for (int i = 0; i < w->planes; i++)
        p[i] = w->plane[i] + (block * w->units + unit) * w->plane_stride[i] + sub * VB;
}

ALWAYS void next_unit(const uint8_t **p, const int bits, const int form) {
    const int pieces = bits == 7 ? 3 : bits == 3 || bits == 5 || bits == 6 ? 2 : 1;
    const int count = form == PACKED ? pieces : form == TWOS ? bits - 1 : bits;
#define M(i) if (i < count) p[i] += form == PACKED ? 64 * bits : form == TWOS && i == 0 ? 128 : 64;
    EACH8(M)
#undef M
}

#endif

/* Codes of a block as bytes, for any planes. */

#include "integers.h"

#define AHEAD 8 /* units: the next panel is fetched while tokens pass over this one */

#if SPECIAL
ALWAYS void unpack_as(const weight_t *w, int64_t block, int64_t first, int64_t steps, uint8_t *out,
                      int widths, int planes, int lookup) {
    const uint8_t *plane[MAX_PLANES];
    for (int64_t step = first; step < first + steps; step++, out += 256) {
        int64_t unit = block * w->units + step / 2;
        int half = step & 1;
        for (int s = 0; s < SUBS; s++) {
            UNROLL for (int k = 0; k < planes; k++) {
                int b = widths >> (4 * (planes - 1 - k)) & 15;
                plane[k] = w->plane[k] + unit * w->plane_stride[k] + s * VB;
                if (!half && !s)
                    for (int v = 0; v < b; v++)
                        __builtin_prefetch(plane[k] + AHEAD * w->plane_stride[k] + 64 * v, 0, 2);
            }
            raw_t raw = half ? load_raw(plane, 1, widths, planes) : load_raw(plane, 0, widths, planes);
            UNROLL for (int i = 0; i < 4; i++) {
                vu8 c = half ? decode(&raw, 1, i, widths, planes) : decode(&raw, 0, i, widths, planes);
                STORE(vu8, out + 64 * i + s * VB, lookup ? looked_up(c, w->table, w->bits) : c);
            }
        }
    }
}
#endif

/* Planes of any widths, one after another. */
static void unpack_any(const weight_t *w, int64_t block, int64_t first, int64_t steps, uint8_t *out) {
    for (int64_t step = first; step < first + steps; step++, out += 256) {
        int64_t unit = block * w->units + step / 2;
        int half = step & 1;
        for (int s = 0; s < SUBS; s++) {
            vu8 c[4] = {{0}};
            for (int k = 0; k < w->planes; k++) {
                const uint8_t *plane = w->plane[k] + unit * w->plane_stride[k] + s * VB;
                int b = w->plane_bits[k], mask = (1 << b) - 1;
                for (int i = 0; i < 4; i++) {
                    int column = 16 * half + 4 * i, vector = column / (32 / b);
                    int field = column % (32 / b) / 4;
                    vu8 v = (vu8)((vu16)LOAD(vu8, plane + 64 * vector) >> (uint16_t)(b * field));
                    vu8 higher = b == 8 ? c[i] : masked((vu8)((vu16)c[i] << (uint16_t)b), 255 & ~mask);
                    c[i] = k ? joined(higher, v, mask) : masked(v, mask);
                }
            }
            for (int i = 0; i < 4; i++) {
                if (w->table) c[i] = looked_up(c[i], w->table, w->bits);
                STORE(vu8, out + 64 * i + s * VB, c[i]);
            }
        }
    }
}

void unpack(const weight_t *w, int64_t block, int64_t first, int64_t steps, uint8_t *out) {
#if SPECIAL
#define CASE(widths, count)                                              \
    case widths:                                                          \
        if (w->table)                                                     \
            unpack_as(w, block, first, steps, out, widths, count, 1);     \
        else                                                              \
            unpack_as(w, block, first, steps, out, widths, count, 0);     \
        return
    switch (plane_widths(w)) {
        CASE(0x1, 1);
        CASE(0x2, 1);
        CASE(0x4, 1);
        CASE(0x21, 2);
        CASE(0x41, 2);
        CASE(0x42, 2);
    case 0x421: unpack_as(w, block, first, steps, out, 0x421, 3, 0); return;
    case 0x8: unpack_as(w, block, first, steps, out, 0x8, 1, 0); return;
    default: break;
    }
#undef CASE
#endif
    unpack_any(w, block, first, steps, out);
}

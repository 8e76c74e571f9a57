/* Rounding to nearest in one pass: as many rows at a time as a register has lanes, a group of each
   in L1.

For one group w of a row, with the element's snap (see quantize/codecs/block.py):

    scale[, zero]  the first of the candidate grids, or the one of least sum (v s - w)^2
    v            = snap(w / s)                  correctly rounded: ties fall as in the reference
    code         = v + zero, the minifloat's bits, or the entry's place in the table
    row          : codes packed to little-endian words, error summed in double

Lane r of every vector is row r: groups lie transposed, (g, LANES) float32, so that nothing is
reduced across lanes and a group's few numbers are vectors too.

Compiled by kernels/native.py with -ffp-contract=off and without -ffast-math; called by
kernels/encode.py, which fills `struct job`. The order of every sum is fixed, so a result depends
neither on the instruction set nor on the number of threads.

Rounding to integers adds and subtracts 1.5 * 2^23 (times the step), which rounds to even in float32
as long as |x| < 2^22 steps: clamp first, the bounds are integers.
*/

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed codes are little-endian words"
#endif

#define ALWAYS static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define LANES 16 /* rows in hand: one register's worth of float32 */
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define SPARE 32 /* bytes that packing may read and write beyond a row */
#define MAGIC 12582912.0f /* 1.5 * 2^23 */
#define TINY 1e-30f

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));

enum { INTEGER, ASYMMETRIC, MINIFLOAT, TABLE }; /* kind */
enum { BF16, F16, POWER_OF_TWO, E4M3 };         /* stored scale */
enum { ENTRIES = 16 };                          /* of a table */

struct job { /* as in kernels/encode.py; everything but `weight` of one matrix, rows contiguous */
    const void *weight;   /* float32 or bfloat16, `stride` elements from row to row */
    const float *ratios;  /* candidates: plain ones, then full ones */
    void *scales;         /* uint16 or uint8 (O, G) */
    uint8_t *zeros;       /* (O, G), asymmetric only */
    double *error;        /* (O) */
    uint8_t *codes[3];    /* one per segment */
    int64_t stride, columns, group, bf16, kind, bits, scale, ocp, emax, plain, full, refits;
    int64_t mantissa, segments, width[3], shift[3], bytes[3]; /* bytes: of a row */
    float low, high, zero, divisor; /* divisor: what a peak is divided by; of integers, high */
    float largest, smallest;        /* of the minifloat; smallest: normal */
    float tiny, limit;              /* of the half type: what 0 becomes, largest */
    float shared;                   /* `global` of e4m3 scales, which are divided by it */
    float table[ENTRIES], middle[ENTRIES]; /* ascending; middle[i] of entries i and i + 1 */
};

int64_t size_of_job(void) { return sizeof(struct job); }

typedef struct {
    vf scale, zero, low, high; /* low, high: bounds of an integer v */
} Grid;

/* ---------------------------------------------------------------- small things */

ALWAYS uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
ALWAYS float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
ALWAYS vf splat(float x) { return x - (vf){0}; }
ALWAYS vf magnitude(vf x) { return (vf)((vi)x & INT32_MAX); }
ALWAYS vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

#if defined(__AVX512F__)
ALWAYS vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
ALWAYS vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
ALWAYS vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
ALWAYS vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
ALWAYS vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
ALWAYS vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
#else
ALWAYS vf vmin(vf a, vf b) { return choose(a < b, a, b); }
ALWAYS vf vmax(vf a, vf b) { return choose(a > b, a, b); }
#endif
ALWAYS vf clamp(vf x, vf low, vf high) { return vmin(vmax(x, low), high); }
ALWAYS vf round_small(vf x) { return (x + splat(MAGIC)) - splat(MAGIC); } /* |x| < 2^22 */

/* A sum in torch's order over the rows of a matrix: in sixteens, those in sixteens, and so on. */
typedef struct {
    vf level[4];
    int64_t count;
} Sum;

ALWAYS void carry(Sum *sum) { /* after every 16th term */
    sum->count++;
    for (int k = 0; k < 3; k++) {
        sum->level[k + 1] += sum->level[k];
        sum->level[k] = (vf){0};
        if (sum->count >> 4 * k & 15) break;
    }
}

/* ---------------------------------------------------------------- scales as stored */

/* 2^exponent within what E8M0 stores */
ALWAYS vf power_of_two(vi exponent) {
    vi low = exponent < -126, high = exponent > 127;
    exponent = (low & -126) | (high & 127) | (~(low | high) & exponent);
    return (vf)((exponent + 127) << 23);
}

/* floor(log2 x) as frexp has it, x >= 0 and finite; -1 for 0 */
ALWAYS vi floor_log2(vf x) {
    vi small = x < splat(0x1p-126f), none = x == (vf){0};
    vi e = ((vi)choose(small, x * splat(0x1p24f), x) >> 23) - 127 - (small & 24);
    return (none & -1) | (~none & e);
}

/* x to the nearest E4M3 value, from the least positive one on; ties to even */
ALWAYS vf round_e4m3(vf x) {
    x = clamp(x, splat(0x1p-9f), splat(448));
    vf binade = vmax((vf)((vi)x & 0x7f800000), splat(0x1p-6f));
    vf magic = binade * splat(MAGIC * 0x1p-3f);
    return (x + magic) - magic;
}

/* The scale as it will be read back, never zero. */
ALWAYS vf project(vf scale, const struct job *job) {
    if (job->scale == E4M3) return round_e4m3(scale * splat(job->shared)) / splat(job->shared);
    if (job->scale == POWER_OF_TWO) { /* the least that is not smaller */
        vi u = (vi)vmax(scale, splat(0x1p-126f));
        return power_of_two((u >> 23) - 127 - ((u & 0x7fffff) != 0));
    }
    scale = clamp(scale, splat(-job->limit), splat(job->limit));
    int drop = job->scale == BF16 ? 16 : 13; /* mantissa bits */
    vu u = (vu)scale;
    vf rounded = (vf)((u + ((1u << (drop - 1)) - 1) + ((u >> drop) & 1)) >> drop << drop);
    if (job->scale == F16) { /* below 2^-14: 0.5 + |x| has the subnormals' step, 2^-24 */
        vf a = magnitude(scale), fine = (a + splat(0.5f)) - splat(0.5f);
        fine = (vf)((vi)fine | ((vi)scale & INT32_MIN));
        rounded = choose(a < splat(0x1p-14f), fine, rounded);
    }
    return choose(rounded == (vf){0}, splat(job->tiny), rounded);
}

/* Bits of a number that the half type holds. */
ALWAYS uint16_t half_bits(float x, const struct job *job) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & INT32_MAX;
    if (job->scale == BF16) return u >> 16;
    if (a < 0x38800000) return sign | (uint32_t)(float_of(a) * 0x1p24f);
    return sign | (a - (112u << 23)) >> 13;
}

/* Bits of a positive E4M3 value. */
ALWAYS uint8_t e4m3_bits(float x) {
    if (x < 0x1p-6f) return (uint8_t)(x * 0x1p9f);
    return (uint8_t)((bits_of(x) >> 20) - (120 << 3));
}

/* ---------------------------------------------------------------- grids */

ALWAYS Grid with_zero(vf scale, vf zero, const struct job *job) {
    return (Grid){scale, zero, -zero, splat(job->high) - zero};
}

/* Candidate c: the grid that covers a share of the range low..high of the group. */
ALWAYS Grid range_grid(vf low, vf high, int64_t c, const struct job *job, int kind) {
    vf ratio = splat(job->ratios[c]), none = {0};
    if (kind == ASYMMETRIC) {
        low = vmin(low, none) * ratio;
        high = vmax(high, none) * ratio;
        vf scale = project((high - low) / splat(job->high), job);
        return with_zero(scale, round_small(clamp(-low / scale, none, splat(job->high))), job);
    }
    vf peak = vmax(-low, high), scale;
    if (c >= job->plain) /* the extra code on the larger side */
        scale = project(choose(-low >= high, -low, -high) * ratio, job);
    else if (job->ocp)
        scale = power_of_two(floor_log2(peak) - (int32_t)job->emax);
    else
        scale = project(peak / splat(job->divisor) * ratio, job);
    return (Grid){scale, splat(job->zero), splat(job->low), splat(job->high)};
}

/* The entry nearest to x, of two the lower one. code: its place. */
ALWAYS vf look_up(vf x, const struct job *job, vi *code) {
    vf v = splat(job->table[0]);
    vi place = {0};
    for (int i = 1; i < ENTRIES; i++) {
        vi above = x > splat(job->middle[i - 1]);
        v = choose(above, splat(job->table[i]), v);
        place -= above;
    }
    if (code) *code = place;
    return v;
}

/* v of a weight of each row. code: what is stored for them, if asked for. */
ALWAYS vf snap(vf w, const Grid *grid, const struct job *job, int kind, vi *code) {
    vf x = w / grid->scale;
    if (kind == TABLE) return look_up(x, job, code);
    if (kind != MINIFLOAT) {
        vf v = round_small(clamp(x, grid->low, grid->high));
        if (code) *code = __builtin_convertvector(v + grid->zero, vi);
        return v;
    }
    vi sign = (vi)x & INT32_MIN;
    int32_t lowest = (int32_t)bits_of(job->smallest), m = (int32_t)job->mantissa;
    vf a = vmin(magnitude(x), splat(job->largest));
    vf binade = vmax((vf)((vi)a & 0x7f800000), splat(job->smallest));
    vf magic = binade * splat(MAGIC * float_of((uint32_t)(127 - m) << 23));
    a = (a + magic) - magic;
    if (code) { /* codes of a sign are evenly spaced within and across binades */
        vf per_step = (vf)(((uint32_t)(254 + m) << 23) - (vu)binade);
        vi units = __builtin_convertvector(a * per_step, vi);
        *code = units + (((vi)binade - lowest) >> (23 - m));
        *code |= (vi)((vu)sign >> (32 - (uint32_t)job->bits));
    }
    return (vf)((vi)a | sign);
}

#define TOTAL(s) (s.level[0] + s.level[1] + s.level[2] + s.level[3])

ALWAYS vf error_of(const vf *w, int64_t n, Grid grid, const struct job *job, int kind) {
    Sum sum = {0};
    for (int64_t i = 0; i < n; i++) {
        vf miss = snap(w[i], &grid, job, kind, NULL) * grid.scale - w[i];
        sum.level[0] += miss * miss;
        if (i % 16 == 15) carry(&sum);
    }
    return TOTAL(sum);
}

/* Least squares for the scale, given v: s = <w, v> / <v, v>. */
ALWAYS Grid refit(const vf *w, int64_t n, Grid grid, const struct job *job, int kind) {
    Sum top = {0}, bottom = {0};
    for (int64_t i = 0; i < n; i++) {
        vf v = snap(w[i], &grid, job, kind, NULL);
        top.level[0] += v * w[i];
        bottom.level[0] += v * v;
        if (i % 16 == 15) carry(&top), carry(&bottom);
    }
    vf t = TOTAL(top), b = TOTAL(bottom), none = {0};
    vf scale = choose(b > none, t / vmax(b, splat(TINY)), grid.scale);
    if (job->scale == E4M3) scale = choose(scale > none, scale, grid.scale); /* without a sign */
    grid.scale = project(scale, job);
    return grid;
}

ALWAYS void keep_better(Grid *best, vf *least, Grid other, vf error) {
    vi better = error < *least;
    best->scale = choose(better, other.scale, best->scale);
    best->zero = choose(better, other.zero, best->zero);
    best->low = choose(better, other.low, best->low);
    best->high = choose(better, other.high, best->high);
    *least = choose(better, error, *least);
}

ALWAYS Grid fit(const vf *w, int64_t n, const struct job *job, int kind) {
    vf low = w[0], high = w[0];
    for (int64_t i = 1; i < n; i++) low = vmin(low, w[i]), high = vmax(high, w[i]);
    Grid best = range_grid(low, high, 0, job, kind);
    if (job->plain + job->full + job->refits == 1) return best;
    vf least = error_of(w, n, best, job, kind);
    for (int64_t c = 1; c < job->plain + job->full; c++) {
        Grid other = range_grid(low, high, c, job, kind);
        keep_better(&best, &least, other, error_of(w, n, other, job, kind));
    }
    for (int64_t r = 0; r < job->refits; r++) {
        Grid other = refit(w, n, best, job, kind);
        keep_better(&best, &least, other, error_of(w, n, other, job, kind));
    }
    return best;
}

/* ---------------------------------------------------------------- rows */

/* n columns of LANES rows to float32, transposed; rows that are not there repeat the last. */
ALWAYS void gather(vf *w, const struct job *job, int64_t row, int64_t rows, int64_t start,
                   int64_t n) {
    float *out = (float *)w;
    for (int64_t r = 0; r < LANES; r++) {
        int64_t place = (row + (r < rows ? r : rows - 1)) * job->stride + start;
        const uint16_t *half = (const uint16_t *)job->weight + place;
        const float *full = (const float *)job->weight + place;
        if (job->bf16)
            for (int64_t i = 0; i < n; i++) out[LANES * i + r] = float_of((uint32_t)half[i] << 16);
        else
            for (int64_t i = 0; i < n; i++) out[LANES * i + r] = full[i];
    }
}

/* Bits shift..shift+width of n codes as one bitstream; eight codes at a time, their bytes pushed
   together in pairs, fours and eights. Reads and writes up to 16 bytes beyond the end. */
ALWAYS void pack(const uint8_t *codes, int64_t n, int width, int shift, uint8_t *out) {
    const uint64_t mask = 0x0101010101010101u * ((1u << width) - 1);
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t x;
        memcpy(&x, codes + i, 8);
        x = x >> shift & mask;
        x = (x & 0x00ff00ff00ff00ffu) | (x & 0xff00ff00ff00ff00u) >> (8 - width);
        x = (x & 0x0000ffff0000ffffu) | (x & 0xffff0000ffff0000u) >> (16 - 2 * width);
        x = (x & 0x00000000ffffffffu) | (x & 0xffffffff00000000u) >> (32 - 4 * width);
        memcpy(out, &x, 8);
        out += width;
    }
    memset(out, 0, 8);
}

/* LANES rows from `row` on, of which `rows` are there. w, bytes: (g, LANES). codes: (LANES, pitch). */
ALWAYS void encode_lanes(const struct job *given, int64_t row, int64_t rows, int kind, vf *w,
                         uint8_t *bytes, uint8_t *codes, int64_t pitch, uint8_t *packed) {
    const struct job own = *given, *job = &own; /* which stores to bytes cannot change */
    int64_t columns = job->columns, g = job->group, groups = (columns + g - 1) / g;
    double error[LANES] = {0};
    for (int64_t k = 0; k < groups; k++) {
        int64_t start = k * g, n = start + g < columns ? g : columns - start;
        gather(w, job, row, rows, start, n);
        Grid grid = fit(w, n, job, kind);
        Sum sum = {0};
        for (int64_t i = 0; i < n; i++) {
            vi code;
            vf miss = snap(w[i], &grid, job, kind, &code) * grid.scale - w[i];
            sum.level[0] += miss * miss;
            if (i % 16 == 15) carry(&sum);
            vb some = __builtin_convertvector(code, vb);
            memcpy(bytes + LANES * i, &some, sizeof some);
        }
        vf total = TOTAL(sum), coded = round_e4m3(grid.scale * splat(job->shared));
        for (int64_t r = 0; r < rows; r++) {
            int64_t place = (row + r) * groups + k;
            float scale = grid.scale[r];
            error[r] += total[r];
            if (job->scale == POWER_OF_TWO) ((uint8_t *)job->scales)[place] = bits_of(scale) >> 23;
            else if (job->scale == E4M3) ((uint8_t *)job->scales)[place] = e4m3_bits(coded[r]);
            else ((uint16_t *)job->scales)[place] = half_bits(scale, job);
            if (kind == ASYMMETRIC) job->zeros[place] = (uint8_t)grid.zero[r];
            for (int64_t i = 0; i < n; i++) codes[r * pitch + start + i] = bytes[LANES * i + r];
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        job->error[row + r] = error[r];
        for (int64_t k = 0; k < job->segments; k++) {
            pack(codes + r * pitch, columns, (int)job->width[k], (int)job->shift[k], packed);
            memcpy(job->codes[k] + (row + r) * job->bytes[k], packed, job->bytes[k]);
        }
    }
}

/* Rows first..last of the matrix. Returns 0, or -1 without memory for LANES rows. */
int encode_rows(const struct job *job, int64_t first, int64_t last) {
    int64_t g = job->group, pitch = job->columns + SPARE;
    uint8_t *memory = aligned_alloc(64, (g * 5 * LANES + (LANES + 1) * pitch + 63) / 64 * 64);
    if (!memory) return -1;
    vf *w = (vf *)memory;
    uint8_t *bytes = memory + g * sizeof(vf), *codes = bytes + g * LANES;
    uint8_t *packed = codes + LANES * pitch;
    memset(codes, 0, LANES * pitch); /* what follows a row's codes stays zero */
    for (int64_t row = first; row < last; row += LANES) {
        int64_t rows = last - row < LANES ? last - row : LANES;
        if (job->kind == INTEGER)
            encode_lanes(job, row, rows, INTEGER, w, bytes, codes, pitch, packed);
        else if (job->kind == ASYMMETRIC)
            encode_lanes(job, row, rows, ASYMMETRIC, w, bytes, codes, pitch, packed);
        else if (job->kind == MINIFLOAT)
            encode_lanes(job, row, rows, MINIFLOAT, w, bytes, codes, pitch, packed);
        else
            encode_lanes(job, row, rows, TABLE, w, bytes, codes, pitch, packed);
    }
    free(memory);
    return 0;
}

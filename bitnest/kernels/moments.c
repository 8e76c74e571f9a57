// One pass over rows of floats: what kernels/moments.py documents, a channel block at a time.
//
// The innermost loops run over channels, so they vectorise; squares and absolute values are summed
// in float over ROWS rows and then added to the doubles, which keeps both speed and accuracy.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ROWS = 32, TILE = 128 };

// peaks[0..2] += sum of (max |x|)^2 times its length over blocks of 16, 32 and 128 channels.
static void add_peaks(const float *row, int width, double *peaks) {
    float sixteens[TILE / 16];
    int count = 0;
    for (int start = 0; start < width; start += 16, count++) {
        int stop = start + 16 < width ? start + 16 : width;
        uint32_t bits = 0;  // floats without sign order as their bits do, and integers vectorise
        for (int c = start; c < stop; c++) {
            uint32_t a;
            memcpy(&a, row + c, 4);
            a &= 0x7fffffff;
            bits = a > bits ? a : bits;
        }
        float top;
        memcpy(&top, &bits, 4);
        sixteens[count] = top;
        peaks[0] += (double)top * top * (stop - start);
    }
    float whole = 0;
    for (int i = 0; i < count; i += 2) {
        float top = sixteens[i];
        if (i + 1 < count && sixteens[i + 1] > top) top = sixteens[i + 1];
        int stop = (i + 2) * 16 < width ? (i + 2) * 16 : width;
        peaks[1] += (double)top * top * (stop - i * 16);
        whole = top > whole ? top : whole;
    }
    peaks[2] += (double)whole * whole * width;
}

// x: rows of `width` floats, `stride` apart. Adds to absmax, abs, square (width) and peaks (3);
// returns how many values have |x| >= 6.
int64_t moments_add(const float *x, int64_t rows, int64_t width, int64_t stride, float *absmax,
                    double *abs, double *square, double *peaks) {
    int64_t over = 0;
    for (int64_t tile = 0; tile < width; tile += TILE) {
        int n = (int)(width - tile < TILE ? width - tile : TILE);
        for (int64_t first = 0; first < rows; first += ROWS) {
            int64_t last = first + ROWS < rows ? first + ROWS : rows;
            float sums[TILE] = {0}, squares[TILE] = {0};
            float *top = absmax + tile;
            for (int64_t r = first; r < last; r++) {
                const float *row = x + r * stride + tile;
                int large = 0;
                for (int c = 0; c < n; c++) {
                    float a = fabsf(row[c]);
                    sums[c] += a;
                    squares[c] += a * a;
                    top[c] = a > top[c] ? a : top[c];
                    large += a >= 6.0f;
                }
                over += large;
                add_peaks(row, n, peaks);
            }
            for (int c = 0; c < n; c++) {
                abs[tile + c] += sums[c];
                square[tile + c] += squares[c];
            }
        }
    }
    return over;
}

// y: what an expert gave for `rows` tokens, gates: its weights. Adds to sum and square (width) and to
// totals: gates, gates^2, |y|, gates * |y|.
void moments_outputs(const float *y, const float *gates, int64_t rows, int64_t width, double *sum,
                     double *square, double *totals) {
    double lengths[ROWS];
    for (int64_t first = 0; first < rows; first += ROWS) {
        int64_t last = first + ROWS < rows ? first + ROWS : rows;
        memset(lengths, 0, sizeof lengths);
        for (int64_t tile = 0; tile < width; tile += TILE) {
            int n = (int)(width - tile < TILE ? width - tile : TILE);
            float sums[TILE] = {0}, squares[TILE] = {0};
            for (int64_t r = first; r < last; r++) {
                const float *row = y + r * width + tile;
                float parts[16] = {0};
                for (int c = 0; c < n; c++) {
                    sums[c] += row[c];
                    squares[c] += row[c] * row[c];
                }
                int c = 0;
                for (; c + 16 <= n; c += 16)
                    for (int i = 0; i < 16; i++) parts[i] += row[c + i] * row[c + i];
                double length = 0;
                for (; c < n; c++) length += (double)row[c] * row[c];
                for (int i = 0; i < 16; i++) length += parts[i];
                lengths[r - first] += length;
            }
            for (int c = 0; c < n; c++) {
                sum[tile + c] += sums[c];
                square[tile + c] += squares[c];
            }
        }
        for (int64_t r = first; r < last; r++) {
            double norm = sqrt(lengths[r - first]), gate = gates[r];
            totals[0] += gate;
            totals[1] += gate * gate;
            totals[2] += norm;
            totals[3] += gate * norm;
        }
    }
}

// counts[c] += rows in which channel c is among the `top` largest of |x|. Work has room for `top`
// floats and as many integers. Few values pass the smallest of those found so far, so this is one
// comparison per value.
void moments_rank(const float *x, int64_t rows, int64_t width, int64_t stride, int64_t top,
                  float *values, int64_t *channels, int64_t *counts) {
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * stride;
        int64_t found = 0;
        for (int64_t c = 0; c < width; c++) {
            float a = fabsf(row[c]);
            if (found == top && !(a > values[top - 1])) continue;
            int64_t place = found < top ? found++ : top - 1;
            for (; place > 0 && a > values[place - 1]; place--) {
                values[place] = values[place - 1];
                channels[place] = channels[place - 1];
            }
            values[place] = a;
            channels[place] = c;
        }
        for (int64_t i = 0; i < found; i++) counts[channels[i]]++;
    }
}

// logits: rows of `experts`. Adds to sum and square (experts), and counts, in bins of `step`, by how
// much the `chosen`-th largest logit leads the next; the last bin is open. Work has room for
// chosen + 1 floats.
void moments_logits(const float *logits, int64_t rows, int64_t experts, int64_t chosen, double step,
                    int64_t bins, float *work, double *sum, double *square, int64_t *counts) {
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * experts;
        int64_t found = 0;
        for (int64_t e = 0; e < experts; e++) {
            float x = row[e];
            sum[e] += x;
            square[e] += (double)x * x;
            if (found == chosen + 1 && !(x > work[chosen])) continue;
            int64_t place = found < chosen + 1 ? found++ : chosen;
            for (; place > 0 && x > work[place - 1]; place--) work[place] = work[place - 1];
            work[place] = x;
        }
        if (found <= chosen) continue;
        double lead = floor(((double)work[chosen - 1] - work[chosen]) / step);
        int64_t bin = lead < bins ? (int64_t)lead : bins - 1;
        counts[bin < bins - 1 ? bin : bins - 1]++;
    }
}

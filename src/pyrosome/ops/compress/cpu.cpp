// Pooling of a window of tokens into a row: softmax over the window of gate plus bias, per channel, times kv.
#include <limits>

#include "../norm.h"
#include "../round.h"

// Row m ends at token[m] of this step, position end[m]; positions before start[m] are read from ring slot[m].  With
// overlap (width > P) the older part of the window reads the first D of its E channels, the newer part the last D.  Where
// `norm` is given, a row is divided by its RMS, times norm, its last 2 F channels are turned, and with
// `rounds` the others rounded to FP8 in groups of 64.
EXPORT void pyrosome_compress(const float* kv, const float* gate, const float* tail_kv, const float* tail_gate,
                              const float* bias, const int64_t* token, const int64_t* end, const int64_t* start,
                              const int64_t* slot, float* out, int64_t M, int64_t E, int64_t D, int64_t P, int64_t R,
                              int64_t width, const float* norm, const float* turn, int64_t F, float eps, int rounds,
                              int threads) {
    threads = worth(8 * M * width * D, threads);
    parallel(M, threads, [&](int64_t m) {
        float* row = out + m * D;
        std::fill(row, row + D, 0.0f);
        if (end[m] < 0) return;
        Scratch scratch;
        auto** value = scratch.take<const float*>(width);
        auto** logit = scratch.take<const float*>(width);
        auto** shift = scratch.take<const float*>(width);
        int64_t first = width;  // before it there is nothing
        for (int64_t w = width - 1; w >= 0; --w) {
            const int64_t back = width - 1 - w, position = end[m] - back, skip = w < width - P ? 0 : E - D;
            if (position < 0) break;
            const bool fresh = position >= start[m];
            const int64_t at = fresh ? (token[m] - back) * E : (slot[m] * R + position % R) * E;
            value[w] = (fresh ? kv : tail_kv) + at + skip;
            logit[w] = (fresh ? gate : tail_gate) + at + skip;
            shift[w] = bias + position % P * E + skip;
            first = w;
        }
        for (int64_t d = 0; d < D; d += LANES) {
            const int64_t n = D - d;
            F16 top = set1(-std::numeric_limits<float>::infinity()), mass = zero(), sum = zero();
            for (int64_t w = first; w < width; ++w) top = max(top, load_part(logit[w] + d, n) + load_part(shift[w] + d, n));
            for (int64_t w = first; w < width; ++w) {
                const F16 p = exp(load_part(logit[w] + d, n) + load_part(shift[w] + d, n) - top);
                mass = mass + p;
                sum = fma(p, load_part(value[w] + d, n), sum);
            }
            store_part(row + d, sum / mass, n);
        }
        if (norm) {
            rms_row(row, norm, row, D, eps);
            turn_pairs(row + D - 2 * F, turn + m * F * 2, F, 1.0f);
            if (rounds) round_kv(row, D - 2 * F);
        }
    });
}

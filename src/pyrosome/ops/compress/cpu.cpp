// Pooling of a window of tokens into a row: softmax over the window of gate plus bias, per channel, times kv.
#include "native.h"

#include <algorithm>
#include <limits>
#include <vector>

// Row m ends at token[m] of this step, position end[m]; positions before start[m] are read from ring slot[m].  With
// overlap (width > P) the older part of the window reads the first D of its E channels, the newer part the last D.
EXPORT void pyrosome_compress(const float* kv, const float* gate, const float* tail_kv, const float* tail_gate,
                              const float* bias, const int64_t* token, const int64_t* end, const int64_t* start,
                              const int64_t* slot, float* out, int64_t M, int64_t E, int64_t D, int64_t P, int64_t R,
                              int64_t width, int threads) {
    threads = worth(8 * M * width * D, threads);
    parallel(M, threads, [&](int64_t m) {
        float* row = out + m * D;
        std::fill(row, row + D, 0.0f);
        if (end[m] < 0) return;
        std::vector<float> logit(width * D), top(D, -std::numeric_limits<float>::infinity()), mass(D, 0.0f);
        std::vector<const float*> value(width, nullptr);
        for (int64_t w = 0; w < width; ++w) {
            const int64_t back = width - 1 - w, position = end[m] - back, skip = w < width - P ? 0 : E - D;
            if (position < 0) continue;
            const bool fresh = position >= start[m];
            const int64_t at = fresh ? (token[m] - back) * E : (slot[m] * R + position % R) * E;
            value[w] = (fresh ? kv : tail_kv) + at + skip;
            const float *g = (fresh ? gate : tail_gate) + at + skip, *b = bias + position % P * E + skip;
            float* l = &logit[w * D];
            for (int64_t d = 0; d < D; ++d) {
                l[d] = g[d] + b[d];
                top[d] = std::max(top[d], l[d]);
            }
        }
        for (int64_t w = 0; w < width; ++w) {
            if (!value[w]) continue;
            const float* l = &logit[w * D];
            for (int64_t d = 0; d < D; ++d) {
                const float p = std::exp(l[d] - top[d]);
                mass[d] += p;
                row[d] += p * value[w][d];
            }
        }
        for (int64_t d = 0; d < D; ++d) row[d] /= mass[d];
    });
}

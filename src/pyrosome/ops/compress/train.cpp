// Gradients of pooling: each window's weights are computed again, and no window is gathered.
#include "../native.h"

// From the gradient of the rows [M, D] and the rows themselves: dkv and dgate [T, E], which hold zeros (either may be
// null), and the bias's [S, P, E] (or null; to be added up), by S strips of rows.  A token's channel is in one window at
// most, so what is written is not added to; what was read from a ring has no gradient.
EXPORT void pyrosome_compress_back(const float* gradient, const float* rows, const float* kv, const float* gate,
                                   const float* tail_kv, const float* tail_gate, const float* bias, const int64_t* token,
                                   const int64_t* end, const int64_t* start, const int64_t* slot, float* dkv, float* dgate,
                                   float* dbias, int64_t M, int64_t E, int64_t D, int64_t P, int64_t R, int64_t width,
                                   int64_t S) {
    parallel(S, static_cast<int>(S), [&](int64_t strip) {
        Scratch scratch;
        const auto value = scratch.take<const float*>(width), logit = scratch.take<const float*>(width);
        const auto shift = scratch.take<int64_t>(width), fresh = scratch.take<int64_t>(width);  // place, -1: of a ring
        const auto p = scratch.take<float>(width * LANES);
        float* own = dbias ? dbias + strip * P * E : nullptr;
        if (own) std::fill(own, own + P * E, 0.0f);
        for (int64_t m = M * strip / S; m < M * (strip + 1) / S; ++m) {
            if (end[m] < 0) continue;
            const int64_t first = std::max<int64_t>(0, width - 1 - end[m]);  // before it there is nothing
            for (int64_t w = first; w < width; ++w) {
                const int64_t back = width - 1 - w, position = end[m] - back, skip = w < width - P ? 0 : E - D;
                const bool here = position >= start[m];
                const int64_t at = (here ? token[m] - back : slot[m] * R + position % R) * E + skip;
                value[w] = (here ? kv : tail_kv) + at;
                logit[w] = (here ? gate : tail_gate) + at;
                shift[w] = position % P * E + skip;
                fresh[w] = here ? at : -1;
            }
            for (int64_t d = 0; d < D; d += LANES) {
                const int64_t n = D - d;
                F16 top = set1(-INFINITY), mass = zero();
                for (int64_t w = first; w < width; ++w) {
                    const F16 g = load_part(logit[w] + d, n) + load_part(bias + shift[w] + d, n);
                    store(p + w * LANES, g);
                    top = max(top, g);
                }
                for (int64_t w = first; w < width; ++w) {
                    const F16 e = exp(load(p + w * LANES) - top);
                    store(p + w * LANES, e);
                    mass = mass + e;
                }
                const F16 out = load_part(rows + m * D + d, n), slope = load_part(gradient + m * D + d, n) / mass;
                for (int64_t w = first; w < width; ++w) {
                    const F16 a = load(p + w * LANES) * slope, da = a * (load_part(value[w] + d, n) - out);
                    if (fresh[w] >= 0 && dkv) store_part(dkv + fresh[w] + d, a, n);
                    if (fresh[w] >= 0 && dgate) store_part(dgate + fresh[w] + d, da, n);
                    if (own) store_part(own + shift[w] + d, load_part(own + shift[w] + d, n) + da, n);
                }
            }
        }
    });
}

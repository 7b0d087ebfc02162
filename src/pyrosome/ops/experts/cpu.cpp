// Routed experts: the pairs (token, expert) sorted by expert, so that each expert's weights are read once.
#include "native.h"

#include <algorithm>
#include <vector>

namespace {

struct Bank {  // [E, N, K] as stored
    Stored all;
    int64_t N, K;
    Stored of(int64_t e) const {
        const auto* data = static_cast<const uint8_t*>(all.data);
        if (all.format == 0) return {0, data + e * N * K * 4, nullptr};
        if (all.format == 3) return {3, data + e * N * K * 2, nullptr};
        if (all.format == 1) return {1, data + e * N * K, all.scale + e * ((N + 127) / 128) * ((K + 127) / 128)};
        return {2, data + e * N * (K / 2), all.scale + e * N * ((K + 31) / 32)};
    }
};

// Calls product(expert, n0, n1) for every expert that has pairs and every tile of its outputs.
template <class F>
void each_tile(const int64_t* first, int64_t E, int64_t N, int threads, F product) {
    std::vector<int64_t> used;
    for (int64_t e = 0; e < E; ++e)
        if (first[e + 1] > first[e]) used.push_back(e);
    const int64_t tile = 4 * TILE_N, tiles = (N + tile - 1) / tile;
    parallel(used.size() * tiles, threads, [&](int64_t part) {
        const int64_t n0 = part % tiles * tile;
        product(used[part / tiles], n0, std::min(N, n0 + tile));
    });
}

float clamped_swiglu(float gate, float up, float limit) {
    const float a = std::min(gate, limit), b = std::max(-limit, std::min(up, limit));
    return a / (1.0f + std::exp(-a)) * b;
}

}  // namespace

// Sorts pairs by expert, stable; -1 is no expert.  order [P] holds pairs, first [E + 1] each expert's first place in it.
// Returns the first pair that names an expert there is not, or -1.
EXPORT int64_t pyrosome_experts_plan(const int64_t* expert, int64_t P, int64_t E, int64_t* order, int64_t* first) {
    std::fill(first, first + E + 1, 0);
    for (int64_t p = 0; p < P; ++p) {
        if (expert[p] >= E) return p;
        if (expert[p] >= 0) ++first[expert[p] + 1];
    }
    for (int64_t e = 0; e < E; ++e) first[e + 1] += first[e];
    std::vector<int64_t> next(first, first + E);
    for (int64_t p = 0; p < P; ++p)
        if (expert[p] >= 0) order[next[expert[p]]++] = p;
    return -1;
}

// h [R, I] = silu(min(w1 x, limit)) clamp(w3 x, limit) weight, one row for each place of the plan.
EXPORT void pyrosome_experts_up(const float* x, int64_t K, const int64_t* order, const int64_t* first, int64_t E,
                                const float* weight, int format1, const void* w1, const uint8_t* s1, int format3,
                                const void* w3, const uint8_t* s3, float* h, int64_t D, int64_t I, float limit, int threads) {
    threads = worth(2 * first[E] * D * I, threads);
    const Bank gate{{format1, w1, s1}, I, D}, up{{format3, w3, s3}, I, D};
    each_tile(first, E, I, threads, [&](int64_t e, int64_t n0, int64_t n1) {
        const int64_t M = first[e + 1] - first[e], N = n1 - n0;
        std::vector<const float*> from(M);
        std::vector<float*> to(M), other(M);
        std::vector<float> raised(M * N), scratch(format1 || format3 ? N * D : 0);
        for (int64_t m = 0; m < M; ++m) {
            const int64_t place = first[e] + m;
            from[m] = x + order[place] / K * D;
            to[m] = h + place * I;
            other[m] = raised.data() + m * N - n0;
        }
        dot_block(from.data(), widened(gate.of(e), n0, n1, D, scratch.data()), to.data(), M, n0, n1, D);
        dot_block(from.data(), widened(up.of(e), n0, n1, D, scratch.data()), other.data(), M, n0, n1, D);
        for (int64_t m = 0; m < M; ++m) {
            const float w = weight[order[first[e] + m]];
            for (int64_t n = n0; n < n1; ++n) to[m][n] = clamped_swiglu(to[m][n], other[m][n], limit) * w;
        }
    });
}

// y [T, D] = the sum over a token's pairs, in their order, of w2 h.
EXPORT void pyrosome_experts_down(const float* h, int64_t T, int64_t K, const int64_t* order, const int64_t* first,
                                  int64_t E, int format, const void* w2, const uint8_t* s2, float* y, int64_t D,
                                  int64_t I, int threads) {
    threads = worth(first[E] * D * I, threads);
    const Bank down{{format, w2, s2}, D, I};
    std::vector<float> pairs(T * K * D);  // zero, and so it stays for a pair without an expert
    each_tile(first, E, D, threads, [&](int64_t e, int64_t n0, int64_t n1) {
        const int64_t M = first[e + 1] - first[e];
        std::vector<const float*> from(M);
        std::vector<float*> to(M);
        std::vector<float> scratch(format ? (n1 - n0) * I : 0);
        for (int64_t m = 0; m < M; ++m) {
            from[m] = h + (first[e] + m) * I;
            to[m] = pairs.data() + order[first[e] + m] * D;
        }
        dot_block(from.data(), widened(down.of(e), n0, n1, I, scratch.data()), to.data(), M, n0, n1, I);
    });
    parallel(std::min<int64_t>(threads, T), threads, [&](int64_t s) {
        const int64_t strips = std::min<int64_t>(threads, T);
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t) {
            float* out = y + t * D;
            std::fill(out, out + D, 0.0f);
            for (int64_t k = 0; k < K; ++k)
                for (int64_t d = 0; d < D; ++d) out[d] += pairs[(t * K + k) * D + d];
        }
    });
}

EXPORT void pyrosome_swiglu(const float* gate, const float* up, float* out, int64_t count, float limit) {
    for (int64_t i = 0; i < count; ++i) out[i] = clamped_swiglu(gate[i], up[i], limit);
}

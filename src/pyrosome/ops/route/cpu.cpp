// Affinities of experts, and the choice among them.
#include "../tiles.h"

namespace {

// sqrt(softplus(x)): x + log(1 + exp(-x)) where that does not lose x.
float affinity_of(float x) {
    const float a = x > 0 ? x : 0.0f;
    return std::sqrt(a + std::log1p(std::exp(-std::fabs(x))));
}

}  // namespace

EXPORT void pyrosome_affinity(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = affinity_of(x[i]);
}

// expert [T, K], weight [T, K] of rows x [T, D]: the K of highest affinity + bias, ties to the lowest, in ascending order,
// or those of `given` [T, K]; weights are their affinities, normalised to sum to `scale`.  A token whose position is
// negative visits nobody: its experts are -1.
EXPORT void pyrosome_route(const float* x, int64_t T, const Weight* gate, const float* bias, const int64_t* given,
                           const int64_t* position, int64_t K, float scale, int64_t* expert, float* weight, int threads) {
    const int64_t E = gate->N, D = gate->K;
    each_range(T, T * E * (D + 64), threads, [&](int64_t t0, int64_t t1) {
        Scratch scratch;
        auto* score = scratch.take<float>((t1 - t0) * E);
        auto** from = scratch.take<const float*>(t1 - t0);
        auto** to = scratch.take<float*>(t1 - t0);
        auto* rank = scratch.take<float>(E);
        for (int64_t t = t0; t < t1; ++t) from[t - t0] = x + t * D, to[t - t0] = score + (t - t0) * E;
        dot_rows(from, *gate, to, t1 - t0, 0, E);
        for (int64_t t = t0; t < t1; ++t) {
            float* a = to[t - t0];
            for (int64_t e = 0; e < E; ++e) a[e] = affinity_of(a[e]);
            int64_t* chosen = expert + t * K;
            if (given) {
                std::copy(given + t * K, given + (t + 1) * K, chosen);
            } else {
                for (int64_t e = 0; e < E; ++e) rank[e] = a[e] + bias[e];
                bool taken[4096] = {};
                for (int64_t k = 0; k < K; ++k) {
                    int64_t best = -1;
                    for (int64_t e = 0; e < E; ++e)
                        if (!taken[e] && (best < 0 || rank[e] > rank[best])) best = e;
                    taken[best] = true;
                }
                for (int64_t e = 0, k = 0; e < E; ++e)
                    if (taken[e]) chosen[k++] = e;
            }
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += a[chosen[k]];
            for (int64_t k = 0; k < K; ++k) weight[t * K + k] = a[chosen[k]] / sum * scale;
            if (position[t] < 0) std::fill(chosen, chosen + K, static_cast<int64_t>(-1));
        }
    });
}

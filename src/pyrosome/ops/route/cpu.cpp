// Affinities of experts, and the choice among them.
#include <limits>

#include "../tiles.h"

namespace {

constexpr int32_t NOBODY = std::numeric_limits<int32_t>::min();  // below every rank

// sqrt(softplus(x)): x + log(1 + exp(-x)) where that does not lose x.
float affinity_of(float x) {
    const float a = x > 0 ? x : 0.0f;
    return std::sqrt(a + std::log1p(std::exp(-std::fabs(x))));
}

// The K of highest rank, ties to the lowest, in ascending order.  `order` [E] holds ranks as integers, then NOBODY up to a
// multiple of LANES; those that are chosen are taken out of it.
void choose(int32_t* order, int64_t E, int64_t K, int64_t* chosen) {
    for (int64_t k = 0; k < K; ++k) {
        I16 most = iset1(NOBODY);
        for (int64_t e = 0; e < E; e += LANES) most = max(most, iload(order + e));
        chosen[k] = std::find(order, order + E, most_of(most)) - order;
        order[chosen[k]] = NOBODY;
    }
    std::sort(chosen, chosen + K);
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
        auto* order = scratch.take<int32_t>(E + LANES);
        for (int64_t t = t0; t < t1; ++t) from[t - t0] = x + t * D, to[t - t0] = score + (t - t0) * E;
        const bool few = given && 4 * K <= E;  // then only theirs are worth computing
        if (!few) dot_rows(from, *gate, to, t1 - t0, 0, E);
        for (int64_t t = t0; t < t1; ++t) {
            float *a = to[t - t0], *w = weight + t * K;
            int64_t* chosen = expert + t * K;
            if (given) {
                std::copy(given + t * K, given + (t + 1) * K, chosen);
                for (int64_t k = 0; k < K; ++k) {
                    if (few) dot_rows(from + (t - t0), *gate, to + (t - t0), 1, chosen[k], chosen[k] + 1);
                    w[k] = affinity_of(a[chosen[k]]);
                }
            } else {
                for (int64_t e = 0; e < E; ++e) a[e] = affinity_of(a[e]);
                for (int64_t e = 0; e < E; e += LANES)
                    istore(order + e, order_of(load_part(a + e, E - e) + load_part(bias + e, E - e)));
                std::fill(order + E, order + (E + LANES - 1) / LANES * LANES, NOBODY);
                choose(order, E, K, chosen);
                for (int64_t k = 0; k < K; ++k) w[k] = a[chosen[k]];
            }
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += w[k];
            for (int64_t k = 0; k < K; ++k) w[k] = w[k] / sum * scale;
            if (position[t] < 0) std::fill(chosen, chosen + K, static_cast<int64_t>(-1));
        }
    });
}

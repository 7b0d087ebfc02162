// Routed experts: the pairs (token, expert) sorted by expert, so that each expert's weights are read once.
#include "native.h"

#include <algorithm>
#include <memory>
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

constexpr int64_t SHARDS = 8;

struct Term {  // a row [D] that a token's sum is made of
    const float* row;
    int64_t shard;
};

// out = the terms, in order, added to their shards, and the shards as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).  A
// shard's sum begins with 0, so it is never -0, and one without terms may be left out: x + 0 is x to the bit.
void tree_sum(const Term* terms, int64_t count, float* out, int64_t D) {
    constexpr int64_t BLOCK = 256;
    float sums[SHARDS][BLOCK];
    for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
        const int64_t n = std::min(BLOCK, D - d0);
        float* at[SHARDS] = {};
        for (int64_t i = 0; i < count; ++i) {
            const float* row = terms[i].row + d0;
            float *sum = sums[terms[i].shard], *&seen = at[terms[i].shard];
            if (seen)
                for (int64_t d = 0; d < n; ++d) sum[d] += row[d];
            else
                for (int64_t d = 0; d < n; ++d) sum[d] = 0.0f + row[d];
            seen = sum;
        }
        for (int64_t width = 1; width < SHARDS; width *= 2)
            for (int64_t s = 0; s < SHARDS; s += 2 * width) {
                float *left = at[s], *right = at[s + width];
                if (left && right)
                    for (int64_t d = 0; d < n; ++d) left[d] += right[d];
                else if (right)
                    at[s] = right;
            }
        if (at[0])
            std::copy(at[0], at[0] + n, out + d0);
        else
            std::fill(out + d0, out + d0 + n, 0.0f);
    }
}

}  // namespace

// Sorts the pairs of experts low..low + E, of `all`, by expert, stable; -1 is no expert.  order [P] holds pairs, first
// [E + 1] each expert's first place in it.  Returns how many there are, or -1 - p where pair p names an expert there is not.
EXPORT int64_t pyrosome_experts_plan(const int64_t* expert, int64_t P, int64_t low, int64_t E, int64_t all,
                                     int64_t* order, int64_t* first) {
    const auto held = [&](int64_t p) { return expert[p] >= low && expert[p] < low + E; };
    std::fill(first, first + E + 1, 0);
    for (int64_t p = 0; p < P; ++p) {
        if (expert[p] >= all) return -1 - p;
        if (held(p)) ++first[expert[p] - low + 1];
    }
    for (int64_t e = 0; e < E; ++e) first[e + 1] += first[e];
    std::vector<int64_t> next(first, first + E);
    for (int64_t p = 0; p < P; ++p)
        if (held(p)) order[next[expert[p] - low]++] = p;
    return first[E];
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

// y [T, D] = the sum over a token's pairs of w2 h: within each of 8 virtual shards of the experts in ascending order,
// beginning with 0, then the shards as a tree.
EXPORT void pyrosome_experts_down(const float* h, int64_t T, int64_t K, const int64_t* order, const int64_t* first,
                                  int64_t low, int64_t E, int64_t all, int format, const void* w2, const uint8_t* s2,
                                  float* y, int64_t D, int64_t I, int threads) {
    threads = worth(first[E] * D * I, threads);
    const Bank down{{format, w2, s2}, D, I};
    const std::unique_ptr<float[]> rows(new float[first[E] * D]);  // by place
    each_tile(first, E, D, threads, [&](int64_t e, int64_t n0, int64_t n1) {
        const int64_t M = first[e + 1] - first[e];
        std::vector<const float*> from(M);
        std::vector<float*> to(M);
        std::vector<float> scratch(format ? (n1 - n0) * I : 0);
        for (int64_t m = 0; m < M; ++m) {
            from[m] = h + (first[e] + m) * I;
            to[m] = rows.get() + (first[e] + m) * D;
        }
        dot_block(from.data(), widened(down.of(e), n0, n1, I, scratch.data()), to.data(), M, n0, n1, I);
    });
    std::vector<int64_t> count(T);
    std::vector<Term> terms(T * K);
    for (int64_t e = 0; e < E; ++e)
        for (int64_t place = first[e]; place < first[e + 1]; ++place) {
            const int64_t t = order[place] / K;
            terms[t * K + count[t]++] = {rows.get() + place * D, (low + e) * SHARDS / all};
        }
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t)
            tree_sum(terms.data() + t * K, count[t], y + t * D, D);
    });
}

EXPORT void pyrosome_swiglu(const float* gate, const float* up, float* out, int64_t count, float limit) {
    for (int64_t i = 0; i < count; ++i) out[i] = clamped_swiglu(gate[i], up[i], limit);
}

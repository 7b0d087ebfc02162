// Attention of each token over its rows, keys in splits of 128 in order, with a running maximum; and the end of it:
// parts merged, the sink, the rotation back.
#include "../native.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace {

constexpr int64_t SPLIT = 128;
constexpr float NONE = -std::numeric_limits<float>::infinity();

constexpr int HEADS = PYROSOME_LEVEL == 2 ? 4 : 1;  // at once

// o[h, c] = o[h, c] scale[h] + sum_k p[h, k] row[k, c], k in order by fused multiply-add, for HR heads and 64 channels.
template <int HR>
void weigh_tile(float* o, const float* scale, const float* p, const float* const* row, int64_t C, int64_t c, int64_t K) {
    const int64_t left = C - c;
    F16 sum[HR][4];
    UNROLL for (int i = 0; i < HR; ++i)
        UNROLL for (int v = 0; v < 4; ++v)
            sum[i][v] = left > 16 * v ? load_part(o + i * C + c + 16 * v, left - 16 * v) * set1(scale[i]) : zero();
    for (int64_t k = 0; k < K; ++k) {
        F16 r[4];
        UNROLL for (int v = 0; v < 4; ++v)
            r[v] = left >= 64 ? load(row[k] + c + 16 * v) : left > 16 * v ? load_part(row[k] + c + 16 * v, left - 16 * v) : zero();
        UNROLL for (int i = 0; i < HR; ++i) {
            const F16 w = set1(p[i * SPLIT + k]);
            UNROLL for (int v = 0; v < 4; ++v) sum[i][v] = fma(w, r[v], sum[i][v]);
        }
    }
    for (int i = 0; i < HR; ++i)
        for (int v = 0; v < 4; ++v)
            if (left > 16 * v) store_part(o + i * C + c + 16 * v, sum[i][v], left - 16 * v);
}

void weigh(float* o, const float* scale, const float* p, const float* const* row, int64_t H, int64_t C, int64_t K) {
    for (int64_t c = 0; c < C; c += 64) {
        int64_t h = 0;
        for (; h + HEADS <= H; h += HEADS) weigh_tile<HEADS>(o + h * C, scale + h, p + h * SPLIT, row, C, c, K);
        for (; h < H; ++h) weigh_tile<1>(o + h * C, scale + h, p + h * SPLIT, row, C, c, K);
    }
}

}  // namespace

// q [T, H, C]; rows [.., C]; flat [T, K] a row for each place, real [T, K] index with -1 for none; o [T, H, C], lse [T, H].
EXPORT void pyrosome_sparse_attention(const float* q, const float* rows, const int64_t* flat, const int64_t* real,
                                      float* o, float* lse, int64_t T, int64_t H, int64_t C, int64_t K, float scale,
                                      int threads) {
    threads = worth(2 * T * H * C * K, threads);
    parallel(T, threads, [&](int64_t t) {
        std::vector<float> near(SPLIT * C), score(H * SPLIT), query(H * C), top(H, NONE), mass(H, 0.0f), keep(H);
        std::vector<const float*> from(H), row(SPLIT);
        std::vector<float*> to(H);
        float* out = o + t * H * C;
        std::fill(out, out + H * C, 0.0f);
        for (int64_t i = 0; i < H * C; ++i) query[i] = q[t * H * C + i] * scale;
        for (int64_t h = 0; h < H; ++h) from[h] = &query[h * C], to[h] = &score[h * SPLIT];
        for (int64_t k0 = 0; k0 < K; k0 += SPLIT) {
            int64_t n = 0;
            for (int64_t k = k0; k < std::min(K, k0 + SPLIT); ++k)
                if (real[t * K + k] >= 0) {
                    std::memcpy(&near[n * C], rows + flat[t * K + k] * C, C * sizeof(float));
                    row[n] = &near[n * C];
                    ++n;
                }
            if (!n) continue;
            dot_block(from.data(), near.data(), to.data(), H, 0, n, C);
            for (int64_t h = 0; h < H; ++h) {
                float* s = to[h];
                const float high = std::max(top[h], *std::max_element(s, s + n));
                keep[h] = std::exp(top[h] - high);
                float sum = 0;
                for (int64_t k = 0; k < n; ++k) sum += s[k] = std::exp(s[k] - high);
                mass[h] = mass[h] * keep[h] + sum;
                top[h] = high;
            }
            weigh(out, keep.data(), score.data(), row.data(), H, C, n);
        }
        for (int64_t h = 0; h < H; ++h) {
            // Not "more than 0": a NaN must show.
            lse[t * H + h] = mass[h] != 0 ? std::log(mass[h]) + top[h] : NONE;
            if (mass[h] != 0)
                for (int64_t c = 0; c < C; ++c) out[h * C + c] /= mass[h];
        }
    });
}

// Merges `parts` (o, lse) of one shape, lets the sink take its mass, and turns the last 2 F channels back.
EXPORT void pyrosome_finish_attention(const float* const* o, const float* const* lse, int parts, const float* sink,
                                      const float* turn, float* out, int64_t T, int64_t H, int64_t C, int64_t F,
                                      int threads) {
    threads = worth(4 * T * H * C * parts, threads);
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t)
            for (int64_t h = 0; h < H; ++h) {
                const int64_t at = t * H + h;
                float high = sink[h], total = 0;
                for (int p = 0; p < parts; ++p) high = std::max(high, lse[p][at]);
                for (int p = 0; p < parts; ++p) total += std::exp(lse[p][at] - high);
                total += std::exp(sink[h] - high);
                float* to = out + at * C;
                std::fill(to, to + C, 0.0f);
                for (int p = 0; p < parts; ++p) {
                    const float share = std::exp(lse[p][at] - high) / total;
                    if (share != 0)
                        for (int64_t c = 0; c < C; ++c) to[c] += share * o[p][at * C + c];
                }
                turn_pairs(to + C - 2 * F, turn + t * F * 2, F, -1.0f);
            }
    });
}

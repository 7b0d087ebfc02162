// Attention of each token over its rows, keys in splits of 128 in order, with a running maximum; and the end of it:
// parts merged, the sink, the rotation back.
#include "native.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace {

constexpr int64_t SPLIT = 128;
constexpr float NONE = -std::numeric_limits<float>::infinity();

// o[h, c] = o[h, c] scale[h] + sum_k p[h, k] row[k, c], k in order by fused multiply-add, for H heads and C channels.
void weigh_portable(float* o, const float* scale, const float* p, const float* const* row, int64_t H, int64_t C,
                    int64_t K) {
    for (int64_t h = 0; h < H; ++h)
        for (int64_t c = 0; c < C; ++c) {
            float sum = o[h * C + c] * scale[h];
            for (int64_t k = 0; k < K; ++k) sum = std::fmaf(p[h * SPLIT + k], row[k][c], sum);
            o[h * C + c] = sum;
        }
}

#if X86

template <int HR, int VR>
AVX512 void weigh_tile(float* o, const float* scale, const float* p, const float* const* row, int64_t C, int64_t c,
                       int64_t K, const __mmask16* mask) {
    __m512 sum[HR][VR];
#pragma GCC unroll 4
    for (int i = 0; i < HR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VR; ++v)
            sum[i][v] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask[v], o + i * C + c + 16 * v), _mm512_set1_ps(scale[i]));
    for (int64_t k = 0; k < K; ++k) {
        __m512 r[VR];
#pragma GCC unroll 4
        for (int v = 0; v < VR; ++v) r[v] = _mm512_maskz_loadu_ps(mask[v], row[k] + c + 16 * v);
#pragma GCC unroll 4
        for (int i = 0; i < HR; ++i) {
            const __m512 w = _mm512_set1_ps(p[i * SPLIT + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VR; ++v) sum[i][v] = _mm512_fmadd_ps(w, r[v], sum[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < HR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VR; ++v) _mm512_mask_storeu_ps(o + i * C + c + 16 * v, mask[v], sum[i][v]);
}

AVX512 void weigh512(float* o, const float* scale, const float* p, const float* const* row, int64_t H, int64_t C,
                     int64_t K) {
    for (int64_t c = 0; c < C; c += 64) {
        __mmask16 mask[4];
        for (int v = 0; v < 4; ++v) {
            const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, C - c - 16 * v));
            mask[v] = static_cast<__mmask16>((1u << left) - 1);
        }
        int64_t h = 0;
        for (; h + 4 <= H; h += 4) weigh_tile<4, 4>(o + h * C, scale + h, p + h * SPLIT, row, C, c, K, mask);
        for (; h < H; ++h) weigh_tile<1, 4>(o + h * C, scale + h, p + h * SPLIT, row, C, c, K, mask);
    }
}

AVX2 void weigh256(float* o, const float* scale, const float* p, const float* const* row, int64_t H, int64_t C,
                   int64_t K) {
    const int64_t whole = C / 8 * 8;
    for (int64_t h = 0; h < H; ++h) {
        for (int64_t c = 0; c < whole; c += 8) {
            __m256 sum = _mm256_mul_ps(_mm256_loadu_ps(o + h * C + c), _mm256_set1_ps(scale[h]));
            for (int64_t k = 0; k < K; ++k)
                sum = _mm256_fmadd_ps(_mm256_set1_ps(p[h * SPLIT + k]), _mm256_loadu_ps(row[k] + c), sum);
            _mm256_storeu_ps(o + h * C + c, sum);
        }
        for (int64_t c = whole; c < C; ++c) {
            float sum = o[h * C + c] * scale[h];
            for (int64_t k = 0; k < K; ++k) sum = std::fmaf(p[h * SPLIT + k], row[k][c], sum);
            o[h * C + c] = sum;
        }
    }
}

#endif

void weigh(float* o, const float* scale, const float* p, const float* const* row, int64_t H, int64_t C, int64_t K) {
    switch (level()) {
#if X86
        case LEVEL_AVX512: return weigh512(o, scale, p, row, H, C, K);
        case LEVEL_AVX2: return weigh256(o, scale, p, row, H, C, K);
#endif
        default: return weigh_portable(o, scale, p, row, H, C, K);
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
            lse[t * H + h] = mass[h] > 0 ? std::log(mass[h]) + top[h] : NONE;
            if (mass[h] > 0)
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
                    if (share > 0)
                        for (int64_t c = 0; c < C; ++c) to[c] += share * o[p][at * C + c];
                }
                float* pair = to + C - 2 * F;
                for (int64_t f = 0; f < F; ++f, pair += 2) {
                    const float a = pair[0], b = pair[1], c = turn[(t * F + f) * 2], d = turn[(t * F + f) * 2 + 1];
                    pair[0] = a * c + b * d;
                    pair[1] = b * c - a * d;
                }
            }
    });
}

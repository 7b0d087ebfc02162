// y[m, n] = sum_k x[m, k] w[n, k], float32, with w as it is stored.  Rows of x are given by address, so that gathered
// tokens need no copy.
#include "native.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t X_BLOCK_BYTES = 256 << 10;  // rows of x that stay in a core's second cache while w streams by

struct Task {
    const float* const* x;  // addresses of rows [K]
    const float* w;         // [n1 - n0, K], contiguous
    float* const* y;        // addresses of rows, at output n0
    int64_t K;
};

float fold(const float* lane) {
    float a[8];
    for (int i = 0; i < 8; ++i) a[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; ++i) a[i] += a[i + 4];
    for (int i = 0; i < 2; ++i) a[i] += a[i + 2];
    return a[0] + a[1];
}

void portable(const Task& t, int64_t M, int64_t N) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            const float *x = t.x[m], *w = t.w + n * t.K;
            float lane[LANES] = {};
            for (int64_t k = 0; k < t.K; ++k) lane[k % LANES] = std::fmaf(x[k], w[k], lane[k % LANES]);
            t.y[m][n] = fold(lane);
        }
}

#if X86

AVX2 inline float fold256(__m256 low, __m256 high) {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int MR, int NR>
AVX2 void tile256(const Task& t, int64_t m, int64_t n) {
    __m256 low[MR][NR], high[MR][NR];
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NR; ++j) low[i][j] = high[i][j] = _mm256_setzero_ps();
    const int64_t whole = t.K / LANES * LANES;
    float xs[MR][LANES], ws[NR][LANES];
    for (int64_t k = 0; k < t.K; k += LANES) {
        const bool cut = k >= whole;
        if (cut) {  // zeros past the end add nothing, to the bit
            std::memset(xs, 0, sizeof xs), std::memset(ws, 0, sizeof ws);
            for (int i = 0; i < MR; ++i) std::memcpy(xs[i], t.x[m + i] + k, (t.K - k) * sizeof(float));
            for (int j = 0; j < NR; ++j) std::memcpy(ws[j], t.w + (n + j) * t.K + k, (t.K - k) * sizeof(float));
        }
        for (int j = 0; j < NR; ++j) {
            const float* w = cut ? ws[j] : t.w + (n + j) * t.K + k;
            const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
            for (int i = 0; i < MR; ++i) {
                const float* x = cut ? xs[i] : t.x[m + i] + k;
                low[i][j] = _mm256_fmadd_ps(_mm256_loadu_ps(x), w0, low[i][j]);
                high[i][j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + 8), w1, high[i][j]);
            }
        }
    }
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NR; ++j) t.y[m + i][n + j] = fold256(low[i][j], high[i][j]);
}

template <int MR, int NR>
AVX512 void tile512(const Task& t, int64_t m, int64_t n) {
    __m512 sum[MR][NR];
    const float *x[MR], *w[NR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) x[i] = t.x[m + i];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) w[j] = t.w + (n + j) * t.K;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + LANES <= t.K; k += LANES) {
        __m512 wv[NR];
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) {
            wv[j] = _mm512_loadu_ps(w[j] + k);
            if (MR == 1) _mm_prefetch(reinterpret_cast<const char*>(w[j] + k) + 2048, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const __m512 xv = _mm512_loadu_ps(x[i] + k);
#pragma GCC unroll 8
            for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_fmadd_ps(xv, wv[j], sum[i][j]);
        }
    }
    if (k < t.K) {
        const __mmask16 rest = static_cast<__mmask16>((1u << (t.K - k)) - 1);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const __m512 xv = _mm512_maskz_loadu_ps(rest, x[i] + k);
#pragma GCC unroll 8
            for (int j = 0; j < NR; ++j)
                sum[i][j] = _mm512_fmadd_ps(xv, _mm512_maskz_loadu_ps(rest, w[j] + k), sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j)
            t.y[m + i][n + j] =
                fold256(_mm512_castps512_ps256(sum[i][j]), _mm512_extractf32x8_ps(sum[i][j], 1));
}

#endif

// Covers M rows and N outputs with tiles; which tile computes an output does not change it.  Rows go in blocks that a
// core's second cache keeps while w streams by.
template <int MR, int NR, void (*FULL)(const Task&, int64_t, int64_t), void (*ROW)(const Task&, int64_t, int64_t),
          void (*COLUMN)(const Task&, int64_t, int64_t), void (*ONE)(const Task&, int64_t, int64_t)>
void cover(const Task& t, int64_t M, int64_t N) {
    const int64_t rows = std::max<int64_t>(MR, X_BLOCK_BYTES / 4 / std::max<int64_t>(t.K, 1) / MR * MR);
    for (int64_t m0 = 0; m0 < M; m0 += rows) {
        const int64_t m1 = std::min(M, m0 + rows);
        int64_t n = 0;
        for (; n + NR <= N; n += NR) {
            int64_t m = m0;
            for (; m + MR <= m1; m += MR) FULL(t, m, n);
            for (; m < m1; ++m) ROW(t, m, n);
        }
        for (; n < N; ++n) {
            int64_t m = m0;
            for (; m + MR <= m1; m += MR) COLUMN(t, m, n);
            for (; m < m1; ++m) ONE(t, m, n);
        }
    }
}

// Values of every e4m3 and e2m1 code, and of every scale byte; NaN codes stay NaN.
struct Tables {
    float e4m3[256], e2m1[16], e8m0[256];
    Tables() {
        for (int b = 0; b < 256; ++b) {
            const int exponent = b >> 3 & 15, mantissa = b & 7;
            const float size = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
            e4m3[b] = (b & 127) == 127 ? NAN : b & 128 ? -size : size;
            e8m0[b] = b == 255 ? NAN : std::ldexp(1.0f, b - 127);
        }
        const float sizes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        for (int c = 0; c < 16; ++c) e2m1[c] = c & 8 ? -sizes[c & 7] : sizes[c & 7];
    }
};
const Tables tables;

}  // namespace

const float* widened(const Stored& w, int64_t n0, int64_t n1, int64_t K, float* scratch) {
    if (w.format == 0) return static_cast<const float*>(w.data) + n0 * K;
    const auto* bytes = static_cast<const uint8_t*>(w.data);
    for (int64_t n = n0; n < n1; ++n) {
        float* to = scratch + (n - n0) * K;
        if (w.format == 3) {
            const auto* from = static_cast<const uint16_t*>(w.data) + n * K;
            for (int64_t k = 0; k < K; ++k) {
                const uint32_t bits = static_cast<uint32_t>(from[k]) << 16;
                std::memcpy(to + k, &bits, sizeof bits);
            }
        } else if (w.format == 1) {
            const uint8_t *from = bytes + n * K, *scale = w.scale + n / 128 * ((K + 127) / 128);
            for (int64_t k0 = 0; k0 < K; k0 += 128) {
                const float factor = tables.e8m0[scale[k0 / 128]];
                for (int64_t k = k0; k < std::min(K, k0 + 128); ++k) to[k] = tables.e4m3[from[k]] * factor;
            }
        } else {
            const uint8_t *from = bytes + n * (K / 2), *scale = w.scale + n * ((K + 31) / 32);
            for (int64_t k0 = 0; k0 < K; k0 += 32) {
                const float factor = tables.e8m0[scale[k0 / 32]];
                for (int64_t k = k0; k < std::min(K, k0 + 32); k += 2) {
                    to[k] = tables.e2m1[from[k / 2] & 15] * factor;
                    to[k + 1] = tables.e2m1[from[k / 2] >> 4] * factor;
                }
            }
        }
    }
    return scratch;
}

void dot_block(const float* const* x, const float* w, float* const* y, int64_t M, int64_t n0, int64_t n1, int64_t K) {
    std::vector<float*> rows(M);
    for (int64_t m = 0; m < M; ++m) rows[m] = y[m] + n0;
    const Task t{x, w, rows.data(), K};
    switch (level()) {
#if X86
        case LEVEL_AVX512:
            return cover<4, 4, tile512<4, 4>, tile512<1, 4>, tile512<4, 1>, tile512<1, 1>>(t, M, n1 - n0);
        case LEVEL_AVX2:
            return cover<2, 2, tile256<2, 2>, tile256<1, 2>, tile256<2, 1>, tile256<1, 1>>(t, M, n1 - n0);
#endif
        default:
            return portable(t, M, n1 - n0);
    }
}

// G products of one shape: group g takes columns g K.. of x [M, G K] and rows g N.. of w, and writes columns g N.. of y.
EXPORT void pyrosome_linear(const float* x, int64_t ldx, int format, const void* data, const uint8_t* scale, float* y,
                            int64_t M, int64_t G, int64_t N, int64_t K, int threads) {
    threads = worth(M * G * N * K + (format ? 4 * G * N * K : 0), threads);
    const Stored w{format, data, scale};
    const int64_t tile = format ? TILE_N : std::max<int64_t>(TILE_N, N / std::max(1, threads) / TILE_N * TILE_N);
    const int64_t tiles = (N + tile - 1) / tile;
    parallel(G * tiles, threads, [&](int64_t part) {
        const int64_t g = part / tiles, n0 = part % tiles * tile, n1 = std::min(N, n0 + tile);
        std::vector<float> scratch(format ? (n1 - n0) * K : 0);
        std::vector<const float*> from(M);
        std::vector<float*> to(M);
        for (int64_t m = 0; m < M; ++m) from[m] = x + m * ldx + g * K, to[m] = y + (m * G + g) * N;
        // a scale block of the whole matrix may straddle groups: rows are counted from the matrix's first
        dot_block(from.data(), widened(w, g * N + n0, g * N + n1, K, scratch.data()), to.data(), M, n0, n1, K);
    });
}

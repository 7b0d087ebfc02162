// A token's heads by the rows it reads, each given by its address: what kernels with gradients are made of.  Rows have C
// channels, a multiple of LANES.
#pragma once
#include "native.h"

constexpr int HEADS = 4, KEYS = 4;  // of one block of products

// out[h][k] = a[h] . row[k], for the H vectors of `a` and n rows; out has `stride` places for each h.
inline void products(const float* a, const float* const* row, int64_t H, int64_t n, int64_t C, float* out,
                     int64_t stride) {
    for (int64_t h0 = 0; h0 < H; h0 += HEADS) {
        const int64_t heads = std::min<int64_t>(HEADS, H - h0);
        for (int64_t k0 = 0; k0 < n; k0 += KEYS) {
            const int64_t keys = std::min<int64_t>(KEYS, n - k0);
            F16 sum[HEADS][KEYS];
            for (auto& of_head : sum)
                for (F16& s : of_head) s = zero();
            const float *at[KEYS], *from[HEADS];
            for (int k = 0; k < KEYS; ++k) at[k] = row[k0 + std::min<int64_t>(k, keys - 1)];
            for (int h = 0; h < HEADS; ++h) from[h] = a + (h0 + std::min<int64_t>(h, heads - 1)) * C;
            for (int64_t c = 0; c < C; c += LANES) {
                F16 x[KEYS];
                for (int k = 0; k < KEYS; ++k) x[k] = load(at[k] + c);
                for (int h = 0; h < HEADS; ++h) {
                    const F16 y = load(from[h] + c);
                    for (int k = 0; k < KEYS; ++k) sum[h][k] = fma(y, x[k], sum[h][k]);
                }
            }
            for (int64_t h = 0; h < heads; ++h)
                for (int64_t k = 0; k < keys; ++k) out[(h0 + h) * stride + k0 + k] = fold(sum[h][k]);
        }
    }
}

// out[h] = sum over k of p[h][k] row[k].
inline void weighted(const float* p, const float* const* row, int64_t H, int64_t n, int64_t C, float* out,
                     int64_t stride) {
    for (int64_t h0 = 0; h0 < H; h0 += HEADS) {
        const int64_t heads = std::min<int64_t>(HEADS, H - h0);
        const float* of[HEADS];
        for (int h = 0; h < HEADS; ++h) of[h] = p + (h0 + std::min<int64_t>(h, heads - 1)) * stride;
        for (int64_t c = 0; c < C; c += 2 * LANES) {
            const bool two = c + LANES < C;
            F16 low[HEADS], high[HEADS];
            for (int h = 0; h < HEADS; ++h) low[h] = high[h] = zero();
            for (int64_t k = 0; k < n; ++k) {
                const F16 x = load(row[k] + c), y = two ? load(row[k] + c + LANES) : zero();
                for (int h = 0; h < HEADS; ++h) {
                    const F16 w = set1(of[h][k]);
                    low[h] = fma(w, x, low[h]), high[h] = fma(w, y, high[h]);
                }
            }
            for (int64_t h = 0; h < heads; ++h) {
                store(out + (h0 + h) * C + c, low[h]);
                if (two) store(out + (h0 + h) * C + c + LANES, high[h]);
            }
        }
    }
}

// to[k] += sum over h of p[i][h][k] a[i][h], for each of N pairs p[i], a[i].
template <int N>
void spread(const float* const (&p)[N], const float* const (&a)[N], float* const* to, int64_t H, int64_t n, int64_t C,
            int64_t stride) {
    for (int64_t h0 = 0; h0 < H; h0 += HEADS) {
        const int64_t heads = std::min<int64_t>(HEADS, H - h0);
        for (int64_t c = 0; c < C; c += LANES) {
            F16 x[N][HEADS];
            for (int i = 0; i < N; ++i)
                for (int h = 0; h < HEADS; ++h) x[i][h] = h < heads ? load(a[i] + (h0 + h) * C + c) : zero();
            for (int64_t k = 0; k < n; ++k) {
                F16 sum = load(to[k] + c);
                for (int64_t h = 0; h < heads; ++h)
                    for (int i = 0; i < N; ++i) sum = fma(set1(p[i][(h0 + h) * stride + k]), x[i][h], sum);
                store(to[k] + c, sum);
            }
        }
    }
}

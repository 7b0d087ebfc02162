// A row divided by its own RMS: what several kernels begin or end with.
#pragma once
#include "native.h"

// One over the RMS of D values, of each of N rows: squares to lane d % 16, in order of d, the lanes folded in halves.
template <int N>
LANE void inverse_rms(const float* const* x, int64_t D, float eps, float* out) {
    F16 sum[N];
    for (int i = 0; i < N; ++i) sum[i] = zero();
    for (int64_t d = 0; d < D; d += LANES)
        UNROLL for (int i = 0; i < N; ++i) {
            const F16 v = load_part(x[i] + d, D - d);
            sum[i] = fma(v, v, sum[i]);
        }
    for (int i = 0; i < N; ++i) out[i] = 1.0f / std::sqrt(fold(sum[i]) / static_cast<float>(D) + eps);
}

LANE float inverse_rms(const float* x, int64_t D, float eps) {
    float r;
    inverse_rms<1>(&x, D, eps, &r);
    return r;
}

// out [D] = x / RMS (x weight, where there is one); out may be x.
LANE void rms_row(const float* x, const float* weight, float* out, int64_t D, float eps) {
    const F16 r = set1(inverse_rms(x, D, eps));
    for (int64_t d = 0; d < D; d += LANES) {
        F16 v = load_part(x + d, D - d) * r;
        if (weight) v = v * load_part(weight + d, D - d);
        store_part(out + d, v, D - d);
    }
}

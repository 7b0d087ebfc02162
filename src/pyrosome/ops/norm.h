// A row divided by its own RMS: what several kernels begin or end with.
#pragma once
#include "native.h"

// One over the RMS of D values: squares to lane d % 16, in order of d, the lanes folded in halves.
LANE float inverse_rms(const float* x, int64_t D, float eps) {
    F16 sum = zero();
    for (int64_t d = 0; d < D; d += LANES) {
        const F16 v = load_part(x + d, D - d);
        sum = fma(v, v, sum);
    }
    return 1.0f / std::sqrt(fold(sum) / static_cast<float>(D) + eps);
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

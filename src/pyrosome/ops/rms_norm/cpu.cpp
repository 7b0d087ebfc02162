// Rows divided by their own RMS.
#include "../norm.h"

// x [M, D] -> out [M, D]; weight [D] or nothing.
EXPORT void pyrosome_rms_norm(const float* x, const float* weight, float* out, int64_t M, int64_t D, float eps, int threads) {
    const int64_t strips = std::min<int64_t>(worth(4 * M * D, threads), M);
    parallel(strips, static_cast<int>(strips), [&](int64_t s) {
        for (int64_t m = M * s / strips; m < M * (s + 1) / strips; ++m) rms_row(x + m * D, weight, out + m * D, D, eps);
    });
}

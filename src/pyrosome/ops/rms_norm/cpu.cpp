// Rows divided by their own RMS.
#include "../norm.h"

// x [M, D] -> out [M, D]; weight [D] or nothing.
EXPORT void pyrosome_rms_norm(const float* x, const float* weight, float* out, int64_t M, int64_t D, float eps, int threads) {
    each_row(M, 4 * M * D, threads, [&](int64_t m) { rms_row(x + m * D, weight, out + m * D, D, eps); });
}

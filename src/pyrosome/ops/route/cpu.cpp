// Affinities of experts: sqrt(softplus(x)), x + log(1 + exp(-x)) where that does not lose x.
#include "native.h"

EXPORT void pyrosome_affinity(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float a = x[i] > 0 ? x[i] : 0.0f;
        out[i] = std::sqrt(a + std::log1p(std::exp(-std::fabs(x[i]))));
    }
}

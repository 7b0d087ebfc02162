// Rotation: unit complex numbers by position, and vectors turned by them.
#include "native.h"

#include <algorithm>

EXPORT void pyrosome_rotation(const int64_t* position, const float* frequency, float* turn, int64_t T, int64_t F) {
    for (int64_t t = 0; t < T; ++t)
        for (int64_t f = 0; f < F; ++f) {
            const float angle = static_cast<float>(std::max<int64_t>(position[t], 0)) * frequency[f];
            turn[(t * F + f) * 2] = std::cos(angle);
            turn[(t * F + f) * 2 + 1] = std::sin(angle);
        }
}

// x [T, H, C]: the last 2 F channels of each vector turned by its token's angles, forwards (sign 1) or back (-1).
EXPORT void pyrosome_rope(const float* x, const float* turn, float* out, int64_t T, int64_t H, int64_t C, int64_t F,
                          float sign, int threads) {
    threads = worth(T * H * C, threads);
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t)
            for (int64_t h = 0; h < H; ++h) {
                const float* from = x + (t * H + h) * C;
                float* to = out + (t * H + h) * C;
                std::memcpy(to, from, (C - 2 * F) * sizeof(float));
                for (int64_t f = 0, at = C - 2 * F; f < F; ++f, at += 2) {
                    const float c = turn[(t * F + f) * 2], d = sign * turn[(t * F + f) * 2 + 1];
                    to[at] = from[at] * c - from[at + 1] * d;
                    to[at + 1] = from[at] * d + from[at + 1] * c;
                }
            }
    });
}

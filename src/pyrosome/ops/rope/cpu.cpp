// Rotation: unit complex numbers by position, vectors turned by them, and what stands beside a turn in the network.
#include "../norm.h"
#include "../round.h"

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
    each_row(T, T * H * C, threads, [&](int64_t t) {
        for (int64_t h = 0; h < H; ++h) {
            float* to = out + (t * H + h) * C;
            std::memcpy(to, x + (t * H + h) * C, C * sizeof(float));
            turn_pairs(to + C - 2 * F, turn + t * F * 2, F, sign);
        }
    });
}

// x [T, H, C] -> out: each vector divided by its RMS (x weight), then turned.  With `round_nope`, the channels that do not
// turn are rounded to FP8 in groups of 64.
EXPORT void pyrosome_norm_rope(const float* x, const float* weight, const float* turn, float* out, int64_t T, int64_t H,
                               int64_t C, int64_t F, float eps, int round_nope, int threads) {
    each_row(T, 4 * T * H * C, threads, [&](int64_t t) {
        for (int64_t h = 0; h < H; ++h) {
            float* to = out + (t * H + h) * C;
            rms_row(x + (t * H + h) * C, weight, to, C, eps);
            turn_pairs(to + C - 2 * F, turn + t * F * 2, F, 1.0f);
            if (round_nope) round_kv(to, C - 2 * F);
        }
    });
}

// x [T, H, C] -> out: turned (where F), rotated by Hadamard, and with `rounds` rounded to FP4 in groups of 32.
EXPORT void pyrosome_index_rows(const float* x, const float* turn, float* out, int64_t T, int64_t H, int64_t C, int64_t F,
                                int rounds, int threads) {
    const float norm = static_cast<float>(std::pow(static_cast<double>(C), -0.5));
    each_row(T, 16 * T * H * C, threads, [&](int64_t t) {
        for (int64_t h = 0; h < H; ++h) {
            float* to = out + (t * H + h) * C;
            std::memcpy(to, x + (t * H + h) * C, C * sizeof(float));
            if (F) turn_pairs(to + C - 2 * F, turn + t * F * 2, F, 1.0f);
            hadamard(to, C, norm);
            if (rounds) round_fp4_groups(to, C);
        }
    });
}

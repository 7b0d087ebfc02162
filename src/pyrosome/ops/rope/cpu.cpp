// Rotation: unit complex numbers by position, vectors turned by them, and what stands beside a turn in the network.
#include "../norm.h"
#include "../round.h"

namespace {

template <int H>
LANE F16 across(F16 a) {  // lanes i and i ^ H exchanged
#if PYROSOME_LEVEL == 2
    if (H == 1) return swapped(a);
    if (H == 2) return {_mm512_permute_ps(a.v, 0x4E)};
    return {_mm512_shuffle_f32x4(a.v, a.v, H == 4 ? 0xB1 : 0x4E)};
#elif PYROSOME_LEVEL == 1
    if (H == 1) return swapped(a);
    if (H == 2) return {{_mm256_permute_ps(a.v[0], 0x4E), _mm256_permute_ps(a.v[1], 0x4E)}};
    if (H == 8) return {{a.v[1], a.v[0]}};
    return {{_mm256_permute2f128_ps(a.v[0], a.v[0], 1), _mm256_permute2f128_ps(a.v[1], a.v[1], 1)}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[i ^ H];
    return r;
#endif
}

template <int H>
struct Signs {  // of lanes with bit H: -1
    alignas(64) float of[LANES] = {};
    constexpr Signs() {
        for (int i = 0; i < LANES; ++i) of[i] = i & H ? -1.0f : 1.0f;
    }
};

template <int H>
LANE F16 butterflies(F16 a) {  // sums to lanes without bit H, differences to those with it
    static constexpr Signs<H> sign;
    return across<H>(a) + a * load(sign.of);
}

// As `hadamard`, C being a power of two and at least LANES.
void hadamard_lanes(float* x, int64_t C, float norm) {
    const F16 times = set1(norm);
    for (int64_t c = 0; c < C; c += LANES)
        store(x + c, butterflies<8>(butterflies<4>(butterflies<2>(butterflies<1>(load(x + c))))));
    for (int64_t half = LANES; half < C; half *= 2)
        for (int64_t i = 0; i < C; i += 2 * half)
            for (int64_t j = i; j < i + half; j += LANES) {
                const F16 a = load(x + j), b = load(x + j + half);
                store(x + j, a + b), store(x + j + half, a - b);
            }
    for (int64_t c = 0; c < C; c += LANES) store(x + c, load(x + c) * times);
}

}  // namespace

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
            C < LANES ? hadamard(to, C, norm) : hadamard_lanes(to, C, norm);
            if (rounds) round_fp4_groups(to, C);
        }
    });
}

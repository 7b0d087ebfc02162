// Gradients of what stands beside a turn in the network.
#include "../norm.h"

// From the gradient of norm_rope's rows: that of x [T, H, C] (or null), and of the weight [S, C] (or null; to be added
// up), by S strips of tokens.  Rounding passes a gradient on as it is.
EXPORT void pyrosome_norm_rope_back(const float* gradient, const float* x, const float* weight, const float* turn,
                                    float* dx, float* dweight, int64_t T, int64_t H, int64_t C, int64_t F, float eps,
                                    int64_t S) {
    parallel(S, static_cast<int>(S), [&](int64_t strip) {
        Scratch scratch;
        const auto g = scratch.take<float>(C);
        float* dw = dweight ? dweight + strip * C : nullptr;
        if (dw) std::fill(dw, dw + C, 0.0f);
        for (int64_t t = T * strip / S; t < T * (strip + 1) / S; ++t)
            for (int64_t h = 0; h < H; ++h) {
                const int64_t at = (t * H + h) * C;
                std::memcpy(g, gradient + at, C * sizeof(float));
                turn_pairs(g + C - 2 * F, turn + t * F * 2, F, -1.0f);
                const float r = inverse_rms(x + at, C, eps);
                // y = x r weight
                F16 sum = zero();
                for (int64_t c = 0; c < C; c += LANES) {
                    const F16 v = load_part(x + at + c, C - c);
                    F16 slope = load_part(g + c, C - c);
                    if (dw) store_part(dw + c, fma(slope, v * set1(r), load_part(dw + c, C - c)), C - c);
                    if (weight) slope = slope * load_part(weight + c, C - c);
                    store_part(g + c, slope, C - c);
                    sum = fma(slope, v, sum);
                }
                if (!dx) continue;
                // dr / dx = -x r^3 / C
                const F16 along = set1(-fold(sum) * r * r * r / static_cast<float>(C));
                for (int64_t c = 0; c < C; c += LANES) {
                    const F16 own = load_part(g + c, C - c) * set1(r);
                    store_part(dx + at + c, fma(load_part(x + at + c, C - c), along, own), C - c);
                }
            }
    });
}

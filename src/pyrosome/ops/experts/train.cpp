// What stands between an expert's matrices, with gradients, and its rows brought together.
#include "../native.h"

namespace {

struct Swiglu {  // of 16 gates and ups: silu(min(gate, limit)) clamp(up, -limit, limit), and the slopes of both
    F16 silu, up, gate_slope, up_slope;
};

LANE Swiglu swiglu_of(F16 gate, F16 up, float limit) {
    const F16 top = set1(limit), one = set1(1.0f), a = min(top, gate), s = sigmoid(a);  // min in this order keeps NaN
    const F16 high = min(top, up), b = max(set1(-limit), high);
    Swiglu r{a * s, b, s * fma(a, one - s, one), one};
    r.gate_slope = select(less(top, gate), zero(), r.gate_slope);
    r.up_slope = select(less(top, up), zero(), select(less(up, set1(-limit)), zero(), one));
    return r;
}

}  // namespace

// gate, up [N, I] -> out [N, I]: their swiglu, times weight [N] where there is one.
EXPORT void pyrosome_swiglu_train(const float* gate, const float* up, const float* weight, float* out, int64_t N, int64_t I,
                                  float limit, int threads) {
    each_row(N, 32 * N * I, threads, [&](int64_t i) {
        const F16 w = set1(weight ? weight[i] : 1.0f);
        for (int64_t j = 0; j < I; j += LANES) {
            const int64_t at = i * I + j, n = I - j;
            const Swiglu s = swiglu_of(load_part(gate + at, n), load_part(up + at, n), limit);
            store_part(out + at, s.silu * s.up * w, n);
        }
    });
}

// From the gradient of `out`: those of gate and up, which may take its place, and of weight [N] (or null).
EXPORT void pyrosome_swiglu_train_back(const float* gradient, const float* gate, const float* up, const float* weight,
                                       float* dgate, float* dup, float* dweight, int64_t N, int64_t I, float limit,
                                       int threads) {
    each_row(N, 32 * N * I, threads, [&](int64_t i) {
        const F16 w = set1(weight ? weight[i] : 1.0f);
        F16 sum = zero();
        for (int64_t j = 0; j < I; j += LANES) {
            const int64_t at = i * I + j, n = I - j;
            const Swiglu s = swiglu_of(load_part(gate + at, n), load_part(up + at, n), limit);
            const F16 g = load_part(gradient + at, n), gw = g * w;
            sum = fma(g, s.silu * s.up, sum);
            store_part(dgate + at, gw * s.up * s.gate_slope, n);
            store_part(dup + at, gw * s.silu * s.up_slope, n);
        }
        if (dweight) dweight[i] = fold(sum);
    });
}

// out [T, D]: the sum of each token's rows [N, D], whose places [T, K] are added in order; negative is none.
EXPORT void pyrosome_sum_rows(const float* rows, const int64_t* place, float* out, int64_t T, int64_t K, int64_t D,
                              int threads) {
    each_row(T, T * K * D, threads, [&](int64_t t) {
        float* to = out + t * D;
        std::memset(to, 0, D * sizeof(float));
        for (int64_t k = 0; k < K; ++k) {
            if (place[t * K + k] < 0) continue;
            const float* from = rows + place[t * K + k] * D;
            for (int64_t d = 0; d < D; d += LANES)
                store_part(to + d, load_part(to + d, D - d) + load_part(from + d, D - d), D - d);
        }
    });
}

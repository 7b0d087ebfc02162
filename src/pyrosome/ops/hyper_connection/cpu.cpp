// Hyper-connection, fused: before a sub-block (project, normalise, gate, Sinkhorn, collapse), after it, and at the head.
#include <type_traits>

#include "streams.h"

namespace {

template <class F>
void with_streams(int J, F run) {  // the usual number as a constant
    if (J == 4) run(std::integral_constant<int, 4>{});
    else run(std::integral_constant<int, 0>{});
}

}  // namespace

// u [T, D], post [T, J], comb [T, J, J] of streams [T, J, D]; u normalised where `norm` is given.
EXPORT void pyrosome_hyper_connection_in(const float* streams, const float* fn, const float* scale, const float* base,
                                         const float* norm, float* u, float* post, float* comb, int64_t T, int J, int64_t D,
                                         float norm_eps, float hc_eps, int iters, int threads) {
    const Half half{fn, scale, base, norm, norm_eps, hc_eps, iters};
    with_streams(J, [&](auto known) {
        each_block(T, J * D, ((2 + J) * J + 2) * T * J * D, threads, [&](int64_t t0, int64_t t1) {
            read_streams<known.value>(streams, half, u, post, comb, t0, t1, J, D);
        });
    });
}

EXPORT void pyrosome_hyper_connection_out(const float* streams, const float* sub, const float* post, const float* comb,
                                          float* out, int64_t T, int J, int64_t D, int threads) {
    with_streams(J, [&](auto known) {
        each_row(T, T * J * (J + 1) * D, threads, [&](int64_t t) {
            write_streams<known.value>(streams, sub, post, comb, out, t, J, D);
        });
    });
}

// Out of one sub-block and into the next: new streams, and what is read from them.  post and comb are the old ones on entry.
EXPORT void pyrosome_hyper_connection_turn(const float* streams, const float* sub, const float* post, const float* comb,
                                           float* out, const float* fn, const float* scale, const float* base,
                                           const float* norm, float* u, float* new_post, float* new_comb, int64_t T, int J,
                                           int64_t D, float norm_eps, float hc_eps, int iters, int threads) {
    const Half half{fn, scale, base, norm, norm_eps, hc_eps, iters};
    with_streams(J, [&](auto known) {
        each_block(T, J * D, ((2 + J) * J + 2) * T * J * D, threads, [&](int64_t t0, int64_t t1) {
            for (int64_t t = t0; t < t1; ++t)
                write_streams<known.value>(streams, sub, post, comb, out, t, J, D);
            read_streams<known.value>(out, half, u, new_post, new_comb, t0, t1, J, D);
        });
    });
}

// y [T, D] = sum_j (sigmoid(mix_j scale + base_j) + eps) X_j, the collapse before the head.
EXPORT void pyrosome_hyper_connection_head(const float* streams, const float* fn, const float* scale, const float* base,
                                           float* y, int64_t T, int J, int64_t D, float norm_eps, float hc_eps) {
    for (int64_t t = 0; t < T; ++t) {
        const float* x = streams + t * J * D;
        float weight[MAX_J], *to = weight;
        dot_block(&x, fn, &to, 1, 0, J, J * D);
        const float r = inverse_rms(x, J * D, norm_eps);
        for (int j = 0; j < J; ++j) weight[j] = sigmoid1(weight[j] * r * scale[0] + base[j]) + hc_eps;
        collapse<0>(x, weight, J, D, y + t * D);
    }
}

// Hyper-connection, fused: before a sub-block (project, normalise, gate, Sinkhorn, collapse), after it, and at the head.
#include "native.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int MAX_J = 8;

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Rows, then columns, `iters` - 1 times after a first division by columns; C is [J, J], row-major.
void sinkhorn(float* C, int J, float eps, int iters) {
    const auto rows = [&] {
        for (int i = 0; i < J; ++i) {
            float sum = eps;
            for (int j = 0; j < J; ++j) sum += C[i * J + j];
            for (int j = 0; j < J; ++j) C[i * J + j] /= sum;
        }
    };
    const auto columns = [&] {
        float sum[MAX_J];
        for (int j = 0; j < J; ++j) sum[j] = eps;
        for (int i = 0; i < J; ++i)
            for (int j = 0; j < J; ++j) sum[j] += C[i * J + j];
        for (int i = 0; i < J; ++i)
            for (int j = 0; j < J; ++j) C[i * J + j] /= sum[j];
    };
    columns();
    for (int n = 1; n < iters; ++n) rows(), columns();
}

void softmax(float* row, int J, float eps) {
    const float top = *std::max_element(row, row + J);
    float sum = 0;
    for (int j = 0; j < J; ++j) sum += row[j] = std::exp(row[j] - top);
    for (int j = 0; j < J; ++j) row[j] = row[j] / sum + eps;
}

// One over the RMS of all of a token's values.
float inverse_rms(const float* values, int64_t count, float eps) {
    float square, *to = &square;
    dot_block(&values, values, &to, 1, 0, 1, count);
    return 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
}

// out [D] = sum_j weight_j x_j, streams in order.
void collapse(const float* x, const float* weight, int J, int64_t D, float* out) {
    for (int64_t d = 0; d < D; ++d) out[d] = weight[0] * x[d];
    for (int j = 1; j < J; ++j)
        for (int64_t d = 0; d < D; ++d) out[d] += weight[j] * x[j * D + d];
}

}  // namespace

EXPORT void pyrosome_hyper_connection_in(const float* streams, const float* fn, const float* scale, const float* base,
                                         float* u, float* post, float* comb, int64_t T, int J,
                                         int64_t D, float norm_eps, float hc_eps, int iters, int threads) {
    const int wide = (2 + J) * J;
    threads = worth((wide + 2) * T * J * D, threads);
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        const int64_t t0 = T * s / strips, t1 = T * (s + 1) / strips;
        std::vector<float> mix((t1 - t0) * wide);
        std::vector<const float*> rows(t1 - t0);
        std::vector<float*> mixes(t1 - t0);
        for (int64_t t = t0; t < t1; ++t) rows[t - t0] = streams + t * J * D, mixes[t - t0] = &mix[(t - t0) * wide];
        dot_block(rows.data(), fn, mixes.data(), t1 - t0, 0, wide, J * D);
        for (int64_t t = t0; t < t1; ++t) {
            const float* m = mixes[t - t0];
            const float r = inverse_rms(rows[t - t0], J * D, norm_eps);
            float pre[MAX_J];
            float* C = comb + t * J * J;
            for (int j = 0; j < J; ++j) {
                pre[j] = sigmoid(m[j] * r * scale[0] + base[j]) + hc_eps;
                post[t * J + j] = 2.0f * sigmoid(m[J + j] * r * scale[1] + base[J + j]);
            }
            for (int i = 0; i < J * J; ++i) C[i] = m[2 * J + i] * r * scale[2] + base[2 * J + i];
            for (int i = 0; i < J; ++i) softmax(C + i * J, J, hc_eps);
            sinkhorn(C, J, hc_eps, iters);
            collapse(rows[t - t0], pre, J, D, u + t * D);
        }
    });
}

EXPORT void pyrosome_hyper_connection_out(const float* streams, const float* o, const float* post, const float* comb,
                                          float* out, int64_t T, int J, int64_t D, int threads) {
    threads = worth(T * J * (J + 1) * D, threads);
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t)
            for (int k = 0; k < J; ++k) {
                float* to = out + (t * J + k) * D;
                const float *x = streams + t * J * D, *C = comb + t * J * J, p = post[t * J + k], *sub = o + t * D;
                for (int64_t d = 0; d < D; ++d) to[d] = p * sub[d];
                for (int j = 0; j < J; ++j) {
                    const float c = C[j * J + k];
                    for (int64_t d = 0; d < D; ++d) to[d] += c * x[j * D + d];
                }
            }
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
        for (int j = 0; j < J; ++j) weight[j] = sigmoid(weight[j] * r * scale[0] + base[j]) + hc_eps;
        collapse(x, weight, J, D, y + t * D);
    }
}

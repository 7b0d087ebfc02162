// Hyper-connection, fused: before a sub-block (project, normalise, gate, Sinkhorn, collapse), after it, and at the head.
#include "../norm.h"

namespace {

constexpr int MAX_J = 8;

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
    for (int j = 0; j < J; ++j) sum += row[j] = exp1(row[j] - top);
    for (int j = 0; j < J; ++j) row[j] = row[j] / sum + eps;
}

// out [D] = sum_j weight_j x_j, streams in order.
void collapse(const float* x, const float* weight, int J, int64_t D, float* out) {
    for (int64_t d = 0; d < D; d += LANES) {
        F16 sum = set1(weight[0]) * load_part(x + d, D - d);
        for (int j = 1; j < J; ++j) sum = fma(set1(weight[j]), load_part(x + j * D + d, D - d), sum);
        store_part(out + d, sum, D - d);
    }
}

struct Half {  // the parameters of a hyper-connection, and of the norm of what it reads (or none)
    const float *fn, *scale, *base, *norm;
    float norm_eps, hc_eps;
    int iters;
};

// Tokens t0..t1: u [D] what the sub-block reads, post [J] and comb [J, J] how its output goes back.
void read_streams(const float* streams, const Half& h, float* u, float* post, float* comb, int64_t t0, int64_t t1, int J,
                  int64_t D) {
    const int wide = (2 + J) * J;
    Scratch scratch;
    auto* mix = scratch.take<float>((t1 - t0) * wide);
    auto** rows = scratch.take<const float*>(t1 - t0);
    auto** mixes = scratch.take<float*>(t1 - t0);
    for (int64_t t = t0; t < t1; ++t) rows[t - t0] = streams + t * J * D, mixes[t - t0] = mix + (t - t0) * wide;
    dot_block(rows, h.fn, mixes, t1 - t0, 0, wide, J * D);
    for (int64_t t = t0; t < t1; ++t) {
        const float* m = mixes[t - t0];
        const float r = inverse_rms(rows[t - t0], J * D, h.norm_eps);
        float pre[MAX_J];
        float* C = comb + t * J * J;
        for (int j = 0; j < J; ++j) {
            pre[j] = sigmoid1(m[j] * r * h.scale[0] + h.base[j]) + h.hc_eps;
            post[t * J + j] = 2.0f * sigmoid1(m[J + j] * r * h.scale[1] + h.base[J + j]);
        }
        for (int i = 0; i < J * J; ++i) C[i] = m[2 * J + i] * r * h.scale[2] + h.base[2 * J + i];
        for (int i = 0; i < J; ++i) softmax(C + i * J, J, h.hc_eps);
        sinkhorn(C, J, h.hc_eps, h.iters);
        collapse(rows[t - t0], pre, J, D, u + t * D);
        if (h.norm) rms_row(u + t * D, h.norm, u + t * D, D, h.norm_eps);
    }
}

// One token's new streams: out_k = post_k sub + sum_j comb_jk x_j.
void write_streams(const float* x, const float* sub, const float* post, const float* comb, float* out, int J, int64_t D) {
    for (int64_t d = 0; d < D; d += LANES) {
        const F16 o = load_part(sub + d, D - d);
        F16 in[MAX_J];
        for (int j = 0; j < J; ++j) in[j] = load_part(x + j * D + d, D - d);
        for (int k = 0; k < J; ++k) {
            F16 sum = set1(post[k]) * o;
            for (int j = 0; j < J; ++j) sum = fma(set1(comb[j * J + k]), in[j], sum);
            store_part(out + k * D + d, sum, D - d);
        }
    }
}

}  // namespace

// u [T, D], post [T, J], comb [T, J, J] of streams [T, J, D]; u normalised where `norm` is given.
EXPORT void pyrosome_hyper_connection_in(const float* streams, const float* fn, const float* scale, const float* base,
                                         const float* norm, float* u, float* post, float* comb, int64_t T, int J, int64_t D,
                                         float norm_eps, float hc_eps, int iters, int threads) {
    const Half half{fn, scale, base, norm, norm_eps, hc_eps, iters};
    each_range(T, ((2 + J) * J + 2) * T * J * D, threads,
               [&](int64_t t0, int64_t t1) { read_streams(streams, half, u, post, comb, t0, t1, J, D); });
}

EXPORT void pyrosome_hyper_connection_out(const float* streams, const float* sub, const float* post, const float* comb,
                                          float* out, int64_t T, int J, int64_t D, int threads) {
    each_row(T, T * J * (J + 1) * D, threads, [&](int64_t t) {
        write_streams(streams + t * J * D, sub + t * D, post + t * J, comb + t * J * J, out + t * J * D, J, D);
    });
}

// Out of one sub-block and into the next: new streams, and what is read from them.  post and comb are the old ones on entry.
EXPORT void pyrosome_hyper_connection_turn(const float* streams, const float* sub, const float* post, const float* comb,
                                           float* out, const float* fn, const float* scale, const float* base,
                                           const float* norm, float* u, float* new_post, float* new_comb, int64_t T, int J,
                                           int64_t D, float norm_eps, float hc_eps, int iters, int threads) {
    const Half half{fn, scale, base, norm, norm_eps, hc_eps, iters};
    each_range(T, ((2 + J) * J + 2) * T * J * D, threads, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; ++t)
            write_streams(streams + t * J * D, sub + t * D, post + t * J, comb + t * J * J, out + t * J * D, J, D);
        read_streams(out, half, u, new_post, new_comb, t0, t1, J, D);
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
        collapse(x, weight, J, D, y + t * D);
    }
}

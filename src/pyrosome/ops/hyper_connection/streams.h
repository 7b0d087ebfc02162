// What passes over streams are made of, with and without gradients.
#pragma once
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

struct Half {  // the parameters of a hyper-connection, and of the norm of what it reads (or none)
    const float *fn, *scale, *base, *norm;
    float norm_eps, hc_eps;
    int iters;
};

// What a token's mix [(2 + J) J], times r, says: pre [J], post [J] and comb [J, J].
void connect(const float* m, float r, const Half& h, float* pre, float* post, float* comb, int J) {
    for (int j = 0; j < J; ++j) {
        pre[j] = sigmoid1(m[j] * r * h.scale[0] + h.base[j]) + h.hc_eps;
        post[j] = 2.0f * sigmoid1(m[J + j] * r * h.scale[1] + h.base[J + j]);
    }
    for (int i = 0; i < J * J; ++i) comb[i] = m[2 * J + i] * r * h.scale[2] + h.base[2 * J + i];
    for (int i = 0; i < J; ++i) softmax(comb + i * J, J, h.hc_eps);
    sinkhorn(comb, J, h.hc_eps, h.iters);
}

// ---------------------------------------------------------------- four streams: a matrix fills the lanes
template <int J>
LANE F16 column(F16 a) {  // element J of each row, all along it
#if PYROSOME_LEVEL == 2
    return {_mm512_permute_ps(a.v, 0x55 * J)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_permute_ps(a.v[0], 0x55 * J), _mm256_permute_ps(a.v[1], 0x55 * J)}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[i / 4 * 4 + J];
    return r;
#endif
}

template <int I>
LANE F16 row(F16 a) {  // row I in place of each
#if PYROSOME_LEVEL == 2
    return {_mm512_shuffle_f32x4(a.v, a.v, 0x55 * I)};
#elif PYROSOME_LEVEL == 1
    const __m256 r = _mm256_permute2f128_ps(a.v[I / 2], a.v[I / 2], 0x11 * (I % 2));
    return {{r, r}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[4 * I + i % 4];
    return r;
#endif
}

LANE F16 row_sums(F16 first, F16 a) { return first + column<0>(a) + column<1>(a) + column<2>(a) + column<3>(a); }
LANE F16 column_sums(F16 first, F16 a) { return first + row<0>(a) + row<1>(a) + row<2>(a) + row<3>(a); }

// `connect` of N tokens, which do not wait for each other: the same operations on each element, so the same bits.
template <int N>
void connect4(const float* const* mix, const float* r, const Half& h, float (*pre)[MAX_J], float* post, float* comb) {
    const F16 eps = set1(h.hc_eps);
    float scales[LANES] = {};
    std::fill(scales, scales + 4, h.scale[0]), std::fill(scales + 4, scales + 8, h.scale[1]);
    F16 C[N];
    for (int n = 0; n < N; ++n) {
        float gate[LANES];
        const F16 gates = load(scales);
        const F16 s = sigmoid(load_part(mix[n], 8) * set1(r[n]) * gates + load_part(h.base, 8));
        store(gate, s + eps), std::copy(gate, gate + 4, pre[n]);
        store(gate, set1(2.0f) * s), std::copy(gate + 4, gate + 8, post + 4 * n);
        C[n] = load(mix[n] + 8) * set1(r[n]) * set1(h.scale[2]) + load(h.base + 8);
        C[n] = exp(C[n] - max(max(max(column<0>(C[n]), column<1>(C[n])), column<2>(C[n])), column<3>(C[n])));
        C[n] = C[n] / row_sums(zero(), C[n]) + eps;
    }
    for (int i = 1;; ++i) {
        UNROLL for (int n = 0; n < N; ++n) C[n] = C[n] / column_sums(eps, C[n]);
        if (i >= h.iters) break;
        UNROLL for (int n = 0; n < N; ++n) C[n] = C[n] / row_sums(eps, C[n]);
    }
    for (int n = 0; n < N; ++n) store(comb + 16 * n, C[n]);
}

// ---------------------------------------------------------------- passes over the streams
// J4 is the number of streams where it is known, or 0: as a constant it keeps what belongs to each in registers.

// out [D] = sum_j weight_j x_j, streams in order.
template <int J4>
void collapse(const float* x, const float* weight, int num_streams, int64_t D, float* out) {
    const int J = J4 ? J4 : num_streams;
    F16 w[MAX_J];
    for (int j = 0; j < J; ++j) w[j] = set1(weight[j]);
    for (int64_t d = 0; d < D; d += LANES) {
        F16 sum = w[0] * load_part(x + d, D - d);
        for (int j = 1; j < J; ++j) sum = fma(w[j], load_part(x + j * D + d, D - d), sum);
        store_part(out + d, sum, D - d);
    }
}

// New streams of token t: out_k = post_k sub + sum_j comb_jk x_j.
template <int J4>
void write_streams(const float* streams, const float* subs, const float* posts, const float* combs, float* outs, int64_t t,
                   int num_streams, int64_t D) {
    const int J = J4 ? J4 : num_streams;
    const float *x = streams + t * J * D, *sub = subs + t * D, *post = posts + t * J, *comb = combs + t * J * J;
    float* out = outs + t * J * D;
    F16 p[MAX_J], c[MAX_J * MAX_J];
    for (int k = 0; k < J; ++k) p[k] = set1(post[k]);
    for (int i = 0; i < J * J; ++i) c[i] = set1(comb[i]);
    for (int64_t d = 0; d < D; d += LANES) {
        const F16 o = load_part(sub + d, D - d);
        F16 in[MAX_J];
        for (int j = 0; j < J; ++j) in[j] = load_part(x + j * D + d, D - d);
        for (int k = 0; k < J; ++k) {
            F16 sum = p[k] * o;
            for (int j = 0; j < J; ++j) sum = fma(c[j * J + k], in[j], sum);
            store_part(out + k * D + d, sum, D - d);
        }
    }
}

// Tokens t0..t1: u [D] what the sub-block reads, post [J] and comb [J, J] how its output goes back; `kept` [(2 + J) J] is
// where the products with fn are left, if anywhere.
template <int J4>
void read_streams(const float* streams, const Half& h, float* u, float* post, float* comb, int64_t t0, int64_t t1,
                  int num_streams, int64_t D, float* kept = nullptr) {
    const int J = J4 ? J4 : num_streams, wide = (2 + J) * J;
    Scratch scratch;
    auto* mix = kept ? kept + t0 * wide : scratch.take<float>((t1 - t0) * wide);
    auto** rows = scratch.take<const float*>(t1 - t0);
    auto** mixes = scratch.take<float*>(t1 - t0);
    for (int64_t t = t0; t < t1; ++t) rows[t - t0] = streams + t * J * D, mixes[t - t0] = mix + (t - t0) * wide;
    dot_block(rows, h.fn, mixes, t1 - t0, 0, wide, J * D);
    for (int64_t t = t0; t < t1;) {
        constexpr int N = 4;
        const int count = t + N <= t1 ? N : 1;
        const float* const* x = rows + (t - t0);
        float r[N], pre[N][MAX_J];
        if (count == N) inverse_rms<N>(x, J * D, h.norm_eps, r);
        else inverse_rms<1>(x, J * D, h.norm_eps, r);
        float *p = post + t * J, *c = comb + t * J * J;
        if (J4 != 4)
            for (int i = 0; i < count; ++i) connect(mixes[t - t0 + i], r[i], h, pre[i], p + i * J, c + i * J * J, J);
        else if (count == N) connect4<N>(mixes + (t - t0), r, h, pre, p, c);
        else connect4<1>(mixes + (t - t0), r, h, pre, p, c);
        for (int i = 0; i < count; ++i, ++t) {
            collapse<J4>(x[i], pre[i], J, D, u + t * D);
            if (h.norm) rms_row(u + t * D, h.norm, u + t * D, D, h.norm_eps);
        }
    }
}

// Runs range(t0, t1) over tokens, shared out among threads, no more at a time than a core's second cache holds.
template <class F>
void each_block(int64_t T, int64_t width, int64_t operations, int threads, F range) {
    const int64_t block = std::max<int64_t>(4, (256 << 10) / 4 / std::max<int64_t>(width, 1) / 4 * 4);
    each_range(T, operations, threads, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t += block) range(t, std::min(t + block, t1));
    });
}

}  // namespace

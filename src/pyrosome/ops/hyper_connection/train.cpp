// The passes over four streams with gradients.  Beside what the passes were given only the products with fn are kept for
// them: a token's gates and every step of Sinkhorn's are computed again.
#include "streams.h"

namespace {

constexpr int J = 4, WIDE = (2 + J) * J, BLOCK = 64;  // BLOCK: tokens whose streams a core's second cache holds

struct In {  // of train.py's `In`: what a sub-block read, the gradients of it, and where those of its inputs go
    const float *streams, *mix, *fn, *scale, *base, *norm;  // mix [T, WIDE]: the streams by fn; norm: or null
    const float *du, *dpost, *dcomb, *given;                // given: of the streams themselves, from elsewhere, or null
    float *dstreams, *dfn, *dbase, *dscale, *dnorm;         // all but the first of each strip of tokens, to be added up;
                                                            // dstreams, dfn, dnorm: or null
};

struct Out {  // of train.py's `Out`: what went back into the streams, and where its gradients go
    const float *streams, *sub, *post, *comb;
    float *dstreams, *dsub, *dpost, *dcomb;  // dstreams: or null
};

struct Sums {  // of the tokens of a strip: the gradient of base, and its products with what base is added to
    F16 gate = zero(), comb = zero(), gate_scale = zero(), comb_scale = zero();
};

LANE F16 row_total(F16 a) { return (column<0>(a) + column<1>(a)) + (column<2>(a) + column<3>(a)); }
LANE F16 column_total(F16 a) { return (row<0>(a) + row<1>(a)) + (row<2>(a) + row<3>(a)); }

// C: the matrices that Sinkhorn's steps begin with; g: from the gradient of their results to that of C.  A step is
// C' = C / s with s = eps + sums of C, so dC = (dC' - sums of dC' C') / s; C' and 1 / s of each are kept in between.
template <int N>
LANE void sinkhorn_back(F16* C, F16* g, F16 eps, int iters, float* kept) {
    const int steps = std::max(1, 2 * iters - 1);
    for (int s = 0; s < steps; ++s)
        UNROLL for (int n = 0; n < N; ++n) {
            const F16 share = set1(1.0f) / (eps + (s % 2 ? row_total(C[n]) : column_total(C[n])));
            float* to = kept + (s * N + n) * 2 * LANES;
            C[n] = C[n] * share;
            store(to, C[n]), store(to + LANES, share);
        }
    for (int s = steps - 1; s >= 0; --s)
        UNROLL for (int n = 0; n < N; ++n) {
            const float* from = kept + (s * N + n) * 2 * LANES;
            const F16 both = g[n] * load(from);
            g[n] = (g[n] - (s % 2 ? row_total(both) : column_total(both))) * load(from + LANES);
        }
}

struct Token {  // what is left to do for one, when its gates are done
    float pre[LANES];
    float along, across;  // the gradient of the collapsed streams before their norm: g times one + u times the other
    float by_square;      // of its streams, by their mean square: times the streams
    float dmix[WIDE];
};

// From the gradient of u, that of the gates, dpre_j = du . x_j, and how du is made.
void collapse_back(const float* x, const float* du, const Half& h, int64_t D, Token& token, float* dpre) {
    F16 gx[J], ux[J], w[J];
    for (int j = 0; j < J; ++j) gx[j] = ux[j] = zero(), w[j] = set1(token.pre[j]);
    for (int64_t d = 0; d < D; d += LANES) {
        F16 v[J], u = zero(), g = load(du + d);
        if (h.norm) g = g * load(h.norm + d);
        UNROLL for (int j = 0; j < J; ++j) v[j] = load(x + j * D + d), u = fma(w[j], v[j], u);
        UNROLL for (int j = 0; j < J; ++j) gx[j] = fma(g, v[j], gx[j]), ux[j] = fma(u, v[j], ux[j]);
    }
    float with_u[J], square = 0, product = 0;
    for (int j = 0; j < J; ++j) {
        dpre[j] = fold(gx[j]), with_u[j] = fold(ux[j]);
        square += token.pre[j] * with_u[j], product += token.pre[j] * dpre[j];  // u . u and g . u
    }
    token.along = 1, token.across = 0;
    if (!h.norm) return;
    const float r = 1 / std::sqrt(square / static_cast<float>(D) + h.norm_eps);
    token.along = r, token.across = -r * r * r / static_cast<float>(D) * product;
    for (int j = 0; j < J; ++j) dpre[j] = token.along * dpre[j] + token.across * with_u[j];
}

// The gates of tokens t..t + N.
template <int N>
void gates_back(const In& in, const Half& h, int64_t t, int64_t D, float* kept, Token* token, Sums& sums) {
    const float *x[N], *mix = in.mix + t * WIDE;
    float r[N], dgate[N][LANES] = {}, scales[LANES] = {};
    F16 gate[N], C[N], P[N], g[N];
    for (int n = 0; n < N; ++n) x[n] = in.streams + (t + n) * J * D;
    inverse_rms<N>(x, J * D, h.norm_eps, r);
    std::fill(scales, scales + 4, h.scale[0]), std::fill(scales + 4, scales + 8, h.scale[1]);
    for (int n = 0; n < N; ++n) {
        const float *m = mix + n * WIDE, *dpost = in.dpost + (t + n) * J;
        gate[n] = sigmoid(load_part(m, 8) * set1(r[n]) * load(scales) + load_part(h.base, 8));
        store(token[n].pre, gate[n] + set1(h.hc_eps));
        collapse_back(x[n], in.du + (t + n) * D, h, D, token[n], dgate[n]);
        for (int j = 0; j < J; ++j) dgate[n][J + j] = 2 * dpost[j];
        C[n] = load(m + 8) * set1(r[n]) * set1(h.scale[2]) + load(h.base + 8);
        C[n] = exp(C[n] - max(max(max(column<0>(C[n]), column<1>(C[n])), column<2>(C[n])), column<3>(C[n])));
        P[n] = C[n] / row_total(C[n]);
        C[n] = P[n] + set1(h.hc_eps), g[n] = load(in.dcomb + (t + n) * J * J);
    }
    sinkhorn_back<N>(C, g, set1(h.hc_eps), h.iters, kept);
    for (int n = 0; n < N; ++n) {
        const float* m = mix + n * WIDE;
        const F16 of_gate = load(dgate[n]) * gate[n] * (set1(1) - gate[n]);
        const F16 of_comb = P[n] * (g[n] - row_total(g[n] * P[n]));
        const F16 low = load_part(m, 8), high = load(m + 8), rms = set1(r[n]);
        const F16 low_slope = of_gate * load(scales), high_slope = of_comb * set1(h.scale[2]);
        sums.gate = sums.gate + of_gate, sums.comb = sums.comb + of_comb;
        sums.gate_scale = fma(of_gate, low * rms, sums.gate_scale);
        sums.comb_scale = fma(of_comb, high * rms, sums.comb_scale);
        store_part(token[n].dmix, low_slope * rms, 8), store(token[n].dmix + 8, high_slope * rms);
        // r = (mean of squares + eps)^-1/2 has the gradient s . mix, s that of r mix, and gives -r^3 / (J D) x of it.
        const float with_mix = fold(fma(low_slope, low, high_slope * high));
        token[n].by_square = -r[n] * r[n] * r[n] / static_cast<float>(J * D) * with_mix;
    }
}

// The gradient of the collapsed streams, to out [D]; and dnorm, where it is asked for, gets more.
void slope_of_u(const float* x, const float* du, const Half& h, int64_t D, const Token& token, float* out, float* dnorm) {
    const F16 along = set1(token.along), across = set1(token.across);
    F16 w[J];
    for (int j = 0; j < J; ++j) w[j] = set1(token.pre[j]);
    for (int64_t d = 0; d < D; d += LANES) {
        F16 u = zero(), g = load(du + d);
        UNROLL for (int j = 0; j < J; ++j) u = fma(w[j], load(x + j * D + d), u);
        if (dnorm) store(dnorm + d, fma(g * u, along, load(dnorm + d)));
        if (h.norm) g = g * load(h.norm + d);
        store(out + d, fma(across, u, along * g));
    }
}

// The streams' gradient of N tokens: dx_j = given_j + pre_j du + by_square x_j + dmix . fn_j.
template <int N>
void streams_back(const float* x, const float* given, const float* fn, const float* du, int64_t D, const Token* token,
                  float* dx) {
    for (int64_t j = 0, i = 0; j < J; ++j)
        for (int64_t d = 0; d < D; d += LANES, i += LANES) {
            F16 sum[N];
            UNROLL for (int n = 0; n < N; ++n) {
                sum[n] = set1(token[n].pre[j]) * load(du + n * D + d);
                if (given) sum[n] = sum[n] + load(given + n * J * D + i);
                sum[n] = fma(set1(token[n].by_square), load(x + n * J * D + i), sum[n]);
            }
            for (int k = 0; k < WIDE; ++k) {
                const F16 w = load(fn + k * J * D + i);
                UNROLL for (int n = 0; n < N; ++n) sum[n] = fma(set1(token[n].dmix[k]), w, sum[n]);
            }
            UNROLL for (int n = 0; n < N; ++n) store(dx + n * J * D + i, sum[n]);
        }
}

// dfn [WIDE, J D] += of each of `count` tokens dmix x.
void fn_back(const float* x, const Token* token, int64_t count, int64_t D, float* dfn) {
    constexpr int ROWS = 8;
    for (int64_t i = 0; i < J * D; i += LANES)
        for (int k = 0; k < WIDE; k += ROWS) {
            F16 sum[ROWS];
            UNROLL for (int m = 0; m < ROWS; ++m) sum[m] = zero();
            for (int64_t n = 0; n < count; ++n) {
                const F16 v = load(x + n * J * D + i);
                UNROLL for (int m = 0; m < ROWS; ++m) sum[m] = fma(set1(token[n].dmix[k + m]), v, sum[m]);
            }
            for (int m = 0; m < ROWS; ++m) {
                float* to = dfn + (k + m) * J * D + i;
                store(to, load(to) + sum[m]);
            }
        }
}

// Token t of `out`, from the gradient of its new streams [J, D].
void out_back(const float* gradient, const Out& o, int64_t t, int64_t D) {
    const float *x = o.streams + t * J * D, *sub = o.sub + t * D, *post = o.post + t * J, *comb = o.comb + t * J * J;
    F16 of_post[J], of_comb[J][J], p[J];
    for (int k = 0; k < J; ++k) {
        of_post[k] = zero(), p[k] = set1(post[k]);
        for (int j = 0; j < J; ++j) of_comb[j][k] = zero();
    }
    for (int64_t d = 0; d < D; d += LANES) {
        F16 g[J], sum = zero();
        const F16 y = load(sub + d);
        UNROLL for (int k = 0; k < J; ++k) {
            g[k] = load(gradient + k * D + d);
            sum = fma(p[k], g[k], sum), of_post[k] = fma(g[k], y, of_post[k]);
        }
        store(o.dsub + t * D + d, sum);
        UNROLL for (int j = 0; j < J; ++j) {
            const F16 v = load(x + j * D + d);
            UNROLL for (int k = 0; k < J; ++k) of_comb[j][k] = fma(v, g[k], of_comb[j][k]);
        }
    }
    for (int k = 0; k < J; ++k) {
        o.dpost[t * J + k] = fold(of_post[k]);
        for (int j = 0; j < J; ++j) o.dcomb[t * J * J + j * J + k] = fold(of_comb[j][k]);
    }
    if (!o.dstreams) return;
    F16 c[J][J];
    for (int j = 0; j < J; ++j)
        for (int k = 0; k < J; ++k) c[j][k] = set1(comb[j * J + k]);
    for (int64_t d = 0; d < D; d += LANES) {
        F16 g[J];
        UNROLL for (int k = 0; k < J; ++k) g[k] = load(gradient + k * D + d);
        UNROLL for (int j = 0; j < J; ++j) {
            F16 sum = c[j][0] * g[0];
            UNROLL for (int k = 1; k < J; ++k) sum = fma(c[j][k], g[k], sum);
            store(o.dstreams + t * J * D + j * D + d, sum);
        }
    }
}

// Tokens t0..t1 of `in`, and what `out` made their streams of.
void block_back(const In& in, const Half& h, const Out* out, int64_t t0, int64_t t1, int64_t D, float* dfn, float* dnorm,
                Sums& sums) {
    constexpr int N = 4, M = 8;  // tokens at once: of gates, and of streams
    Scratch scratch;
    const auto kept = scratch.take<float>(std::max(1, 2 * h.iters - 1) * N * 2 * LANES);
    const auto token = scratch.take<Token>(BLOCK);
    const auto slope = scratch.take<float>(M * D), between = scratch.take<float>(M * J * D);
    for (int64_t t = t0, count; t < t1; t += count) {
        count = t + N <= t1 ? N : 1;
        if (count == N) gates_back<N>(in, h, t, D, kept, token + (t - t0), sums);
        else gates_back<1>(in, h, t, D, kept, token + (t - t0), sums);
    }
    if (dfn) fn_back(in.streams + t0 * J * D, token, t1 - t0, D, dfn);
    if (!out && !in.dstreams && !dnorm) return;
    for (int64_t t = t0, count; t < t1; t += count) {
        count = t + M <= t1 ? M : 1;
        const Token* const those = token + (t - t0);
        const float *x = in.streams + t * J * D, *given = in.given ? in.given + t * J * D : nullptr;
        float* const dx = out ? between : in.dstreams + t * J * D;
        for (int64_t n = 0; n < count; ++n)
            slope_of_u(x + n * J * D, in.du + (t + n) * D, h, D, those[n], slope + n * D, dnorm);
        if (!out && !in.dstreams) continue;
        if (count == M) streams_back<M>(x, given, in.fn, slope, D, those, dx);
        else streams_back<1>(x, given, in.fn, slope, D, those, dx);
        for (int64_t n = 0; n < count && out; ++n) out_back(between + n * J * D, *out, t + n, D);
    }
}

}  // namespace

// As `hyper_connection_in`, with `out` as `hyper_connection_turn`, which writes the streams first; mix is for the way back.
EXPORT void pyrosome_hyper_connection_train(const Out* out, float* streams, const float* fn, const float* scale,
                                            const float* base, const float* norm, float* u, float* post, float* comb,
                                            float* mix, int64_t T, int64_t D, float norm_eps, float hc_eps, int iters,
                                            int threads) {
    const Half half{fn, scale, base, norm, norm_eps, hc_eps, iters};
    each_block(T, J * D, (WIDE + 2) * T * J * D, threads, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1 && out; ++t)
            write_streams<J>(out->streams, out->sub, out->post, out->comb, streams, t, J, D);
        read_streams<J>(streams, half, u, post, comb, t0, t1, J, D, mix);
    });
}

// Gradients of it, in S strips of tokens.  With `out`, those of the streams in between never leave the cache.
EXPORT void pyrosome_hyper_connection_train_back(const In* in, const Out* out, int64_t T, int64_t D, float norm_eps,
                                                 float hc_eps, int iters, int64_t S) {
    const Half half{in->fn, in->scale, in->base, in->norm, norm_eps, hc_eps, iters};
    parallel(S, static_cast<int>(S), [&](int64_t strip) {
        float* const dfn = in->dfn ? in->dfn + strip * WIDE * J * D : nullptr;
        float* const dnorm = in->dnorm ? in->dnorm + strip * D : nullptr;
        if (dfn) std::fill(dfn, dfn + WIDE * J * D, 0.0f);
        if (dnorm) std::fill(dnorm, dnorm + D, 0.0f);
        Sums sums;
        const int64_t end = T * (strip + 1) / S;
        for (int64_t t = T * strip / S; t < end; t += BLOCK)
            block_back(*in, half, out, t, std::min<int64_t>(t + BLOCK, end), D, dfn, dnorm, sums);
        float *dbase = in->dbase + strip * WIDE, *dscale = in->dscale + strip * 3, gate[LANES], comb[LANES];
        store_part(dbase, sums.gate, 8), store(dbase + 8, sums.comb);
        store(gate, sums.gate_scale), store(comb, sums.comb_scale);
        std::fill(dscale, dscale + 3, 0.0f);
        for (int i = 0; i < 4; ++i) dscale[0] += gate[i], dscale[1] += gate[4 + i];
        for (int i = 0; i < LANES; ++i) dscale[2] += comb[i];
    });
}

EXPORT void pyrosome_hyper_connection_out_back(const float* gradient, const Out* out, int64_t T, int64_t D, int threads) {
    each_row(T, 2 * T * J * (2 * J + 2) * D, threads, [&](int64_t t) { out_back(gradient + t * J * D, *out, t, D); });
}

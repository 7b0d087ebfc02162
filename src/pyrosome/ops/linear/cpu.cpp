// y[m, n] = sum_k x[m, k] w[n, k], w as it is held: quantised ones by tiles (tiles.h), plain ones by rows, K across lanes.
#include <atomic>

#include "../norm.h"
#include "../tiles.h"

namespace {

constexpr int64_t X_BLOCK_BYTES = 256 << 10;  // rows of x that stay in a core's second cache while w streams by
constexpr int64_t PART = 64;                  // outputs of one part of a parallel region

struct FloatRows {
    using Element = float;
    static LANE F16 at(const float* p) { return load(p); }
    static LANE F16 part(const float* p, int64_t n) { return load_part(p, n); }
};
struct BFloatRows {
    using Element = uint16_t;
    static LANE F16 at(const uint16_t* p) { return load_bf16(p); }
    static LANE F16 part(const uint16_t* p, int64_t n) {
        uint16_t rest[16] = {};
        std::memcpy(rest, p, n * sizeof(uint16_t));
        return load_bf16(rest);
    }
};

// y[i][n + j] = sum[i][j] folded.  Sixteen at once share their shuffles; each is added up as `fold` does.
template <int MR, int NR>
LANE void put_folded(const F16 (&sum)[MR][NR], float* const* y, int64_t n) {
#if PYROSOME_LEVEL == 2
    if constexpr (MR == 4 && NR == 4) {
        const auto halves = [](__m512 a, __m512 b) {  // 8 of a, 8 of b
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        };
        __m512 four[4];  // of output j: in its quarter i, four of row i
        UNROLL for (int j = 0; j < 4; ++j) {
            const __m512 a = halves(sum[0][j].v, sum[1][j].v), b = halves(sum[2][j].v, sum[3][j].v);
            four[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
        }
        const auto pairs = [](__m512 a, __m512 b) {
            const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
            return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
        };
        const __m512 p = pairs(four[0], four[1]), q = pairs(four[2], four[3]);
        const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xDD));
        _mm_storeu_ps(y[0] + n, _mm512_castps512_ps128(all));
        _mm_storeu_ps(y[1] + n, _mm512_extractf32x4_ps(all, 1));
        _mm_storeu_ps(y[2] + n, _mm512_extractf32x4_ps(all, 2));
        _mm_storeu_ps(y[3] + n, _mm512_extractf32x4_ps(all, 3));
        return;
    }
#endif
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NR; ++j) y[i][n + j] = fold(sum[i][j]);
}

// With `AHEAD` bytes, the NR rows are asked for so long before their use, in the order in which they lie: read by turns
// alone they would not come one after the other.
template <class R, int MR, int NR, int AHEAD = 0>
void tile(const float* const* x, const typename R::Element* rows, float* const* y, int64_t n, int64_t K) {
    constexpr int LINE = 64 / (LANES * sizeof(typename R::Element));  // vectors in it
    F16 sum[MR][NR];
    const float* from[MR];
    const typename R::Element* w[NR];
    UNROLL for (int i = 0; i < MR; ++i) from[i] = x[i];
    UNROLL for (int j = 0; j < NR; ++j) w[j] = rows + j * K;
    UNROLL for (int i = 0; i < MR; ++i)
        UNROLL for (int j = 0; j < NR; ++j) sum[i][j] = zero();
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        F16 wide[NR];
        UNROLL for (int j = 0; j < NR; ++j) {
            if (AHEAD && j % LINE == 0)
                __builtin_prefetch(reinterpret_cast<const char*>(rows + k * NR + j * LANES) + AHEAD, 0, 2);  // second cache
            wide[j] = R::at(w[j] + k);
        }
        UNROLL for (int i = 0; i < MR; ++i) {
            const F16 in = load(from[i] + k);
            UNROLL for (int j = 0; j < NR; ++j) sum[i][j] = fma(in, wide[j], sum[i][j]);
        }
    }
    if (k < K)
        UNROLL for (int i = 0; i < MR; ++i) {
            const F16 in = load_part(from[i] + k, K - k);
            UNROLL for (int j = 0; j < NR; ++j) sum[i][j] = fma(in, R::part(w[j] + k, K - k), sum[i][j]);
        }
    put_folded(sum, y, n);
}

#if PYROSOME_LEVEL == 2
constexpr int MB = 4, NB = 4, STREAM = 8;  // rows and outputs of a tile; outputs of one for a single row of x
#else
constexpr int MB = 2, NB = 2, STREAM = 1;
#endif
constexpr int64_t LONG = 2048;  // inputs from which sums wait for themselves: outputs then go STREAM at a time

// Covers M rows and outputs n0..n1 with tiles; which tile computes an output does not change it.  Rows go in blocks that
// a core's second cache keeps while w streams by.
template <class R>
void cover(const float* const* x, const typename R::Element* w, float* const* y, int64_t M, int64_t n0, int64_t n1,
           int64_t K) {
    const int64_t rows = std::max<int64_t>(MB, X_BLOCK_BYTES / 4 / std::max<int64_t>(K, 1) / MB * MB);
    for (int64_t m0 = 0; m0 < M; m0 += rows) {
        const int64_t m1 = std::min(M, m0 + rows);
        int64_t n = n0;
        const typename R::Element* at = w;
        if (m1 - m0 == 1) {  // memory is what takes time
            for (; K >= LONG && n + STREAM <= n1; n += STREAM, at += STREAM * K)
                tile<R, 1, STREAM, STREAM == 1 ? 0 : 32768>(x + m0, at, y + m0, n, K);
            for (; n < n1; ++n, at += K) tile<R, 1, 1>(x + m0, at, y + m0, n, K);
        }
        for (; n + NB <= n1; n += NB, at += NB * K) {
            int64_t m = m0;
            for (; m + MB <= m1; m += MB) tile<R, MB, NB>(x + m, at, y + m, n, K);
            for (; m < m1; ++m) tile<R, 1, NB>(x + m, at, y + m, n, K);
        }
        for (; n < n1; ++n, at += K) {
            int64_t m = m0;
            for (; m + MB <= m1; m += MB) tile<R, MB, 1>(x + m, at, y + m, n, K);
            for (; m < m1; ++m) tile<R, 1, 1>(x + m, at, y + m, n, K);
        }
    }
}

}  // namespace

void dot_block(const float* const* x, const float* w, float* const* y, int64_t M, int64_t n0, int64_t n1, int64_t K) {
    cover<FloatRows>(x, w, y, M, n0, n1, K);
}

void dot_rows(const float* const* x, const Weight& w, float* const* y, int64_t M, int64_t n0, int64_t n1) {
    if (w.format == BFLOAT16)
        cover<BFloatRows>(x, reinterpret_cast<const uint16_t*>(w.data) + n0 * w.K, y, M, n0, n1, w.K);
    else
        cover<FloatRows>(x, reinterpret_cast<const float*>(w.data) + n0 * w.K, y, M, n0, n1, w.K);
}

// One product of several that read the same rows x; each output row is ldy floats after the one before.
struct Product {
    const Weight* weight;
    float* y;
    int64_t ldy;
};

// All products [M, N_i] of rows x [M, K], which are divided by their RMS, times `norm`, where that is given.  With
// `rounds`, what goes into quantised weights is rounded to FP8 first.
EXPORT void pyrosome_linear(const float* x, int64_t ldx, int64_t M, const Product* products, int64_t count, int rounds,
                            const float* norm, float eps, int threads) {
    const int64_t K = products->weight->K;
    int64_t operations = 0, parts = 0;
    bool quantised = false;
    for (int64_t i = 0; i < count; ++i) {
        const Weight& w = *products[i].weight;
        operations += M * w.N * K, parts += (w.N + PART - 1) / PART;
        quantised = quantised || w.format == FP4 || w.format == FP8;
    }
    threads = worth(operations, threads);
    Scratch scratch;
    if (norm) {
        auto* normed = scratch.take<float>(M * K);
        each_row(M, 4 * M * K, threads, [&](int64_t m) { rms_row(x + m * ldx, norm, normed + m * K, K, eps); });
        x = normed, ldx = K;
    }
    Inputs inputs{nullptr, M, !rounds};
    if (quantised) {
        inputs.data = scratch.take<char>(Inputs::bytes(M, K, !rounds));
        prepare_rows(x, ldx, M, K, rounds, inputs, threads);
    }
    const int64_t blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel(blocks * parts, threads, [&](int64_t at) {
        const int64_t m0 = at / parts * ROW_BLOCK, count = std::min(ROW_BLOCK, M - m0);
        int64_t part = at % parts;
        const Product* p = products;
        for (int64_t tiles; part >= (tiles = (p->weight->N + PART - 1) / PART); part -= tiles) ++p;
        const Weight& w = *p->weight;
        const int64_t n0 = part * PART, n1 = std::min(w.N, n0 + PART);
        float* y[ROW_BLOCK];
        if (w.format == FP4 || w.format == FP8) {
            for (int64_t m = 0; m < count; ++m) y[m] = p->y + (m0 + m) * p->ldy + n0;
            multiply_tile(w, part, inputs.from(m0), nullptr, count, y);
        } else {
            const float* from[ROW_BLOCK];
            for (int64_t m = 0; m < count; ++m) y[m] = p->y + (m0 + m) * p->ldy, from[m] = x + (m0 + m) * ldx;
            dot_rows(from, w, y, count, n0, n1);
        }
    });
}

EXPORT void pyrosome_scale(const float* x, float* out, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i += LANES) store_part(out + i, load_part(x + i, count - i) * set1(factor), count - i);
}

// Whether bfloat16 holds all of x [M, K], as it does what attention gives: products of pairs then have the same bits as
// those of floats, in half the time.
bool is_narrow(const float* x, int64_t ldx, int64_t M, int64_t K, int threads) {
    std::atomic<bool> narrow{true};
    each_row(M, M * K / 4, threads, [&](int64_t m) {
        I16 low = iset1(0);
        for (int64_t k = 0; k < K; k += LANES) low = low | shl<16>(as_int(load_part(x + m * ldx + k, K - k)));
        if (bits_of(greater(iset1(0), low)) | bits_of(greater(low, iset1(0)))) narrow = false;
    });
    return narrow;
}

// G products of one shape: group g takes columns g K.. of x [M, G K] and matrix g of a stack, and writes columns g N.. of
// y.  Inputs are not rounded.
EXPORT void pyrosome_grouped_linear(const float* x, int64_t ldx, int64_t M, const Weight* stack, int64_t G, float* y,
                                    int threads) {
    const int64_t N = stack->N, K = stack->K, tiles = (N + PART - 1) / PART;
    threads = worth(M * G * N * K, threads);
    const bool quantised = stack->format == FP4 || stack->format == FP8;
    const bool floats = quantised && !is_narrow(x, ldx, M, G * K, threads);
    for (int64_t m0 = 0; m0 < M; m0 += ROW_BLOCK, x += ROW_BLOCK * ldx, y += ROW_BLOCK * G * N) {
        const int64_t count = std::min(ROW_BLOCK, M - m0), each = Inputs::bytes(count, K, floats);
        Scratch scratch;
        char* prepared = quantised ? scratch.take<char>(G * each) : nullptr;
        if (quantised)
            parallel(G, threads, [&](int64_t g) {
                for (int64_t m = 0; m < count; ++m) prepare_row(x + m * ldx + g * K, K, false, {prepared + g * each, count, floats}, m);
            });
        parallel(G * tiles, threads, [&](int64_t part) {
            const int64_t g = part / tiles, tile = part % tiles, n0 = tile * PART, n1 = std::min(N, n0 + PART);
            const Weight w = stack->of(g);
            float* to[ROW_BLOCK];
            if (quantised) {
                for (int64_t m = 0; m < count; ++m) to[m] = y + (m * G + g) * N + n0;
                multiply_tile(w, tile, {prepared + g * each, count, floats}, nullptr, count, to);
            } else {
                const float* from[ROW_BLOCK];
                for (int64_t m = 0; m < count; ++m) to[m] = y + (m * G + g) * N, from[m] = x + m * ldx + g * K;
                dot_rows(from, w, to, count, n0, n1);
            }
        });
    }
}

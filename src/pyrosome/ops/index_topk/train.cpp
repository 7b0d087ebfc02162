// The lightning indexer over rows in floats: which it chooses, and their scores, with gradients.
#include <vector>

#include "../products.h"
#include "best.h"

namespace {

LANE F16 relu(F16 x) { return max(zero(), x); }  // this order keeps NaN

// Scores of 16 rows (n of them real), a lane each: keys [C, N] from the first row on.
F16 scores(const float* q, const float* keys, const float* weight, int64_t H, int64_t C, int64_t N, int64_t n) {
    F16 out = zero();
    for (int64_t h0 = 0; h0 < H; h0 += HEADS) {
        const int64_t heads = std::min<int64_t>(HEADS, H - h0);
        const float* from[HEADS];
        F16 sum[HEADS];
        for (int h = 0; h < HEADS; ++h) from[h] = q + (h0 + std::min<int64_t>(h, heads - 1)) * C, sum[h] = zero();
        for (int64_t c = 0; c < C; ++c) {
            const F16 k = load_part(keys + c * N, n);
            for (int h = 0; h < HEADS; ++h) sum[h] = fma(set1(from[h][c]), k, sum[h]);
        }
        for (int64_t h = 0; h < heads; ++h) out = fma(relu(sum[h]), set1(weight[h0 + h]), out);
    }
    return out;
}

// The rows that token t chose, and their places among its K.
int64_t chosen(const float* rows, float* gradient, const int64_t* flat, const int64_t* index, int64_t t, int64_t K,
               int64_t C, const float** row, float** to, int64_t* at) {
    int64_t n = 0;
    for (int64_t k = 0; k < K; ++k) {
        if (index[t * K + k] < 0) continue;
        row[n] = rows + flat[t * K + k] * C;
        if (to) to[n] = gradient + flat[t * K + k] * C;
        at[n++] = k;
    }
    return n;
}

}  // namespace

// The K best of rows 0 .. visible - 1 (N at most) of each token's span: score [T, K], index [T, K] ascending, -1 where
// there are fewer.  q [T, H, C], keys [B, C, N], weight [T, H]; layout [B, 2] the tokens of each span.
EXPORT void pyrosome_index_choose(const float* q, const float* keys, const float* weight, const int64_t* visible,
                                  const int64_t* layout, float* score, int64_t* index, int64_t B, int64_t T, int64_t H,
                                  int64_t C, int64_t N, int64_t K, int threads) {
    std::vector<int64_t> span(T);
    for (int64_t b = 0; b < B; ++b) std::fill(&span[0] + layout[2 * b], &span[0] + layout[2 * b + 1], b);
    each_row(T, T * H * C * N, threads, [&](int64_t t) {
        Scratch scratch;
        const int64_t rows = std::max<int64_t>(0, std::min(visible[t], N));
        indexer::Best best(K, indexer::Best::room_for(K, rows), scratch);
        for (int64_t n = 0; n < rows; n += LANES) {
            const F16 s = scores(q + t * H * C, keys + span[t] * C * N + n, weight + t * H, H, C, N, N - n);
            best.add(s, n, indexer::first_lanes(rows - n));
        }
        best.choose();
        best.write(score + t * K, index + t * K);
    });
}

// From the gradient of the scores: those of q and weight, and of the rows [S, N, C], which hold zeros (or null; to be
// added up), by S strips of tokens.
EXPORT void pyrosome_index_choose_back(const float* gradient, const float* q, const float* rows, const int64_t* flat,
                                          const int64_t* index, const float* weight, float* dq, float* drows, float* dweight,
                                          int64_t T, int64_t H, int64_t C, int64_t K, int64_t N, int64_t S) {
    parallel(S, static_cast<int>(S), [&](int64_t strip) {
        Scratch scratch;
        const auto row = scratch.take<const float*>(K);
        const auto to = scratch.take<float*>(K);
        const auto at = scratch.take<int64_t>(K);
        const auto slope = scratch.take<float>(H * K);
        float* own = drows ? drows + strip * N * C : nullptr;
        for (int64_t t = T * strip / S; t < T * (strip + 1) / S; ++t) {
            const int64_t n = chosen(rows, own, flat, index, t, K, C, row, own ? to : nullptr, at);
            products(q + t * H * C, row, H, n, C, slope, K);
            for (int64_t h = 0; h < H; ++h) {
                float* s = slope + h * K;
                float sum = 0;
                for (int64_t k = 0; k < n; ++k) {
                    const float g = s[k] > 0 ? gradient[t * K + at[k]] : 0.0f;
                    sum += g * s[k];
                    s[k] = g * weight[t * H + h];
                }
                dweight[t * H + h] = sum;
            }
            weighted(slope, row, H, n, C, dq + t * H * C, K);
            if (own) spread<1>({slope}, {q + t * H * C}, to, H, n, C, K);
        }
    });
}

// Indexer scores: score[t, n] = sum_h weight[t, h] relu(q[t, h] . key[n]), heads in order.
#include "native.h"

#include <algorithm>
#include <vector>

EXPORT void pyrosome_index_scores(const float* q, const float* keys, const float* weight, float* score, int64_t T,
                                  int64_t H, int64_t C, int64_t N, int threads) {
    threads = worth(T * H * C * N, threads);
    const int64_t tile = 256, tiles = (N + tile - 1) / tile;  // products of one token and one tile stay in a cache
    parallel(T * tiles, threads, [&](int64_t part) {
        const int64_t t = part / tiles, n0 = part % tiles * tile, n1 = std::min(N, n0 + tile);
        std::vector<float> product(H * (n1 - n0));
        std::vector<const float*> from(H);
        std::vector<float*> to(H);
        for (int64_t h = 0; h < H; ++h) from[h] = q + (t * H + h) * C, to[h] = product.data() + h * (n1 - n0) - n0;
        dot_block(from.data(), keys + n0 * C, to.data(), H, n0, n1, C);
        float* out = score + t * N + n0;
        std::fill(out, out + (n1 - n0), 0.0f);
        for (int64_t h = 0; h < H; ++h) {
            const float w = weight[t * H + h], *p = product.data() + h * (n1 - n0);
            for (int64_t n = 0; n < n1 - n0; ++n) out[n] += w * std::max(p[n], 0.0f);
        }
    });
}

// The lightning indexer: the best rows of a paged cache for each token; and scores of rows given as floats.
#include <limits>
#include <vector>

#include "best.h"
#include "indexer.h"

using namespace indexer;

namespace {

constexpr int64_t QUERIES = 16;  // of one span, for which a page is unpacked once

struct Tile {
    int64_t span, first, last, rows;  // tokens, and how many rows the one that sees most sees
};

// The best of rows low .. high (low begins a page) of a span for some of its queries.
void search(const Keys& keys, const int64_t* pages, const Query* queries, Best* best, int64_t count, int64_t low,
            int64_t high, int64_t H) {
    Scratch scratch;
    const Page page{scratch.take<uint8_t>(PAGE * keys.G * GROUP), scratch.take<float>(PAGE * keys.G)};
    const bool whole = std::all_of(queries, queries + count, [](const Query& q) { return q.whole; });
    float* wide = whole ? nullptr : scratch.take<float>(PAGE * keys.G * GROUP);
    for (int64_t row = low; row < high; row += PAGE) {
        Ahead ahead;
        if (row + PAGE < high) {
            ahead = {keys.codes + pages[row / PAGE + 1] * PAGE * keys.code_bytes, PAGE * keys.code_bytes};
            const uint8_t* scales = keys.scales + pages[row / PAGE + 1] * PAGE * keys.scale_bytes;
            for (int64_t i = 0; i < PAGE * keys.scale_bytes; i += 64) __builtin_prefetch(scales + i);
        }
        unpack(keys, pages[row / PAGE], page);
        if (!whole) widen(page, keys.G, wide);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t rows = std::min(queries[i].limit, high) - row;
            if (rows <= 0) continue;
            const int64_t blocks = std::min(BLOCKS, (rows + LANES - 1) / LANES);
            F16 score[BLOCKS];
            score_page(page, wide, queries[i], blocks, H, keys.G, ahead, score);
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t left = rows - b * LANES;
                best[i].add(score[b], row + b * LANES, first_lanes(left));
            }
        }
    }
}

}  // namespace

// The K best of rows 0 .. visible - 1 (N at most) of each token's span: score [T, K], index [T, K] ascending, -1 where
// there are fewer.  q [T, H, C] with C a multiple of 32; codes and scales of a pool's rows; table [B, P] the pages of
// each span; layout [B, 2] the tokens of each.
EXPORT void pyrosome_index_topk(const float* q, const uint8_t* codes, const uint8_t* scales, int64_t code_bytes,
                                int64_t scale_bytes, const int64_t* table, int64_t P, const float* weight,
                                const int64_t* visible, const int64_t* layout, int64_t B, int64_t H, int64_t C,
                                int64_t N, int64_t K, float* score, int64_t* index, int threads) {
    const Keys keys{codes, scales, code_bytes, scale_bytes, C / GROUP};
    const auto limit = [&](int64_t t) { return std::max<int64_t>(0, std::min(visible[t], N)); };
    std::vector<Tile> tiles;
    int64_t most = 0, all = 0;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t t = layout[2 * b]; t < layout[2 * b + 1]; t += QUERIES) {
            Tile tile{b, t, std::min(t + QUERIES, layout[2 * b + 1]), 0};
            for (int64_t i = tile.first; i < tile.last; ++i) tile.rows = std::max(tile.rows, limit(i)), all += limit(i);
            most = std::max(most, tile.rows);
            tiles.push_back(tile);
        }
    threads = worth(2 * all * H * C, threads);
    const int64_t count = static_cast<int64_t>(tiles.size());
    // Few tiles are cut into ranges of rows, so that every thread has some.
    int64_t ranges = threads > 1 && count < 2 * threads ? (2 * threads + count - 1) / std::max<int64_t>(count, 1) : 1;
    ranges = std::max<int64_t>(1, std::min(ranges, (most + PAGE - 1) / PAGE));
    Scratch scratch;
    const int64_t parts = count * ranges, places = ranges > 1 ? parts * QUERIES : 0;
    auto* order = scratch.take<int32_t>(places * K);
    auto* row = scratch.take<int32_t>(places * K);
    auto* found = scratch.take<int64_t>(places);
    parallel(parts, threads, [&](int64_t part) {
        const Tile& tile = tiles[part / ranges];
        const int64_t pages = (tile.rows + PAGE - 1) / PAGE, r = part % ranges;
        const int64_t low = pages * r / ranges * PAGE, high = std::min(tile.rows, pages * (r + 1) / ranges * PAGE);
        Scratch own;
        std::vector<Query> queries;
        std::vector<Best> best;
        for (int64_t t = tile.first; t < tile.last; ++t) {
            queries.push_back(prepare(q + t * H * C, weight + t * H, H, keys.G, limit(t), own));
            best.emplace_back(K, Best::room_for(K, std::max<int64_t>(high - low, 0)), own);
        }
        search(keys, table + tile.span * P, queries.data(), best.data(), tile.last - tile.first, low, high, H);
        for (int64_t t = tile.first; t < tile.last; ++t) {
            Best& b = best[t - tile.first];
            b.choose();
            if (ranges == 1) {
                b.write(score + t * K, index + t * K);
                continue;
            }
            const int64_t place = part * QUERIES + t - tile.first;
            found[place] = b.count;
            std::copy(b.order, b.order + b.count, order + place * K);
            std::copy(b.row, b.row + b.count, row + place * K);
        }
    });
    if (ranges == 1) return;
    parallel(count * QUERIES, threads, [&](int64_t i) {
        const Tile& tile = tiles[i / QUERIES];
        const int64_t t = tile.first + i % QUERIES;
        if (t >= tile.last) return;
        Scratch own;
        Best merged(K, ranges * K, own);
        for (int64_t r = 0; r < ranges; ++r) {
            const int64_t place = (i / QUERIES * ranges + r) * QUERIES + i % QUERIES;
            std::copy(order + place * K, order + place * K + found[place], merged.order + merged.count);
            std::copy(row + place * K, row + place * K + found[place], merged.row + merged.count);
            merged.count += found[place];
        }
        merged.choose();
        merged.write(score + t * K, index + t * K);
    });
}

// score [T, N] of every key for every token: q [T, H, C], keys [N, C], weight [T, H].
EXPORT void pyrosome_index_scores(const float* q, const float* keys, const float* weight, float* score, int64_t T,
                                  int64_t H, int64_t C, int64_t N, int threads) {
    threads = worth(T * H * C * N, threads);
    const int64_t tile = 256, tiles = (N + tile - 1) / tile;  // products of one token and one tile stay in a cache
    parallel(T * tiles, threads, [&](int64_t part) {
        const int64_t t = part / tiles, n0 = part % tiles * tile, n1 = std::min(N, n0 + tile), count = n1 - n0;
        Scratch scratch;
        auto* product = scratch.take<float>(H * count);
        auto** from = scratch.take<const float*>(H);
        auto** to = scratch.take<float*>(H);
        for (int64_t h = 0; h < H; ++h) from[h] = q + (t * H + h) * C, to[h] = product + h * count - n0;
        dot_block(from, keys + n0 * C, to, H, n0, n1, C);
        float* out = score + t * N + n0;
        for (int64_t n = 0; n < count; n += LANES) {
            F16 sum = zero();
            for (int64_t h = 0; h < H; ++h)
                sum = fma(relu(load_part(product + h * count + n, count - n)), set1(weight[t * H + h]), sum);
            store_part(out + n, sum, count - n);
        }
    });
}

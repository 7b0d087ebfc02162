// The lightning indexer: the best rows of a paged cache for each token; and scores of rows given as floats.
#include <limits>
#include <vector>

#include "indexer.h"

using namespace indexer;

namespace {

constexpr int64_t QUERIES = 16;  // of one span, for which a page is unpacked once
constexpr int32_t LEAST = std::numeric_limits<int32_t>::min();

// Integers that order as scores do: -0 is 0, and NaN is above all, so that a fault upstream shows.
LANE I16 order_of(F16 score) {
    I16 bits = as_int(score + zero());
    bits = select(greater(bits & iset1(0x7FFFFFFF), iset1(0x7F800000)), iset1(0x7FC00000), bits);
    return select(greater(iset1(0), bits), bits ^ iset1(0x7FFFFFFF), bits);
}

float score_of(int32_t order) {
    const int32_t bits = order < 0 ? order ^ 0x7FFFFFFF : order;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Rows in ascending order that may be among the K best.  What is not above the K-th best so far is left out: it comes
// later, so with an equal score it loses, as the lowest index wins.
struct Best {
    int32_t *order, *row;
    int64_t K, room, count = 0;
    int32_t least = LEAST;  // a row must be above it

    static int64_t room_for(int64_t K, int64_t rows) { return std::min(K + std::max<int64_t>(K, 1024), rows) + LANES; }
    Best(int64_t K, int64_t room, Scratch& scratch)
        : order(scratch.take<int32_t>(room)), row(scratch.take<int32_t>(room)), K(K), room(room) {}

    void add(F16 score, int64_t first_row, uint32_t counts) {
        const I16 orders = order_of(score);
        uint32_t kept = bits_of(greater(orders, iset1(least))) & counts;
        if (!kept) return;
#if PYROSOME_LEVEL == 2
        const __m512i rows = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first_row)),
                                              _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        const auto mask = static_cast<__mmask16>(kept);
        _mm512_storeu_si512(order + count, _mm512_maskz_compress_epi32(mask, orders.v));
        _mm512_storeu_si512(row + count, _mm512_maskz_compress_epi32(mask, rows));
        count += __builtin_popcount(kept);
#else
        int32_t lane[LANES];
        istore(lane, orders);
        for (; kept; kept &= kept - 1) {
            const int i = __builtin_ctz(kept);
            order[count] = lane[i], row[count++] = static_cast<int32_t>(first_row + i);
        }
#endif
        if (count + LANES > room) choose();
    }

    // Leaves the K best, in ascending order of rows.
    void choose() {
        if (count <= K) return;
        Scratch scratch;
        auto* rank = scratch.take<int64_t>(count);  // all different: the K-th is one row
        const auto rank_of = [&](int64_t i) { return static_cast<int64_t>(order[i]) * (int64_t{1} << 32) - row[i]; };
        for (int64_t i = 0; i < count; ++i) rank[i] = rank_of(i);
        std::nth_element(rank, rank + K - 1, rank + count, std::greater<int64_t>());
        const int64_t last = rank[K - 1];
        int64_t n = 0;
        for (int64_t i = 0; i < count; ++i)
            if (rank_of(i) >= last) order[n] = order[i], row[n++] = row[i];
        count = n;
        least = static_cast<int32_t>((last + std::numeric_limits<int32_t>::max()) >> 32);
    }

    void write(float* score, int64_t* index) const {
        for (int64_t k = 0; k < K; ++k) {
            score[k] = k < count ? score_of(order[k]) : -std::numeric_limits<float>::infinity();
            index[k] = k < count ? row[k] : -1;
        }
    }
};

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
                best[i].add(score[b], row + b * LANES, left >= LANES ? 0xFFFFu : (1u << left) - 1);
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

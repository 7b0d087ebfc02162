// The lightning indexer: the best rows of a paged cache for each token; and scores of rows given as floats.
#include <limits>
#include <vector>

#include "indexer.h"

using namespace indexer;

namespace {

constexpr int64_t QUERIES = 16;  // of one span, for which a page is unpacked once
constexpr int32_t LEAST = std::numeric_limits<int32_t>::min();

float score_of(int32_t order) {
    const int32_t bits = order ^ (order >> 31 & 0x7FFFFFFF);  // no branch: signs are anything
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Stores the lanes of v whose bits are in `kept`, one after the other, and gives the place behind them; up to LANES places
// are written.
LANE int32_t* put(int32_t* to, I16 v, uint32_t kept) {
#if PYROSOME_LEVEL == 2
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), v.v));
    return to + __builtin_popcount(kept);
#else
    int32_t lane[LANES];
    istore(lane, v);
    for (; kept; kept &= kept - 1) *to++ = lane[__builtin_ctz(kept)];
    return to;
#endif
}

LANE uint32_t first_lanes(int64_t n) { return n >= LANES ? 0xFFFFu : (1u << n) - 1; }

// The K greatest of some numbers are those above `value` and `ties` of those that equal it.
struct Edge {
    int32_t value;
    int64_t ties;
};

// Halves the range of what is undecided until that is one value, or as many as are wanted; 0 < K < count.  Behind `order`
// are LANES numbers below all others.
Edge edge_of(const int32_t* order, int64_t count, int64_t K) {
    const I16 highest = iset1(std::numeric_limits<int32_t>::max()), lowest = iset1(LEAST);
    I16 least = highest, most = lowest;
    for (int64_t i = 0; i < count; i += LANES) {
        const I16 v = iload(order + i);
        least = min(least, select(greater(v, lowest), v, highest)), most = max(most, v);
    }
    int64_t low = least_of(least), high = most_of(most);
    Scratch scratch;
    auto* left = scratch.take<int32_t>(count + LANES);
    while (low < high) {
        const auto middle = static_cast<int32_t>((low + high) >> 1);
        int64_t above = 0;
        for (int64_t i = 0; i < count; i += LANES)
            above += __builtin_popcount(bits_of(greater(iload(order + i), iset1(middle))));
        if (above == K) return {middle, 0};
        int32_t* to = left;
        if (above > K) {
            least = highest;
            for (int64_t i = 0; i < count; i += LANES) {
                const I16 v = iload(order + i);
                const Mask m = greater(v, iset1(middle));
                least = min(least, select(m, v, highest));
                to = put(to, v, bits_of(m));
            }
            low = least_of(least), count = above;
        } else {
            most = lowest;
            for (int64_t i = 0; i < count; i += LANES) {
                const I16 v = iload(order + i);
                const Mask m = greater(v, iset1(middle));
                most = max(most, select(m, lowest, v));
                to = put(to, v, ~bits_of(m) & 0xFFFFu);
            }
            high = most_of(most), count -= above, K -= above;
        }
        istore(left + count, lowest);
        order = left;
    }
    return {static_cast<int32_t>(low), K};
}

// Rows in ascending order that may be among the K best.  What is not above the K-th best so far is left out: it comes
// later, so with an equal score it loses, as the lowest index wins.
struct Best {
    int32_t *order, *row;
    int64_t K, room, count = 0;
    int32_t least = LEAST;  // a row must be above it

    static int64_t room_for(int64_t K, int64_t rows) { return std::min(K + std::max<int64_t>(K, 1024), rows) + LANES; }
    Best(int64_t K, int64_t room, Scratch& scratch)
        : order(scratch.take<int32_t>(room + LANES)), row(scratch.take<int32_t>(room + LANES)), K(K), room(room) {}

    void add(F16 score, int64_t first_row, uint32_t counts) {
        alignas(64) static const int32_t lane[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const I16 orders = order_of(score);
        const uint32_t kept = bits_of(greater(orders, iset1(least))) & counts;
        if (!kept) return;
        put(row + count, iset1(static_cast<int32_t>(first_row)) + iload(lane), kept);
        count = put(order + count, orders, kept) - order;
        if (count + LANES > room) choose();
    }

    // Leaves the K best, in ascending order of rows.
    void choose() {
        if (count <= K) return;
        istore(order + count, iset1(LEAST));
        const Edge edge = edge_of(order, count, K);
        const I16 value = iset1(edge.value);
        int32_t *to = order, *row_to = row;
        int64_t ties = edge.ties;
        for (int64_t i = 0; i < count; i += LANES) {
            const I16 orders = iload(order + i), rows = iload(row + i);
            uint32_t kept = bits_of(greater(orders, value));
            uint32_t equal = ties ? ~(kept | bits_of(greater(value, orders))) & 0xFFFFu : 0;
            for (; equal && ties; equal &= equal - 1, --ties) kept |= equal & -equal;
            to = put(to, orders, kept), row_to = put(row_to, rows, kept);  // never past what was read
        }
        count = K, least = edge.value;
    }

    void write(float* score, int64_t* index) const {
        for (int64_t k = 0; k < count; ++k) score[k] = score_of(order[k]), index[k] = row[k];
        std::fill(score + count, score + K, -std::numeric_limits<float>::infinity());
        std::fill(index + count, index + K, static_cast<int64_t>(-1));
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

// The best rows of many, by score, then by lowest row.
#pragma once
#include <limits>

#include "../native.h"

namespace indexer {

constexpr int32_t LEAST = std::numeric_limits<int32_t>::min();

inline float score_of(int32_t order) {
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
inline Edge edge_of(const int32_t* order, int64_t count, int64_t K) {
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

}  // namespace indexer

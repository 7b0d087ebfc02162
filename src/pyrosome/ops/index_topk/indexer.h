// What the two halves of the lightning indexer share: scores of a page's rows, and the best of them.
#pragma once
#include "../native.h"

namespace indexer {

constexpr int64_t PAGE = 64, BLOCKS = PAGE / LANES;  // rows of a page, and how many times the lanes hold as many
constexpr int64_t GROUP = 32, FOURS = 8;             // channels that share a scale; a lane holds four at a time

// A pool of FP4 rows (quant/rows.py).
struct Keys {
    const uint8_t *codes, *scales;       // of the first row of the pool
    int64_t code_bytes, scale_bytes, G;  // of a row; groups
};

// A page as lanes.  Group g of block b has eight vectors of four channels at codes + (b G + g) 512: of each four bytes
// of a row the even channels, then the odd ones, as 12 + twice the value.  Scales are halved for that.
struct Page {
    uint8_t* codes;
    float* scales;  // [block, group, lane]
};

// Memory that is wanted soon, asked for a little at a time: pages are anywhere, so nothing else would fetch the next
// one ahead, and many requests at once would wait for each other.
struct Ahead {
    const uint8_t* next = nullptr;
    int64_t bytes = 0, lines = 1;  // left, and how many to ask for at a time
    LANE void fetch() {
        for (int64_t i = 0; i < lines && bytes > 0; ++i, next += 64, bytes -= 64) __builtin_prefetch(next);
    }
};

// A token's heads and their weights.
struct Query {
    bool whole;      // codes below are the query, exactly
    bool even;       // so, and each head has one scale, which its weight holds too
    int32_t* codes;  // [heads / 4, group, four of channels, 4 heads]: four signed bytes each, in the order of a Page
    int32_t* start;  // [heads / 4, group, 4 heads]: what takes the 12 of the keys' bytes away again
    float* scale;    // [heads / 4, group, 4 heads]: codes times scale are the query
    float* values;   // of a query that is not whole: [heads / 4, channel in the order of a Page, 4 heads]
    float* weight;   // [heads]
    int64_t limit;   // rows that count
};

// Puts a page's rows into lanes.
void unpack(const Keys& keys, int64_t page, const Page& out);
// Twice the keys' values, as floats: [block, channel in the order of a Page, lane].
void widen(const Page& page, int64_t G, float* out);
// Of a token's q [H, C] and weight [H]; it lives as long as the scratch memory.
Query prepare(const float* q, const float* weight, int64_t H, int64_t G, int64_t limit, Scratch& scratch);
// Scores of the first `blocks` blocks of a page; `wide` is what `widen` made, for a query that is not whole.
void score_page(const Page& page, const float* wide, const Query& q, int64_t blocks, int64_t H, int64_t G, Ahead& ahead,
                F16* score);

LANE F16 relu(F16 x) { return max(zero(), x); }  // this order keeps NaN

}  // namespace indexer

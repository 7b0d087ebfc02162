// Attention over rows that bfloat16 holds exactly: products of bfloat16 pairs, a running softmax over splits of 128 keys
// in order, the sink, and the rotation back, in one pass.
//
// Queries are rounded to bfloat16, and so are the softmax's weights and the result, as the official kernel does.  Scores have heads
// across lanes (one row serves all of them), outputs have channels.  Neighbouring tokens of a span whose keys are the same,
// or the same moved on by one, share their rows too: what a token does not see weighs nothing, which changes no bit.
#include <limits>

#include "../pairs.h"
#include "../rows.h"

namespace {

constexpr int64_t SPLIT = 128;
constexpr int64_t PAGE_ROWS = 64;
constexpr int64_t AHEAD = 4;  // rows asked for before they are read
constexpr int64_t BLOCK = 64;  // channels
constexpr int64_t TOKENS = 8, SHARING = 128;  // tokens that share rows, and their heads in all, at most
constexpr int64_t KEYS = SPLIT + TOKENS - 1;  // of a split that they share
constexpr int64_t PAIRS = (KEYS + 31) / 32 * 16;
constexpr int64_t SEGMENT = 64;  // pairs of channels whose products are summed before they are added to a score

// Where one part of the keys is read, and which: index [T, K], -1 for none.
struct Source {
    int64_t kind;        // 0: pages; 1: the ring of each span, and after them this step's own rows
    int64_t nope;        // channels in e4m3; 0: rows are bfloat16
    const uint8_t* data;
    const uint8_t* scale;
    int64_t data_bytes, scale_bytes;  // of a row
    const int64_t* table;  // pages: [spans, width]
    int64_t width;
    const int64_t* span;   // pages: of each token
    const int64_t* slot;   // ring: of each span
    int64_t ring_rows, spans;
    const float* fresh;    // ring: this step's rows [T, C]
    const int64_t* index;
    int64_t K;

    // Where row i of token t is in the cache; -1 where it is not there.
    int64_t place_of(int64_t t, int64_t i) const {
        if (kind == 0) return table[span[t] * width + i / PAGE_ROWS] * PAGE_ROWS + i % PAGE_ROWS;
        const int64_t at = i - 1;  // 0 stands for nothing
        if (at < 0 || at >= spans * ring_rows) return -1;
        const auto short_at = static_cast<uint32_t>(at), rows = static_cast<uint32_t>(ring_rows);  // quicker to divide
        return slot[short_at / rows] * ring_rows + short_at % rows;
    }

    // Asks memory for a row that will be read (near: soon), as chosen rows lie anywhere.
    template <bool NEAR>
    void ask(int64_t t, int64_t i) const {
        const int64_t place = i < 0 ? -1 : place_of(t, i);
        if (place < 0) return;
        for (int64_t at = 0; at < data_bytes; at += 64) __builtin_prefetch(data + place * data_bytes + at, 0, NEAR ? 3 : 2);
        __builtin_prefetch(scale + place * scale_bytes, 0, NEAR ? 3 : 2);
    }

    void read(int64_t t, int64_t i, int64_t C, uint16_t* out) const {
        const int64_t place = place_of(t, i);
        if (place < 0) {
            if (i == 0) return std::fill_n(out, C, static_cast<uint16_t>(0)), void();
            const float* row = fresh + (i - 1 - spans * ring_rows) * C;
            for (int64_t c = 0; c < C; ++c) {
                uint32_t bits;
                std::memcpy(&bits, row + c, sizeof bits);
                out[c] = static_cast<uint16_t>(bits >> 16);
            }
            return;
        }
        decode_row(data + place * data_bytes, scale + place * scale_bytes, nope, C, out);
    }
};

// Tokens t0 .. t0 + tokens - 1 with heads h0 .. h0 + heads - 1 of each: a lane for each head of each token.
struct Group {
    int64_t t0, tokens, h0, heads;
    int64_t lanes() const { return (tokens * heads + LANES - 1) / LANES * LANES; }
};

// Keys that the tokens of a group read together: token g sees places first[g] .. last[g] of the list.
struct List {
    int64_t* index;  // -1 for none
    int64_t count = 0;
    int64_t first[TOKENS], last[TOKENS];
    int64_t split;   // as many as are one split of each token
    bool sees(int64_t g, int64_t place) const { return place >= first[g] && place < last[g]; }
};

// Rows of the next split, asked for a few at a time while this one is computed.
struct Ahead {
    const Source* source;
    int64_t t;
    const int64_t *index, *end;
    void ask(int64_t rows) {
        for (; rows-- && index < end; ++index) source->ask<false>(t, *index);
    }
};

struct Work {
    int64_t H, C, F;
    int64_t W;  // C rounded up to a multiple of 32, zeros past C
    float scale;
    const Source* source;
    int64_t parts;
    const float* sink;

    // What a group is computed in.
    struct State {
        uint32_t* query;   // [pair of channels][lane]
        uint16_t* rows;    // [key][channel]
        int64_t* place;    // of each key in a list
        uint32_t* values;  // [pair of keys][channel], of a block of channels
        float* score;      // [key][lane]
        uint32_t* weight;  // [pair of keys][lane], then turned: [lane][pair of keys]
        uint32_t* turned;
        float *o, *top, *mass;  // [lane][channel], [lane], [lane]
    };

    void run(const Group& group, const float* q, const float* turn, float* out) const {
        Scratch scratch;
        const int64_t lanes = group.lanes(), words = W / 2;
        State s;
        s.query = scratch.take<uint32_t>(words * lanes);
        s.rows = scratch.take<uint16_t>((KEYS + 1) * W), s.place = scratch.take<int64_t>(KEYS);
        s.values = scratch.take<uint32_t>(PAIRS * BLOCK), s.score = scratch.take<float>(KEYS * lanes);
        s.weight = scratch.take<uint32_t>(PAIRS * lanes), s.turned = scratch.take<uint32_t>(PAIRS * lanes);
        s.o = scratch.take<float>(lanes * W), s.top = scratch.take<float>(lanes), s.mass = scratch.take<float>(lanes);
        std::fill(s.top, s.top + lanes, -std::numeric_limits<float>::infinity());
        std::fill(s.mass, s.mass + lanes, 0.0f);
        load_query(group, q, s.query, s.o);
        std::fill(s.o, s.o + lanes * W, 0.0f);
        if (W > C) std::fill(s.rows, s.rows + (KEYS + 1) * W, static_cast<uint16_t>(0));
        for (int64_t p = 0; p < parts; ++p) {
            Scratch own;
            List list;
            if (group.tokens > 1 && shared(source[p], group, s.rows, list, own)) {
                together(source[p], group, list, s);
            } else {
                for (int64_t g = 0; g < group.tokens; ++g) alone(source[p], group, g, s);
            }
        }
        finish(group, s, turn, out);
    }

    // Whether the tokens of a group may read a source together, and what: lists that are the same, each moved on by one,
    // or the beginning of the last one.  `row` is room for one.
    bool shared(const Source& source, const Group& group, uint16_t* row, List& list, Scratch& scratch) const {
        const int64_t K = source.K, n = group.tokens, *index = source.index + group.t0 * K;
        if (source.kind == 0)
            for (int64_t g = 1; g < n; ++g)
                if (source.span[group.t0 + g] != source.span[group.t0]) return false;
        list.index = scratch.take<int64_t>(K + n);
        bool moves = K <= SPLIT && K > 1, stays = K > 0;
        for (int64_t g = 1; g < n && moves; ++g) moves = std::equal(index + g * K, index + (g + 1) * K - 1, index + (g - 1) * K + 1);
        if (moves) {
            std::copy(index, index + K, list.index);
            for (int64_t g = 1; g < n; ++g) list.index[K + g - 1] = index[(g + 1) * K - 1];
            for (int64_t g = 0; g < n; ++g) list.first[g] = g, list.last[g] = g + K;
            list.count = list.split = K + n - 1;
        } else {
            const int64_t* longest = index + (n - 1) * K;
            for (int64_t g = 0; g < n && stays; ++g) {
                const int64_t* end = std::find_if(index + g * K, index + (g + 1) * K, [](int64_t i) { return i < 0; });
                list.first[g] = 0, list.last[g] = end - (index + g * K);
                stays = std::all_of(end, index + (g + 1) * K, [](int64_t i) { return i < 0; }) &&
                        std::equal(index + g * K, end, longest);
            }
            if (!stays) return false;
            std::copy(longest, longest + K, list.index);
            list.count = list.last[n - 1], list.split = SPLIT;
        }
        // A weight of zero takes away every row but one that is not finite.
        const int64_t from = *std::max_element(list.first, list.first + n), to = *std::min_element(list.last, list.last + n);
        for (int64_t j = 0; j < list.count; ++j) {
            if ((j >= from && j < to) || list.index[j] < 0) continue;
            source.read(group.t0, list.index[j], C, row);
            if (std::any_of(row, row + C, [](uint16_t v) { return (v & 0x7F80) == 0x7F80; })) return false;
        }
        return true;
    }

    void together(const Source& source, const Group& group, const List& list, const State& s) const {
        for (int64_t j0 = 0; j0 < list.count; j0 += list.split) {
            int64_t n = 0;
            for (int64_t j = j0; j < std::min(list.count, j0 + list.split); ++j) {
                if (list.index[j] < 0) continue;
                source.read(group.t0, list.index[j], C, s.rows + n * W);
                s.place[n++] = j;
            }
            Ahead none{};
            if (n) fold_in(group, 0, group.tokens, n, &list, none, s);
        }
    }

    void alone(const Source& source, const Group& group, int64_t g, const State& s) const {
        const int64_t t = group.t0 + g, K = source.K, *index = source.index + t * K;
        for (int64_t k0 = 0; k0 < K; k0 += SPLIT) {
            int64_t n = 0;
            for (int64_t k = k0; k < std::min(K, k0 + SPLIT); ++k) {
                if (k + AHEAD < K) source.ask<true>(t, index[k + AHEAD]);
                if (index[k] >= 0) source.read(t, index[k], C, s.rows + n++ * W);
            }
            Ahead next{&source, t, index + std::min(K, k0 + SPLIT), index + std::min(K, k0 + 2 * SPLIT)};
            if (n) fold_in(group, g, g + 1, n, nullptr, next, s);
        }
    }

    // The n keys in s.rows, for tokens g0 .. g1 of a group: all of them, or of a list what each sees.
    void fold_in(const Group& group, int64_t g0, int64_t g1, int64_t n, const List* list, Ahead& next, const State& s) const {
        const int64_t lanes = group.lanes(), heads = group.heads, words = W / 2;
        const int64_t l0 = g0 * heads, l1 = g1 * heads;
        const int64_t s0 = l0 / LANES * LANES, strips = (l1 - s0 + LANES - 1) / LANES;  // whole strips that have them
        for (int64_t k = 0; k < n; ++k) std::fill_n(s.score + k * lanes + s0, strips * LANES, 0.0f);
        const int64_t turns = (words + SEGMENT - 1) / SEGMENT + (W + BLOCK - 1) / BLOCK, each = (SPLIT + turns - 1) / turns;
        for (int64_t w = 0; w < words; w += SEGMENT) {  // the queries of a segment stay in a core's first cache
            next.ask(each);
            multiply_pairs(reinterpret_cast<const uint32_t*>(s.rows) + w, words, s.query + w * lanes + s0, lanes,
                           std::min(SEGMENT, words - w), s.score + s0, lanes, n, strips);
        }
        if (list)
            for (int64_t g = g0; g < g1; ++g)
                for (int64_t k = 0; k < n; ++k)
                    if (!list->sees(g, s.place[k]))
                        std::fill_n(s.score + k * lanes + g * heads, heads, -std::numeric_limits<float>::infinity());
        const int64_t pairs = (n + 1) / 2;
        for (int64_t l = s0; l < l1; l += LANES) {
            softmax(n, lanes, l, std::max<int64_t>(0, l0 - l), std::min<int64_t>(LANES, l1 - l), s);
            for (int64_t i = 0; i < pairs; i += 16) transpose(s.weight + i * lanes + l, lanes, s.turned + l * PAIRS + i, PAIRS);
        }
        if (n % 2) std::fill_n(s.rows + n * W, W, static_cast<uint16_t>(0));
        for (int64_t c = 0; c < W; c += BLOCK) {
            next.ask(each);
            const int64_t block = std::min(BLOCK, W - c);
            for (int64_t i = 0; i < pairs; ++i)
                interleave(s.rows + 2 * i * W + c, s.rows + (2 * i + 1) * W + c, block, s.values + i * block);
            multiply_pairs(s.turned + l0 * PAIRS, PAIRS, s.values, block, pairs, s.o + l0 * W + c, W, l1 - l0, block / LANES);
        }
    }

    // Queries as pairs with heads across lanes; `spare` holds a row for each lane meanwhile.
    void load_query(const Group& group, const float* q, uint32_t* query, float* spare) const {
        const int64_t words = W / 2, lanes = group.lanes(), heads = group.heads;
        auto* pairs = reinterpret_cast<uint32_t*>(spare);  // [lane][pair], as the rows have them: the earlier one low
        std::fill(pairs, pairs + lanes * words, 0u);
        for (int64_t l = 0; l < group.tokens * heads; ++l) {
            const float* row = q + ((group.t0 + l / heads) * H + group.h0 + l % heads) * C;
            for (int64_t c = 0; c < C; c += 2 * LANES)
                narrow(load_part(row + c, C - c), C - c > LANES ? load_part(row + c + LANES, C - c - LANES) : zero(),
                       pairs + l * words + c / 2);
        }
        for (int64_t l = 0; l < lanes; l += 16)
            for (int64_t w = 0; w < words; w += 16) transpose(pairs + l * words + w, words, query + w * lanes + l, lanes);
    }

    // Scores of n keys, of the strip at lane l, to weights e^(score - top) as pairs of keys, with a new running maximum:
    // what was summed so far is scaled down to it.  Nothing is kept for lanes outside a .. b of the strip.
    void softmax(int64_t n, int64_t lanes, int64_t l, int64_t a, int64_t b, const State& s) const {
        const F16 times = set1(scale), before = load(s.top + l);
        F16 high = before;
        for (int64_t k = 0; k < n; ++k) {
            const F16 x = load(s.score + k * lanes + l) * times;
            store(s.score + k * lanes + l, x);
            high = max(high, x);
        }
        const F16 base = max(set1(-std::numeric_limits<float>::max()), high);  // a lane may see none of these keys
        const F16 keep = exp(before - base);
        F16 sum = zero();
        for (int64_t k = 0; k < n; k += 2) {
            const F16 first = exp(load(s.score + k * lanes + l) - base);
            const F16 second = k + 1 < n ? exp(load(s.score + (k + 1) * lanes + l) - base) : zero();
            sum = sum + first;
            sum = sum + second;
            istore(s.weight + k / 2 * lanes + l, round_weight(first) | shr<16>(round_weight(second)));
        }
        for (int64_t i = (n + 1) / 2; i < (n + 31) / 32 * 16; ++i) istore(s.weight + i * lanes + l, iset1(0));
        float factor[16], mass[16], top[16];
        store(factor, keep), store(mass, fma(load(s.mass + l), keep, sum)), store(top, high);
        for (int64_t i = a; i < b; ++i) {
            float* o = s.o + (l + i) * W;
            const bool begun = s.mass[l + i] > 0;  // else there is nothing to scale
            s.mass[l + i] = mass[i], s.top[l + i] = top[i];
            if (factor[i] != 1.0f && begun)
                for (int64_t c = 0; c < W; c += LANES) store(o + c, load(o + c) * set1(factor[i]));
        }
    }

    void finish(const Group& group, const State& s, const float* turn, float* out) const {
        for (int64_t l = 0; l < group.tokens * group.heads; ++l) {
            const int64_t t = group.t0 + l / group.heads, h = group.h0 + l % group.heads;
            const float mass = s.mass[l], top = s.top[l], high = std::max(top, sink[h]);
            const float share = mass > 0 ? exp1(top - high) : 0.0f;
            const float total = mass * share + exp1(sink[h] - high);
            const F16 factor = set1(mass > 0 ? share / total : mass == mass ? 0.0f : mass);
            float *o = s.o + l * W, *to = out + (t * H + h) * C;
            const int64_t plain = (C - 2 * F) / LANES * LANES;
            for (int64_t c = plain; c < C; c += LANES) store(o + c, load(o + c) * factor);
            turn_pairs(o + C - 2 * F, turn + t * F * 2, F, -1.0f);
            for (int64_t c = 0; c < C; c += LANES) {
                const F16 v = load(o + c);
                store_part(to + c, as_float(round_bf16(c < plain ? v * factor : v)), C - c);
            }
        }
    }
};

}  // namespace

// q [T, H, C] -> out [T, H, C]: attention over the parts.
EXPORT void pyrosome_attention(const float* q, const Source* source, int64_t parts, const float* sink, const float* turn,
                               float* out, int64_t T, int64_t H, int64_t C, int64_t F, float scale, int threads) {
    int64_t keys = 0;
    for (int64_t p = 0; p < parts; ++p) keys += source[p].K;
    threads = worth(2 * T * H * C * keys, threads);
    // A token's heads stay together, as they share its rows, unless there are threads to spare.
    const int64_t heads = std::min<int64_t>(H, H <= 32 || T < threads ? 32 : 64), blocks = (H + heads - 1) / heads;
    const int64_t tokens = std::max<int64_t>(1, std::min({TOKENS, SHARING / heads, T * blocks / threads}));
    const Work work{H, C, F, (C + 31) / 32 * 32, scale, source, parts, sink};
    parallel((T + tokens - 1) / tokens * blocks, threads, [&](int64_t part) {
        const int64_t t0 = part / blocks * tokens, h0 = part % blocks * heads;
        work.run({t0, std::min(tokens, T - t0), h0, std::min(heads, H - h0)}, q, turn, out);
    });
}

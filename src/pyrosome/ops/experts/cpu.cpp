// Routed experts: the pairs (token, expert) sorted by expert, so that each expert's weights are read once.
#include "../tiles.h"

namespace {

// silu(min(gate, limit)) clamp(up, -limit, limit) weight, into gate.
void clamped_swiglu(float* gate, const float* up, int64_t count, float limit, float weight) {
    const F16 top = set1(limit), low = set1(-limit), times = set1(weight);
    for (int64_t i = 0; i < count; i += LANES) {
        const F16 a = min(top, load_part(gate + i, count - i)), b = max(low, min(top, load_part(up + i, count - i)));
        store_part(gate + i, a * sigmoid(a) * b * times, count - i);
    }
}

bool is_quantised(const Weight& w) { return w.format == FP4 || w.format == FP8; }

// Rows that an expert computes: from[i] of the inputs, to addresses y[i].
struct Rows {
    const float* const* plain;  // addresses, for plain weights
    const Inputs* inputs;       // for quantised ones
    const int32_t* index;
    int64_t count;
};

// y[i][0 .. n1 - n0) = outputs n0 .. n1 of one tile.
void product(const Weight& w, int64_t tile, const Rows& rows, float* const* y) {
    if (is_quantised(w)) return multiply_tile(w, tile, *rows.inputs, rows.index, rows.count, y);
    const int64_t n0 = tile * TILE;
    Scratch scratch;
    auto** at = scratch.take<float*>(rows.count);
    for (int64_t i = 0; i < rows.count; ++i) at[i] = y[i] - n0;
    dot_rows(rows.plain, w, at, rows.count, n0, std::min(w.N, n0 + TILE));
}

// Calls run(expert, p0, p1, tile, end) for every block of rows p0 .. p1 of every expert, and tiles of its N outputs,
// `together` at a time.
template <class F>
void each_tile(const int64_t* first, int64_t E, int64_t N, int64_t together, int threads, F run) {
    struct Block {
        int64_t expert, low, high;
    };
    Scratch scratch;
    auto* blocks = scratch.take<Block>(E + first[E] / ROW_BLOCK);
    int64_t count = 0;
    for (int64_t e = 0; e < E; ++e)
        for (int64_t p = first[e]; p < first[e + 1]; p += ROW_BLOCK) blocks[count++] = {e, p, std::min(p + ROW_BLOCK, first[e + 1])};
    const int64_t tiles = num_tiles(N), parts = (tiles + together - 1) / together;
    parallel(count * parts, threads, [&](int64_t part) {
        const Block& b = blocks[part / parts];
        const int64_t tile = part % parts * together;
        run(b.expert, b.low, b.high, tile, std::min(tile + together, tiles));
    });
}

constexpr int64_t SHARDS = 8;
constexpr int64_t ROWS_EACH = 128;  // rows that make little of reading and spreading an expert's weights

struct Term {  // a row [D] that a token's sum is made of
    const float* row;
    int64_t shard;
};

// out = the terms, in order, added to their shards, and the shards as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).  A
// shard's sum begins with 0, so it is never -0, and one without terms may be left out: x + 0 is x to the bit.
void tree_sum(const Term* terms, int64_t count, float* out, int64_t D) {
    constexpr int64_t BLOCK = 256;
    float sums[SHARDS][BLOCK];
    for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
        const int64_t n = std::min(BLOCK, D - d0);
        float* at[SHARDS] = {};
        for (int64_t i = 0; i < count; ++i) {
            const float* row = terms[i].row + d0;
            float *sum = sums[terms[i].shard], *&seen = at[terms[i].shard];
            if (seen)
                for (int64_t d = 0; d < n; ++d) sum[d] += row[d];
            else
                for (int64_t d = 0; d < n; ++d) sum[d] = 0.0f + row[d];
            seen = sum;
        }
        for (int64_t width = 1; width < SHARDS; width *= 2)
            for (int64_t s = 0; s < SHARDS; s += 2 * width) {
                float *left = at[s], *right = at[s + width];
                if (left && right)
                    for (int64_t d = 0; d < n; ++d) left[d] += right[d];
                else if (right)
                    at[s] = right;
            }
        if (at[0])
            std::copy(at[0], at[0] + n, out + d0);
        else
            std::fill(out + d0, out + d0 + n, 0.0f);
    }
}

// h [P, I] = swiglu of w1 and w3 times its weight, a row for each place of the plan; x [T, D], place p being of token
// order[p] / K (of p where `order` is null: every token visits expert 0 with weight 1).
void up(const float* x, int64_t T, const int64_t* order, int64_t K, const int64_t* first, int64_t E, const float* weight,
        const Weight& w1, const Weight& w3, float* h, float limit, int rounds, int threads) {
    const int64_t D = w1.K, I = w1.N, P = first[E];
    Scratch scratch;
    Inputs inputs{nullptr, T, !rounds};
    const bool quantised = is_quantised(w1) || is_quantised(w3);
    if (quantised) {
        inputs.data = scratch.take<char>(Inputs::bytes(T, D, !rounds));
        prepare_rows(x, D, T, D, rounds, inputs, threads);
    }
    auto* token = scratch.take<int32_t>(P);
    auto** from = scratch.take<const float*>(P);
    for (int64_t p = 0; p < P; ++p) {
        token[p] = static_cast<int32_t>(order ? order[p] / K : p);
        from[p] = x + token[p] * D;
    }
    // Few rows wait for their weights, which come at the memory's rate where they lie in order: some tiles of w1, then the
    // same of w3.
    const int64_t together = P <= 6 * E && num_tiles(I) >= 8 * threads ? 4 : 1;
    each_tile(first, E, I, together, threads, [&](int64_t e, int64_t at, int64_t end, int64_t tile, int64_t last) {
        const int64_t M = end - at, n0 = tile * TILE, wide = (last - tile) * TILE, N = std::min(wide, I - n0);
        Scratch own;
        auto* raised = own.take<float>(M * wide);
        float* to[ROW_BLOCK];
        const Rows rows{from + at, &inputs, token + at, M};
        const auto multiply = [&](const Weight& w, float* out, int64_t ld) {
            for (int64_t i = tile; i < last; ++i) {
                for (int64_t m = 0; m < M; ++m) to[m] = out + m * ld + (i - tile) * TILE;
                product(w, i, rows, to);
            }
        };
        float* gate = h + at * I + n0;
        multiply(w1.of(e), gate, I);
        multiply(w3.of(e), raised, wide);
        for (int64_t m = 0; m < M; ++m)
            clamped_swiglu(gate + m * I, raised + m * wide, N, limit, order ? weight[order[at + m]] : 1.0f);
    });
}

// rows [P, D] = w2 h, a row for each place of the plan.
void down(const float* h, const int64_t* first, int64_t E, const Weight& w2, float* rows, int rounds, int threads) {
    const int64_t D = w2.N, I = w2.K, P = first[E];
    Scratch scratch;
    Inputs inputs{nullptr, P, !rounds};
    if (is_quantised(w2)) {
        inputs.data = scratch.take<char>(Inputs::bytes(P, I, !rounds));
        prepare_rows(h, I, P, I, rounds, inputs, threads);
    }
    auto* place = scratch.take<int32_t>(P);
    auto** from = scratch.take<const float*>(P);
    for (int64_t p = 0; p < P; ++p) place[p] = static_cast<int32_t>(p), from[p] = h + p * I;
    each_tile(first, E, D, 1, threads, [&](int64_t e, int64_t at, int64_t end, int64_t tile, int64_t) {
        const int64_t M = end - at;
        float* to[ROW_BLOCK];
        for (int64_t m = 0; m < M; ++m) to[m] = rows + (at + m) * D + tile * TILE;
        product(w2.of(e), tile, {from + at, &inputs, place + at, M}, to);
    });
}

// Experts low .. low + E of `all`, as stacks, and how they are run.
struct Bank {
    const Weight *w1, *w3, *w2;
    int64_t low, E, all;
    float limit;
    int rounds, threads;
};

// Sorts the pairs of a bank's experts by expert, stable.  order [P] holds pairs, first [E + 1] each expert's first place
// in it.
void plan(const int64_t* expert, int64_t P, const Bank& bank, int64_t* order, int64_t* first) {
    const auto held = [&](int64_t p) { return expert[p] >= bank.low && expert[p] < bank.low + bank.E; };
    std::fill(first, first + bank.E + 1, 0);
    for (int64_t p = 0; p < P; ++p)
        if (held(p)) ++first[expert[p] - bank.low + 1];
    for (int64_t e = 0; e < bank.E; ++e) first[e + 1] += first[e];
    Scratch scratch;
    auto* next = scratch.take<int64_t>(bank.E);
    std::copy(first, first + bank.E, next);
    for (int64_t p = 0; p < P; ++p)
        if (held(p)) order[next[expert[p] - bank.low]++] = p;
}

void visit(const Bank& bank, const float* x, int64_t T, int64_t K, const int64_t* expert, const float* weight, float* y) {
    Scratch scratch;
    auto* order = scratch.take<int64_t>(T * K);
    auto* first = scratch.take<int64_t>(bank.E + 1);
    plan(expert, T * K, bank, order, first);
    const int64_t D = bank.w1->K, I = bank.w1->N, P = first[bank.E];
    const int threads = worth(3 * P * D * I, bank.threads);
    auto* h = scratch.take<float>(P * I);
    auto* rows = scratch.take<float>(P * D);
    up(x, T, order, K, first, bank.E, weight, *bank.w1, *bank.w3, h, bank.limit, bank.rounds, threads);
    down(h, first, bank.E, *bank.w2, rows, bank.rounds, threads);
    auto* count = scratch.take<int64_t>(T);
    auto* terms = scratch.take<Term>(T * K);
    std::fill(count, count + T, 0);
    for (int64_t e = 0; e < bank.E; ++e)
        for (int64_t place = first[e]; place < first[e + 1]; ++place) {
            const int64_t t = order[place] / K;
            terms[t * K + count[t]++] = {rows + place * D, (bank.low + e) * SHARDS / bank.all};
        }
    const int64_t strips = std::min<int64_t>(threads, T);
    parallel(strips, threads, [&](int64_t s) {
        for (int64_t t = T * s / strips; t < T * (s + 1) / strips; ++t) tree_sum(terms + t * K, count[t], y + t * D, D);
    });
}

}  // namespace

// y [T, D] = the sum over a token's pairs of w2 swiglu(w1 x, w3 x): within each of 8 virtual shards of the experts in
// ascending order, beginning with 0, then the shards as a tree.  expert [T, K], -1 for none; the stacks hold experts
// low..low + E of `all`.  Returns 0, or -1 - p where pair p names an expert there is not, and then y is not written.
EXPORT int64_t pyrosome_routed_experts(const float* x, int64_t T, int64_t K, const int64_t* expert, int64_t low, int64_t E,
                                       int64_t all, const float* weight, const Weight* w1, const Weight* w3,
                                       const Weight* w2, float* y, float limit, int rounds, int threads) {
    for (int64_t p = 0; p < T * K; ++p)
        if (expert[p] >= all) return -1 - p;
    const Bank bank{w1, w3, w2, low, E, all, limit, rounds, threads};
    // As many tokens at a time as give an expert rows enough: what their pairs make is large, and is read again soon.
    const int64_t block = std::max<int64_t>(256, ROWS_EACH * all / std::max<int64_t>(K, 1));
    for (int64_t t = 0; t < T; t += block)
        visit(bank, x + t * w1->K, std::min(block, T - t), K, expert + t * K, weight + t * K, y + t * w1->K);
    return 0;
}

// y [T, D] = onto (or nothing) + w2 swiglu(w1 x, w3 x), the expert that every token visits.
EXPORT void pyrosome_shared_expert(const float* x, int64_t T, const Weight* w1, const Weight* w3, const Weight* w2,
                                   const float* onto, float* y, float limit, int rounds, int threads) {
    const int64_t D = w1->K, I = w1->N, first[2] = {0, T};
    threads = worth(3 * T * D * I, threads);
    Scratch scratch;
    auto* h = scratch.take<float>(T * I);
    up(x, T, nullptr, 1, first, 1, nullptr, *w1, *w3, h, limit, rounds, threads);
    down(h, first, 1, *w2, y, rounds, threads);
    if (onto)
        for (int64_t i = 0; i < T * D; i += LANES)
            store_part(y + i, load_part(onto + i, T * D - i) + load_part(y + i, T * D - i), T * D - i);
}

EXPORT void pyrosome_swiglu(const float* gate, const float* up, float* out, int64_t count, float limit) {
    std::copy(gate, gate + count, out);
    clamped_swiglu(out, up, count, limit, 1.0f);
}

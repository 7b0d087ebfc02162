#include "tiles.h"

namespace {

// What was read by `p` is not kept in registers beyond this: sums need them more, and reading costs nothing beside them.
#define FORGET(p) asm volatile("" : "+r"(p))

// ---------------------------------------------------------------- codes of a group, as the lanes want them
// A block is 64 bytes of 16 outputs: PAIRS pairs of inputs.  SIDE strips are decoded side by side for several rows.
struct FP4Codes {
    static constexpr int PAIRS = 4, GROUP = 32, SIDE = 4;
    template <int P>
    static LANE I16 pair(const uint8_t* block) { return fp4_pair<P>(iload(block)); }
    static LANE void pairs(const uint8_t* block, I16* out) {
        out[0] = pair<0>(block), out[1] = pair<1>(block), out[2] = pair<2>(block), out[3] = pair<3>(block);
    }
};
struct FP8Codes {
    static constexpr int PAIRS = 2, GROUP = 128, SIDE = 2;
    static LANE void pairs(const uint8_t* block, I16* out) { fp8_pairs(iload(block), out[0], out[1]); }
};
template <class C>
constexpr int BLOCKS = C::GROUP / (2 * C::PAIRS);  // of one strip, in a group: 4 or 32
template <class C>
constexpr int64_t group_bytes(int64_t strips) {
    return strips * (BLOCKS<C> * 64 + STRIP);
}
// Blocks of a group that so many inputs have: what lies past a matrix is not added.
template <class C>
LANE int blocks_of(int64_t inputs) {
    if (C::GROUP == 32 || inputs >= C::GROUP) return BLOCKS<C>;
    return static_cast<int>((inputs + 2 * C::PAIRS - 1) / (2 * C::PAIRS));
}

// ---------------------------------------------------------------- inputs
struct Pairs {  // bfloat16
    using Word = uint32_t;
    static constexpr int WORDS = 64, SIDE = 4;  // words of a run; strips, as for codes
    static LANE F16 add(F16 sum, I16 w, const uint32_t* x, int pair) { return dot2(sum, w, iset1(static_cast<int32_t>(x[pair]))); }
};
struct Values {
    using Word = float;
    static constexpr int WORDS = 128, SIDE = 1;  // a product reads its input itself: none is to be kept
    static LANE F16 add(F16 sum, I16 w, const float* x, int pair) {
        return dot2(sum, w, set1(x[2 * pair]), set1(x[2 * pair + 1]));
    }
};

// sum [MR][v ..] += MR rows by a block each of SIDE strips, from pair P of it on.
template <class C, class X, int MR, int NV, int SIDE, int P = 0>
LANE void add_blocks(const uint8_t* block, const typename X::Word* const* x, int pair, F16 (&sum)[MR][NV], int v) {
    constexpr bool ONE = MR > 2 && SIDE * C::PAIRS > 8;  // pair by pair: all would not fit beside the sums
    constexpr int HERE = ONE ? 1 : C::PAIRS;
    I16 w[SIDE][C::PAIRS];
    UNROLL for (int i = 0; i < SIDE; ++i)
        if constexpr (ONE) w[i][0] = C::template pair<P>(block + i * 64);
        else C::pairs(block + i * 64, w[i]);
    UNROLL for (int p = 0; p < HERE; ++p)
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int i = 0; i < SIDE; ++i) sum[m][v + i] = X::add(sum[m][v + i], w[i][p], x[m], pair + P + p);
    if constexpr (P + HERE < C::PAIRS) {
        FORGET(block);
        add_blocks<C, X, MR, NV, SIDE, P + 1>(block, x, pair, sum, v);
    }
}

constexpr int64_t AHEAD = 16384;  // bytes of codes asked for ahead of their use: tried, not derived

// acc [MR][NV strips] += MR rows by K inputs of a tile, codes decoded as they come.  Sums are in registers; totals, to
// which a group adds once, are where there is room.
template <class C, class X, int MR, int NV>
void direct(const uint8_t* codes, int64_t K, const typename X::Word* const* x, int64_t run_step, float* acc) {
    constexpr int PER_RUN = RUN / C::GROUP, SIDE = MR > 2 ? std::min({C::SIDE, X::SIDE, NV}) : NV;
    constexpr bool ROOM = MR <= 2;
    // FP8 in one row is read at the memory's rate by itself; blocks of rows that take a run by turns leave it waiting.
    const bool ask = C::GROUP == 32 || (MR > 2 && K <= RUN);
    F16 total[MR][NV];
    const auto each = [&](auto run) __attribute__((always_inline)) {
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int v = 0; v < NV; ++v) run(total[m][v], acc + (m * NV + v) * STRIP);
    };
    if (ROOM) each([](F16& held, const float* from) { held = load(from); });
    for (int64_t g = 0; g * C::GROUP < K; ++g, codes += group_bytes<C>(NV)) {
        F16 sum[MR][NV];
        const typename X::Word* at[MR];
        UNROLL for (int m = 0; m < MR; ++m) {
            at[m] = x[m] + g / PER_RUN * run_step + g % PER_RUN * (X::WORDS / PER_RUN);
            UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
        }
        const auto add = [&](int blocks) __attribute__((always_inline)) {
            UNROLL2 for (int b = 0; b < blocks; ++b)
                UNROLL for (int v = 0; v < NV; v += SIDE) {
                    const uint8_t* block = codes + (b * NV + v) * 64;
                    if (ask) UNROLL for (int i = 0; i < SIDE; ++i) __builtin_prefetch(block + i * 64 + AHEAD);
                    add_blocks<C, X, MR, NV, SIDE>(block, at, b * C::PAIRS, sum, v);
                    if (SIDE < NV) UNROLL for (int m = 0; m < MR; ++m) FORGET(at[m]);
                }
        };
        const int blocks = blocks_of<C>(K - g * C::GROUP);
        if (blocks == BLOCKS<C>) add(BLOCKS<C>);  // a loop of known length
        else add(blocks);
        UNROLL for (int v = 0; v < NV; ++v) {
            const F16 scale = e8m0_lanes(codes + BLOCKS<C> * NV * 64 + v * STRIP);
            UNROLL for (int m = 0; m < MR; ++m) {
                float* at = acc + (m * NV + v) * STRIP;
                if (ROOM) total[m][v] = fma(sum[m][v], scale, total[m][v]);
                else store(at, fma(sum[m][v], scale, load(at)));
            }
        }
        if (!ROOM) FORGET(acc);
    }
    if (ROOM) each([](const F16& held, float* to) { store(to, held); });
}

// The codes of one run (128 inputs) of a tile, spread to bfloat16 pairs [64][NV strips of 16 words].
template <class C, int NV>
void spread(const uint8_t* tile, int64_t groups, uint32_t* out) {
    for (int64_t g = 0; g < groups; ++g, tile += group_bytes<C>(NV))
        for (int b = 0; b < BLOCKS<C>; ++b)
            for (int v = 0; v < NV; ++v) {
                I16 w[C::PAIRS];
                C::pairs(tile + (b * NV + v) * 64, w);
                for (int p = 0; p < C::PAIRS; ++p)
                    istore(out + ((g * BLOCKS<C> + b) * C::PAIRS + p) * NV * STRIP + v * STRIP, w[p]);
            }
}

// MR rows by `groups` groups of spread codes, `pairs` each and `last` in the last: acc = acc + scale x the group's sum.
template <class X, int MR, int NV>
void block(const uint32_t* w, int pairs, int64_t groups, int last, const F16* scale, const typename X::Word* const* x,
           float* acc, int64_t ldacc) {
    F16 total[MR][NV];
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) total[m][v] = load(acc + m * ldacc + v * STRIP);
    for (int64_t g = 0; g < groups; ++g, w += pairs * NV * STRIP) {
        F16 sum[MR][NV];
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
        const typename X::Word* at[MR];
        UNROLL for (int m = 0; m < MR; ++m) at[m] = x[m] + g * pairs * (X::WORDS / 64);
        const int here = g + 1 < groups ? pairs : last;
        UNROLL2 for (int p = 0; p < here; ++p) {
            I16 wide[NV];
            UNROLL for (int v = 0; v < NV; ++v) wide[v] = iload(w + (p * NV + v) * STRIP);
            UNROLL for (int m = 0; m < MR; ++m)
                UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = X::add(sum[m][v], wide[v], at[m], p);
        }
        UNROLL for (int v = 0; v < NV; ++v)
            UNROLL for (int m = 0; m < MR; ++m) total[m][v] = fma(sum[m][v], scale[g * NV + v], total[m][v]);
    }
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) store(acc + m * ldacc + v * STRIP, total[m][v]);
}

// Rows whose sums and totals, and a pair of weights, the registers hold: more of them spill, and are a quarter slower.
constexpr int MANY = PYROSOME_LEVEL == 2 ? 3 : 1;

template <class X, int NV>
void block_rows(const uint32_t* w, int pairs, int64_t groups, int last, const F16* scale, const typename X::Word* const* x,
                float* acc, int64_t ldacc, int64_t M) {
    int64_t m = 0;
    for (; m + MANY <= M; m += MANY) block<X, MANY, NV>(w, pairs, groups, last, scale, x + m, acc + m * ldacc, ldacc);
    if (MANY > 2 && m + 2 <= M) block<X, 2, NV>(w, pairs, groups, last, scale, x + m, acc + m * ldacc, ldacc), m += 2;
    if (MANY > 1 && m < M) block<X, 1, NV>(w, pairs, groups, last, scale, x + m, acc + m * ldacc, ldacc);
}

template <class X>
const typename X::Word* row_of(const Inputs& x, int64_t run, int64_t m);
template <>
LANE const uint32_t* row_of<Pairs>(const Inputs& x, int64_t run, int64_t m) { return x.pairs(run, m); }
template <>
LANE const float* row_of<Values>(const Inputs& x, int64_t run, int64_t m) { return x.values(run, m); }

#if PYROSOME_LEVEL == 2
constexpr int64_t DIRECT = 32, AT_ONCE = 6;  // rows up to which codes are decoded as they come, and of one block
#else
constexpr int64_t DIRECT = 1, AT_ONCE = 1;
#endif
constexpr int64_t ROWS = 192;  // rows whose sums stay in a core's second cache while runs go by

template <class C, class X, int NV>
LANE void direct_rows(int64_t M, const uint8_t* codes, int64_t K, const typename X::Word* const* x, int64_t step, float* acc) {
    switch (M) {
        case 1: return direct<C, X, 1, NV>(codes, K, x, step, acc);
#if PYROSOME_LEVEL == 2
        case 2: return direct<C, X, 2, NV>(codes, K, x, step, acc);
        case 3: return direct<C, X, 3, NV>(codes, K, x, step, acc);
        case 4: return direct<C, X, 4, NV>(codes, K, x, step, acc);
        case 5: return direct<C, X, 5, NV>(codes, K, x, step, acc);
        case 6: return direct<C, X, 6, NV>(codes, K, x, step, acc);
#endif
    }
}

// acc += up to DIRECT rows by a tile.  If they make several blocks, these take a run each before the next run.
template <class C, class X, int NV>
void few_rows(const uint8_t* codes, int64_t K, const typename X::Word** x, int64_t step, int64_t M, float* acc) {
    const int64_t blocks = (M + AT_ONCE - 1) / AT_ONCE;
    if (blocks == 1) return direct_rows<C, X, NV>(M, codes, K, x, step, acc);
    for (int64_t k = 0; k < K; k += RUN, codes += RUN / C::GROUP * group_bytes<C>(NV))
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t i0 = M * b / blocks, i1 = M * (b + 1) / blocks;
            direct_rows<C, X, NV>(i1 - i0, codes, std::min(RUN, K - k), x + i0, step, acc + i0 * NV * STRIP);
            for (int64_t i = i0; i < i1; ++i) x[i] += step;
        }
}

// The same for more rows: a run is spread once for all of them.
template <class C, class X, int NV>
void many_rows(const uint8_t* codes, int64_t K, const typename X::Word** x, int64_t step, int64_t M, float* acc) {
    constexpr int PER_RUN = RUN / C::GROUP;
    constexpr int64_t WIDE = NV * STRIP;
    Scratch scratch;
    auto* spread_out = scratch.take<uint32_t>(64 * WIDE);
    const int64_t groups = (K + C::GROUP - 1) / C::GROUP;
    for (int64_t g = 0; g < groups; g += PER_RUN, codes += PER_RUN * group_bytes<C>(NV)) {
        const int64_t here = std::min<int64_t>(PER_RUN, groups - g);
        for (int64_t i = 0, next = PER_RUN * group_bytes<C>(NV); i < next; i += 64)  // into the second cache, meanwhile
            __builtin_prefetch(codes + next + i, 0, 2);
        spread<C, NV>(codes, here, spread_out);
        F16 scale[PER_RUN * NV];
        for (int64_t j = 0; j < here; ++j)
            for (int v = 0; v < NV; ++v)
                scale[j * NV + v] = e8m0_lanes(codes + j * group_bytes<C>(NV) + BLOCKS<C> * NV * 64 + v * STRIP);
        const int last = blocks_of<C>(K - (g + here - 1) * C::GROUP) * C::PAIRS;
        block_rows<X, NV>(spread_out, C::GROUP / 2, here, last, scale, x, acc, WIDE, M);
        for (int64_t i = 0; i < M; ++i) x[i] += step;
    }
}

// Rows i0 .. i0 + M, at most ROWS, whose sums acc has room for.
template <class C, class X, int NV>
LANE void some_rows(const uint8_t* codes, int64_t K, int64_t N, const Inputs& x, const int32_t* row, int64_t i0, int64_t M,
                    float* const* y, float* acc) {
    constexpr int64_t WIDE = NV * STRIP;
    const int64_t step = x.M * X::WORDS;
    const typename X::Word* at[ROWS];
    for (int64_t i = 0; i < M; ++i) at[i] = row_of<X>(x, 0, row ? row[i0 + i] : i0 + i);
    for (int64_t i = 0; i < M * WIDE; i += LANES) store(acc + i, zero());
    if (M <= DIRECT) few_rows<C, X, NV>(codes, K, at, step, M, acc);
    else many_rows<C, X, NV>(codes, K, at, step, M, acc);
    for (int64_t i = 0; i < M; ++i)
        UNROLL for (int v = 0; v < NV; ++v)
            if (N > v * STRIP) store_part(y[i0 + i] + v * STRIP, load(acc + i * WIDE + v * STRIP), N - v * STRIP);
}

template <class C, class X, int NV>
void all_rows(const uint8_t* codes, int64_t K, int64_t N, const Inputs& x, const int32_t* row, int64_t count,
              float* const* y) {
    if (count <= DIRECT) {
        alignas(64) float acc[DIRECT * NV * STRIP];
        return some_rows<C, X, NV>(codes, K, N, x, row, 0, count, y, acc);
    }
    Scratch scratch;
    auto* acc = scratch.take<float>(std::min(count, ROWS) * NV * STRIP);
    for (int64_t i = 0; i < count; i += ROWS)
        some_rows<C, X, NV>(codes, K, N, x, row, i, std::min(ROWS, count - i), y, acc);
}

template <class C>
void tile_product(const Weight& w, int64_t tile, const Inputs& x, const int32_t* row, int64_t count, float* const* y) {
    const int64_t left = w.N - tile * TILE, N = std::min(TILE, left), groups = (w.K + C::GROUP - 1) / C::GROUP;
    if (!w.tiled) {
        Scratch scratch;
        auto* own = scratch.take<uint8_t>(groups * group_bytes<C>(N > 32 ? 4 : 2));
        pack_tile(w, tile, own, false);
        const Weight alone{w.format, 1, own, nullptr, N, w.K};
        return tile_product<C>(alone, 0, x, row, count, y);
    }
    const uint8_t* codes = w.data + tile * groups * group_bytes<C>(4);
    if (N > 32) {
        if (x.floats) all_rows<C, Values, 4>(codes, w.K, N, x, row, count, y);
        else all_rows<C, Pairs, 4>(codes, w.K, N, x, row, count, y);
    } else {
        if (x.floats) all_rows<C, Values, 2>(codes, w.K, N, x, row, count, y);
        else all_rows<C, Pairs, 2>(codes, w.K, N, x, row, count, y);
    }
}

int64_t bytes_of_tiles(int64_t N, int64_t groups, int64_t whole, int64_t half) {
    const int64_t rest = N % TILE;
    return groups * (N / TILE * whole + (rest == 0 ? 0 : rest > 32 ? whole : half));
}

}  // namespace

int64_t num_tiles(int64_t N) { return (N + TILE - 1) / TILE; }

int64_t tiled_bytes(int64_t format, int64_t N, int64_t K) {
    return format == FP4 ? bytes_of_tiles(N, (K + 31) / 32, group_bytes<FP4Codes>(4), group_bytes<FP4Codes>(2))
                         : bytes_of_tiles(N, (K + 127) / 128, group_bytes<FP8Codes>(4), group_bytes<FP8Codes>(2));
}

void multiply_tile(const Weight& w, int64_t tile, const Inputs& x, const int32_t* row, int64_t count, float* const* y) {
    if (w.format == FP4) tile_product<FP4Codes>(w, tile, x, row, count, y);
    else tile_product<FP8Codes>(w, tile, x, row, count, y);
}

void prepare_row(const float* x, int64_t K, bool rounds, Inputs to, int64_t m) {
    for (int64_t k0 = 0; k0 < K; k0 += RUN) {
        const int64_t n = std::min(RUN, K - k0);
        if (to.floats) {
            auto* out = const_cast<float*>(to.values(k0 / RUN, m));
            std::memcpy(out, x + k0, n * sizeof(float));
            std::fill(out + n, out + RUN, 0.0f);
            continue;
        }
        F16 v[8];
        for (int i = 0; i < 8; ++i) v[i] = n > 16 * i ? load_part(x + k0 + 16 * i, n - 16 * i) : zero();
        if (rounds) round_fp8(v, 8);
        auto* out = const_cast<uint32_t*>(to.pairs(k0 / RUN, m));
        for (int i = 0; i < 8; ++i) store_pairs(out + 8 * i, rounds ? as_int(v[i]) : round_bf16(v[i]));
    }
}

void prepare_rows(const float* x, int64_t ldx, int64_t M, int64_t K, bool rounds, Inputs to, int threads) {
    each_row(M, 8 * M * K, threads, [&](int64_t m) { prepare_row(x + m * ldx, K, rounds, to, m); });
}

EXPORT int64_t pyrosome_tiled_bytes(int64_t format, int64_t N, int64_t K) { return tiled_bytes(format, N, K); }

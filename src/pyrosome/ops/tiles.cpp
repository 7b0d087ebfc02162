#include "tiles.h"

namespace {

// ---------------------------------------------------------------- codes of a group, as the lanes want them
// A block is 64 bytes of 16 outputs: PAIRS pairs of inputs.
struct FP4Codes {
    static constexpr int PAIRS = 4, GROUP = 32, AHEAD = 16384;  // bytes asked for ahead of their use: tried, not derived
    static LANE void pairs(const uint8_t* block, I16* out) {
        const I16 words = iload(block);
        out[0] = fp4_pair<0>(words);
        out[1] = fp4_pair<1>(words);
        out[2] = fp4_pair<2>(words);
        out[3] = fp4_pair<3>(words);
    }
};
struct FP8Codes {
    static constexpr int PAIRS = 2, GROUP = 128, AHEAD = 0;
    static LANE void pairs(const uint8_t* block, I16* out) { fp8_pairs(iload(block), out[0], out[1]); }
};
template <class C>
constexpr int BLOCKS = C::GROUP / (2 * C::PAIRS);  // of one strip, in a group: 4 or 32
template <class C>
constexpr int64_t group_bytes(int64_t strips) {
    return strips * (BLOCKS<C> * 64 + STRIP);
}

// ---------------------------------------------------------------- inputs
struct Pairs {  // bfloat16
    using Word = uint32_t;
    static constexpr int WORDS = 64;  // of a run
    static LANE F16 add(F16 sum, I16 w, const uint32_t* x, int pair) { return dot2(sum, w, iset1(static_cast<int32_t>(x[pair]))); }
};
struct Values {
    using Word = float;
    static constexpr int WORDS = 128;
    static LANE F16 add(F16 sum, I16 w, const float* x, int pair) {
        return dot2(sum, w, set1(x[2 * pair]), set1(x[2 * pair + 1]));
    }
};

// MR rows by one tile of NV strips, codes decoded as they come: for few rows, where weights are what takes time.
template <class C, class X, int MR, int NV>
void direct(const uint8_t* tile, int64_t K, const typename X::Word* const* x, int64_t run_step, float* const* y, int64_t N) {
    constexpr int PER_RUN = RUN / C::GROUP;
    F16 total[MR][NV];
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) total[m][v] = zero();
    const int64_t groups = (K + C::GROUP - 1) / C::GROUP;
    for (int64_t g = 0; g < groups; ++g, tile += group_bytes<C>(NV)) {
        F16 sum[MR][NV];
        const typename X::Word* at[MR];
        UNROLL for (int m = 0; m < MR; ++m) {
            at[m] = x[m] + g / PER_RUN * run_step + g % PER_RUN * (X::WORDS / PER_RUN);
            UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
        }
        UNROLL2 for (int b = 0; b < BLOCKS<C>; ++b) {
            I16 w[NV][C::PAIRS];
            UNROLL for (int v = 0; v < NV; ++v) {
                const uint8_t* block = tile + (b * NV + v) * 64;
                if (C::AHEAD) __builtin_prefetch(block + C::AHEAD);
                C::pairs(block, w[v]);
            }
            UNROLL for (int p = 0; p < C::PAIRS; ++p)
                UNROLL for (int m = 0; m < MR; ++m)
                    UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = X::add(sum[m][v], w[v][p], at[m], b * C::PAIRS + p);
        }
        UNROLL for (int v = 0; v < NV; ++v) {
            const F16 scale = e8m0_lanes(tile + BLOCKS<C> * NV * 64 + v * STRIP);
            UNROLL for (int m = 0; m < MR; ++m) total[m][v] = fma(sum[m][v], scale, total[m][v]);
        }
    }
    for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v)
            if (N > v * STRIP) store_part(y[m] + v * STRIP, total[m][v], N - v * STRIP);
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

// MR rows by `groups` groups of spread codes: acc = acc + scale x the group's sum.
template <class X, int MR, int NV>
void block(const uint32_t* w, int pairs, int64_t groups, const F16* scale, const typename X::Word* const* x, float* acc,
           int64_t ldacc) {
    F16 total[MR][NV];
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) total[m][v] = load(acc + m * ldacc + v * STRIP);
    for (int64_t g = 0; g < groups; ++g, w += pairs * NV * STRIP) {
        F16 sum[MR][NV];
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
        const typename X::Word* at[MR];
        UNROLL for (int m = 0; m < MR; ++m) at[m] = x[m] + g * pairs * (X::WORDS / 64);
        UNROLL2 for (int p = 0; p < pairs; ++p) {
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
void block_rows(const uint32_t* w, int pairs, int64_t groups, const F16* scale, const typename X::Word* const* x,
                float* acc, int64_t ldacc, int64_t M) {
    int64_t m = 0;
    for (; m + MANY <= M; m += MANY) block<X, MANY, NV>(w, pairs, groups, scale, x + m, acc + m * ldacc, ldacc);
    if (MANY > 2 && m + 2 <= M) block<X, 2, NV>(w, pairs, groups, scale, x + m, acc + m * ldacc, ldacc), m += 2;
    if (MANY > 1 && m < M) block<X, 1, NV>(w, pairs, groups, scale, x + m, acc + m * ldacc, ldacc);
}

// acc += sum of MR rows by `pairs` pairs of NV strips.
template <int MR, int NV>
void pair_block(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t pairs, float* acc, int64_t ldacc) {
    F16 sum[MR][NV];
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
    const uint32_t* at[MR];
    UNROLL for (int m = 0; m < MR; ++m) at[m] = x + m * ldx;
    UNROLL2 for (int64_t p = 0; p < pairs; ++p, w += NV * STRIP) {
        I16 wide[NV];
        UNROLL for (int v = 0; v < NV; ++v) wide[v] = iload(w + v * STRIP);
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int v = 0; v < NV; ++v)
                sum[m][v] = dot2(sum[m][v], wide[v], iset1(static_cast<int32_t>(at[m][p])));
    }
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) {
            float* to = acc + m * ldacc + v * STRIP;
            store(to, load(to) + sum[m][v]);
        }
}

#if PYROSOME_LEVEL == 2
constexpr int WIDE = 4;  // rows of a block whose sums alone are held in registers
#else
constexpr int WIDE = 1;
#endif

template <int NV>
void pair_rows(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t pairs, float* acc, int64_t ldacc, int64_t M) {
    int64_t m = 0;
    for (; m + WIDE <= M; m += WIDE) pair_block<WIDE, NV>(x + m * ldx, ldx, w, pairs, acc + m * ldacc, ldacc);
    for (; m < M; ++m) pair_block<1, NV>(x + m * ldx, ldx, w, pairs, acc + m * ldacc, ldacc);
}

template <class X>
const typename X::Word* row_of(const Inputs& x, int64_t run, int64_t m);
template <>
LANE const uint32_t* row_of<Pairs>(const Inputs& x, int64_t run, int64_t m) { return x.pairs(run, m); }
template <>
LANE const float* row_of<Values>(const Inputs& x, int64_t run, int64_t m) { return x.values(run, m); }

#if PYROSOME_LEVEL == 2
constexpr int64_t DIRECT = 4;  // rows up to which codes are decoded as they come
#else
constexpr int64_t DIRECT = 1;
#endif
constexpr int64_t ROWS = 192;  // rows whose sums stay in a core's second cache while runs go by

template <class C, class X, int NV>
void tile_by_rows(const uint8_t* tile, int64_t K, int64_t N, const Inputs& x, const int32_t* row, int64_t count,
                  float* const* y) {
    if (count <= DIRECT) {
        const typename X::Word* at[DIRECT];
        for (int64_t i = 0; i < count; ++i) at[i] = row_of<X>(x, 0, row ? row[i] : i);
        const int64_t step = x.M * X::WORDS;
        switch (count) {
            case 1: return direct<C, X, 1, NV>(tile, K, at, step, y, N);
#if PYROSOME_LEVEL == 2
            case 2: return direct<C, X, 2, NV>(tile, K, at, step, y, N);
            case 3: return direct<C, X, 3, NV>(tile, K, at, step, y, N);
            case 4: return direct<C, X, 4, NV>(tile, K, at, step, y, N);
#endif
        }
    }
    constexpr int PER_RUN = RUN / C::GROUP;
    constexpr int64_t WIDE = NV * STRIP;
    Scratch scratch;
    auto* spread_out = scratch.take<uint32_t>(64 * WIDE);
    auto* acc = scratch.take<float>(std::min(count, ROWS) * WIDE);
    const typename X::Word* at[ROWS];
    const int64_t groups = (K + C::GROUP - 1) / C::GROUP;
    for (int64_t i0 = 0; i0 < count; i0 += ROWS) {
        const int64_t n = std::min(ROWS, count - i0);
        std::fill(acc, acc + n * WIDE, 0.0f);
        for (int64_t g = 0; g < groups; g += PER_RUN) {
            const int64_t here = std::min<int64_t>(PER_RUN, groups - g);
            const uint8_t* codes = tile + g * group_bytes<C>(NV);
            spread<C, NV>(codes, here, spread_out);
            F16 scale[PER_RUN * NV];
            for (int64_t j = 0; j < here; ++j)
                for (int v = 0; v < NV; ++v)
                    scale[j * NV + v] = e8m0_lanes(codes + j * group_bytes<C>(NV) + BLOCKS<C> * NV * 64 + v * STRIP);
            for (int64_t i = 0; i < n; ++i) at[i] = row_of<X>(x, g / PER_RUN, row ? row[i0 + i] : i0 + i);
            block_rows<X, NV>(spread_out, C::GROUP / 2, here, scale, at, acc, WIDE, n);
        }
        for (int64_t i = 0; i < n; ++i) std::copy(acc + i * WIDE, acc + i * WIDE + N, y[i0 + i]);
    }
}

template <class C>
void tile_product(const Weight& w, int64_t tile, const Inputs& x, const int32_t* row, int64_t count, float* const* y) {
    const int64_t left = w.N - tile * TILE, N = std::min(TILE, left), K = w.K;
    const int64_t groups = (K + C::GROUP - 1) / C::GROUP;
    Scratch scratch;
    const uint8_t* codes = w.data + tile * groups * group_bytes<C>(4);
    if (!w.tiled) {
        auto* own = scratch.take<uint8_t>(groups * group_bytes<C>(N > 32 ? 4 : 2));
        pack_tile(w, tile, own, false);
        codes = own;
    }
    if (N > 32) {
        if (x.floats) tile_by_rows<C, Values, 4>(codes, K, N, x, row, count, y);
        else tile_by_rows<C, Pairs, 4>(codes, K, N, x, row, count, y);
    } else {
        if (x.floats) tile_by_rows<C, Values, 2>(codes, K, N, x, row, count, y);
        else tile_by_rows<C, Pairs, 2>(codes, K, N, x, row, count, y);
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

void multiply_pairs(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t pairs, float* acc, int64_t ldacc, int64_t M,
                    int64_t strips) {
    strips == 4 ? pair_rows<4>(x, ldx, w, pairs, acc, ldacc, M) : pair_rows<2>(x, ldx, w, pairs, acc, ldacc, M);
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
        uint32_t bits[RUN];
        for (int i = 0; i < 8; ++i) istore(bits + 16 * i, rounds ? as_int(v[i]) : round_bf16(v[i]));
        auto* out = const_cast<uint32_t*>(to.pairs(k0 / RUN, m));
        for (int j = 0; j < 64; ++j) out[j] = (bits[2 * j] & 0xFFFF0000u) | bits[2 * j + 1] >> 16;
    }
}

void prepare_rows(const float* x, int64_t ldx, int64_t M, int64_t K, bool rounds, Inputs to, int threads) {
    each_row(M, 8 * M * K, threads, [&](int64_t m) { prepare_row(x + m * ldx, K, rounds, to, m); });
}

EXPORT int64_t pyrosome_tiled_bytes(int64_t format, int64_t N, int64_t K) { return tiled_bytes(format, N, K); }

// Products with quantised weights: one layout, one order of additions, for any number of rows.
//
// A weight [N, K] lies in tiles of 64 outputs (the last may have 32), and a tile in groups along K, which share a scale:
// 32 inputs in FP4, 128 in FP8.  A group is its codes, then a scale byte for each output.  Codes lie as the lanes want
// them: outputs across lanes, K in order.  y = sum over groups, in order, of scale x (sum over the group's inputs, in
// order, of code x input): each term added by fused multiply-add in float32.  Nothing in it depends on how many rows
// there are, nor on whether inputs are taken as bfloat16 (rounded ones are exactly that) or as float32.
#pragma once
#include "native.h"

constexpr int64_t TILE = 64, STRIP = 16;  // outputs of a tile, and of one vector of lanes
constexpr int64_t RUN = 128;              // inputs that a prepared row keeps together
constexpr int64_t ROW_BLOCK = 384;        // rows that meet all tiles before the next ones: the last cache keeps them

// Inputs of M rows, prepared once for all outputs: [K / 128][M][64 pairs], bfloat16 pairs or pairs of floats.
struct Inputs {
    const void* data;
    int64_t M;
    bool floats;
    const uint32_t* pairs(int64_t run, int64_t m) const { return static_cast<const uint32_t*>(data) + (run * M + m) * 64; }
    const float* values(int64_t run, int64_t m) const { return static_cast<const float*>(data) + (run * M + m) * 128; }
    Inputs from(int64_t m) const {  // the same without the rows before m
        return {static_cast<const char*>(data) + m * (floats ? 512 : 256), M, floats};
    }
    static int64_t bytes(int64_t M, int64_t K, bool floats) { return (K + RUN - 1) / RUN * M * (floats ? 512 : 256); }
};

// Prepares row m of x [K]; with `rounds`, to FP8 with a scale for each 128 inputs (and then bfloat16 holds it exactly).
void prepare_row(const float* x, int64_t K, bool rounds, Inputs to, int64_t m);
// Prepares all M rows, ldx floats apart, on several threads.
void prepare_rows(const float* x, int64_t ldx, int64_t M, int64_t K, bool rounds, Inputs to, int threads);

int64_t num_tiles(int64_t N);
// Bytes of a tiled weight.
int64_t tiled_bytes(int64_t format, int64_t N, int64_t K);

// Lays one tile of a weight that is in rows (pack.cpp).  `past_caches`: it is not read soon, so that its lines need not
// be fetched before they are written.
void pack_tile(const Weight& w, int64_t tile, uint8_t* out, bool past_caches);

// y[i][0 .. min(64, N - 64 tile)) for `count` rows: of inputs row[i] (row i where `row` is null), at addresses y[i].
void multiply_tile(const Weight& w, int64_t tile, const Inputs& x, const int32_t* row, int64_t count, float* const* y);

// Products of bfloat16 pairs with float32 sums, for kernels that make both sides themselves.
#pragma once
#include "native.h"

// acc += sums of MR rows by `pairs` pairs of NV strips of 16 outputs.
template <int MR, int NV>
void pair_block(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t ldw, int64_t pairs, float* acc, int64_t ldacc) {
    F16 sum[MR][NV];
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = zero();
    const uint32_t* at[MR];
    UNROLL for (int m = 0; m < MR; ++m) at[m] = x + m * ldx;
    UNROLL2 for (int64_t p = 0; p < pairs; ++p, w += ldw) {
        I16 wide[NV];
        UNROLL for (int v = 0; v < NV; ++v) wide[v] = iload(w + v * LANES);
        UNROLL for (int m = 0; m < MR; ++m)
            UNROLL for (int v = 0; v < NV; ++v)
                sum[m][v] = dot2(sum[m][v], wide[v], iset1(static_cast<int32_t>(at[m][p])));
    }
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int v = 0; v < NV; ++v) {
            float* to = acc + m * ldacc + v * LANES;
            store(to, load(to) + sum[m][v]);
        }
}

template <int NV>
void pair_rows(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t ldw, int64_t pairs, float* acc, int64_t ldacc,
               int64_t M) {
    constexpr int MANY = PYROSOME_LEVEL < 2 ? 1 : NV == 4 ? 4 : 8;  // rows whose sums fill the registers
    int64_t m = 0;
    for (; m + MANY <= M; m += MANY) pair_block<MANY, NV>(x + m * ldx, ldx, w, ldw, pairs, acc + m * ldacc, ldacc);
    if (MANY > 4 && m + 4 <= M) pair_block<4, NV>(x + m * ldx, ldx, w, ldw, pairs, acc + m * ldacc, ldacc), m += 4;
    if (MANY > 1 && m + 2 <= M) pair_block<2, NV>(x + m * ldx, ldx, w, ldw, pairs, acc + m * ldacc, ldacc), m += 2;
    for (; m < M; ++m) pair_block<1, NV>(x + m * ldx, ldx, w, ldw, pairs, acc + m * ldacc, ldacc);
}

// acc[m][n] += sum_k x[m][k] w[k][n] over `pairs` pairs in order, for M rows (x: ldx words apart) and some strips of 16
// outputs (w: a row of words for each pair, ldw apart; acc: ldacc floats apart).  Each sum begins at zero and is then
// added to acc.
inline void multiply_pairs(const uint32_t* x, int64_t ldx, const uint32_t* w, int64_t ldw, int64_t pairs, float* acc,
                           int64_t ldacc, int64_t M, int64_t strips) {
    int64_t s = 0;
    for (; s + 4 <= strips; s += 4) pair_rows<4>(x, ldx, w + s * LANES, ldw, pairs, acc + s * LANES, ldacc, M);
    if (s + 2 <= strips) pair_rows<2>(x, ldx, w + s * LANES, ldw, pairs, acc + s * LANES, ldacc, M), s += 2;
    if (s < strips) pair_rows<1>(x, ldx, w + s * LANES, ldw, pairs, acc + s * LANES, ldacc, M);
}

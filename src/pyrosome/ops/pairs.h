// Pairs of bfloat16 made and turned, and their products with float32 sums, for kernels that make both sides themselves.
#pragma once
#include "native.h"

// Words of neighbouring rows: out[c] = first[c] in the high half, second[c] in the low; count is a multiple of 32.
LANE void interleave(const uint16_t* first_row, const uint16_t* second_row, int64_t count, uint32_t* out) {
#if PYROSOME_LEVEL == 2
    alignas(64) static const uint16_t order[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
    for (int64_t c = 0; c < count; c += 32) {
        const __m512i a = _mm512_loadu_si512(first_row + c), b = _mm512_loadu_si512(second_row + c);
        _mm512_store_si512(out + c, _mm512_permutex2var_epi16(b, low, a));
        _mm512_store_si512(out + c + 16, _mm512_permutex2var_epi16(b, high, a));
    }
#else
    for (int64_t c = 0; c < count; c += LANES)
        istore(out + c, shl<16>(iload_halves(first_row + c)) | iload_halves(second_row + c));
#endif
}

// 32 values as bfloat16, the earlier of a pair in the low half, as rows have them.
LANE void narrow(F16 a, F16 b, uint32_t* out) {
#if PYROSOME_LEVEL == 2
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
    uint32_t bits[32];
    istore(bits, round_bf16(a)), istore(bits + 16, round_bf16(b));
    for (int i = 0; i < 16; ++i) out[i] = bits[2 * i + 1] | bits[2 * i] >> 16;
#endif
}

// round_bf16 of what is neither subnormal nor negative.
LANE I16 round_weight(F16 a) {
    const I16 bits = as_int(a);
    return (bits + iset1(0x7FFF) + (shr<16>(bits) & iset1(1))) & iset1(static_cast<int32_t>(0xFFFF0000u));
}

// 16 x 16 words, turned.
LANE void transpose(const uint32_t* from, int64_t ld, uint32_t* to, int64_t ldto) {
#if PYROSOME_LEVEL == 2
    __m512i r[16], s[16];
    UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * ld);
    for (int i = 0; i < 16; i += 2) s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(to + i * ldto, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * ldto, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xDD));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[j * ldto + i] = from[i * ld + j];
#endif
}

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

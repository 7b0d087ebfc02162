// Number formats in lanes: bfloat16 in pairs, e2m1 and e4m3 codes, E8M0 scales, and rounding to them.
#pragma once
#include "lanes.h"

// ---------------------------------------------------------------- bfloat16, in pairs
// A pair fills a 32-bit lane: the term that comes first (the even one) in the high half, the second in the low half.

// acc + a.first b.first, rounded, then + a.second b.second, rounded.  Values are expected to be normal or zero: the
// instruction takes subnormal ones for zero.
LANE F16 dot2(F16 acc, I16 a, I16 b) {
#if PYROSOME_LEVEL == 2
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#else
    const I16 upper = iset1(static_cast<int32_t>(0xFFFF0000u));
    acc = fma(as_float(a & upper), as_float(b & upper), acc);
    return fma(as_float(shl<16>(a)), as_float(shl<16>(b)), acc);
#endif
}

// The same with float terms on one side.
LANE F16 dot2(F16 acc, I16 a, F16 first_b, F16 second_b) {
    acc = fma(as_float(a & iset1(static_cast<int32_t>(0xFFFF0000u))), first_b, acc);
    return fma(as_float(shl<16>(a)), second_b, acc);
}

// Eight pairs of what the high halves of 16 lanes hold.
LANE void store_pairs(uint32_t* out, I16 bits) {
#if PYROSOME_LEVEL == 2
    const __m512i first = _mm512_and_si512(bits.v, _mm512_set1_epi64(0xFFFF0000)), second = _mm512_srli_epi64(bits.v, 48);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(_mm512_or_si512(first, second)));
#else
    uint32_t b[16];
    istore(b, bits);
    for (int i = 0; i < 8; ++i) out[i] = (b[2 * i] & 0xFFFF0000u) | b[2 * i + 1] >> 16;
#endif
}

// Bits of the nearest bfloat16 in the high half of each lane (ties to even; subnormal gives zero; NaN stays NaN).
LANE I16 round_bf16(F16 a) {
    const I16 bits = as_int(a), size = bits & iset1(0x7FFFFFFF);
    I16 r = (bits + iset1(0x7FFF) + (shr<16>(bits) & iset1(1))) & iset1(static_cast<int32_t>(0xFFFF0000u));
    r = select(greater(iset1(0x00800000), size), bits & iset1(static_cast<int32_t>(0x80000000u)), r);
    return select(greater(size, iset1(0x7F800000)), iset1(0x7FC00000), r);
}

LANE float bf16_value(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// 2^(byte - 127), byte 0 included; 255 is refused where weights come in.
LANE F16 e8m0_lanes(const uint8_t* p) { return as_float(max(shl<23>(iload_bytes(p)), iset1(0x00400000))); }
LANE float e8m0_value(uint8_t byte) {
    const uint32_t bits = byte == 255 ? 0x7FC00000u : byte ? static_cast<uint32_t>(byte) << 23 : 0x00400000u;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// ---------------------------------------------------------------- codes
// Four bfloat16 pairs of e2m1 codes from 64 bytes: 16-bit words of four codes, code v of a word being of pair v.
template <int V>
LANE I16 fp4_pair(I16 words) {
    // e2m1 as bfloat16: 0 .5 1 1.5 2 3 4 6, then their negatives
#if PYROSOME_LEVEL == 2
    alignas(64) static const uint16_t table[32] = {
        0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080,
        0xC0C0, 0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040,
        0xC080, 0xC0C0};
    const __m512i code = V ? _mm512_srli_epi16(words.v, 4 * V) : words.v;  // bit 4 of an index is the next code's: no matter
    return {_mm512_permutexvar_epi16(code, _mm512_load_si512(table))};
#elif PYROSOME_LEVEL == 1
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, -128, (char)0xBF, (char)0xBF, (char)0xBF, (char)0xC0, (char)0xC0,
        (char)0xC0, (char)0xC0));
    I16 r;
    EACH2 {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi16(words.v[i], 4 * V), _mm256_set1_epi16(15));
        r.v[i] = _mm256_or_si256(_mm256_shuffle_epi8(low, code), _mm256_shuffle_epi8(high, _mm256_slli_epi16(code, 8)));
    }
    return r;
#else
    static const uint16_t table[16] = {0,      0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                       0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
    I16 r;
    EACH16 {
        const uint32_t w = static_cast<uint32_t>(words.v[i]);
        r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(table[w >> (16 + 4 * V) & 15]) << 16 | table[w >> 4 * V & 15]);
    }
    return r;
#endif
}

// e4m3 codes as bfloat16, which holds every one exactly: the high byte without its sign, and the low byte.
struct E4M3 {
    alignas(64) uint8_t high[128], low[128];
    E4M3() {
        for (int b = 0; b < 128; ++b) {
            const int exponent = b >> 3, mantissa = b & 7;
            const float size = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
            uint32_t bits;
            std::memcpy(&bits, &size, sizeof bits);
            if (b == 127) bits = 0x7FC00000u;
            high[b] = static_cast<uint8_t>(bits >> 24), low[b] = static_cast<uint8_t>(bits >> 16);
        }
    }
};
extern const E4M3 e4m3;

LANE uint32_t e4m3_bits(uint8_t b) {  // of the bfloat16, in the low half
    return static_cast<uint32_t>(e4m3.high[b & 127] | (b & 128)) << 8 | e4m3.low[b & 127];
}
LANE float e4m3_value(uint8_t b) { return bf16_value(static_cast<uint16_t>(e4m3_bits(b))); }

// Two bfloat16 pairs of e4m3 codes from 64 bytes: in each 16 bytes the first 8 are pair 0 of four lanes, the others pair 1.
LANE void fp8_pairs(I16 bytes, I16& pair0, I16& pair1) {
#if PYROSOME_LEVEL == 2
    const __m512i h0 = _mm512_load_si512(e4m3.high), h1 = _mm512_load_si512(e4m3.high + 64);
    const __m512i l0 = _mm512_load_si512(e4m3.low), l1 = _mm512_load_si512(e4m3.low + 64);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(h0, bytes.v, h1), bytes.v, sign, 0xF8);
    const __m512i low = _mm512_permutex2var_epi8(l0, bytes.v, l1);
    pair0.v = _mm512_unpacklo_epi8(low, high);
    pair1.v = _mm512_unpackhi_epi8(low, high);
#elif PYROSOME_LEVEL == 1
    // A code's bits, moved, are a half float 2^-8 times its value; 0x7F alone is none.
    for (int i = 0; i < 2; ++i) {
        __m256i out[2];
        for (int part = 0; part < 2; ++part) {  // words of the first or second 8 bytes of each 16
            const __m256i none = _mm256_setzero_si256();
            const __m256i word = part ? _mm256_unpackhi_epi8(none, bytes.v[i]) : _mm256_unpacklo_epi8(none, bytes.v[i]);
            const __m256i size = _mm256_and_si256(word, _mm256_set1_epi16(0x7F00));
            const __m256i sign = _mm256_and_si256(word, _mm256_set1_epi16(static_cast<short>(0x8000)));
            const __m256i half = _mm256_srli_epi16(size, 1);
            __m256i bf;
            {
                const __m256 times = _mm256_set1_ps(256.0f);
                const __m256i lo = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), times));
                const __m256i hi = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), times));
                bf = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(lo, 16), _mm256_srli_epi32(hi, 16)), 0xD8);
            }
            const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7F00));
            bf = _mm256_blendv_epi8(bf, _mm256_set1_epi16(0x7FC0), nan);
            out[part] = _mm256_or_si256(bf, sign);
        }
        pair0.v[i] = out[0];
        pair1.v[i] = out[1];
    }
#else
    uint8_t b[64];
    std::memcpy(b, &bytes, sizeof b);
    EACH16 {
        const uint8_t* at = b + i / 4 * 16 + i % 4 * 2;
        pair0.v[i] = static_cast<int32_t>(e4m3_bits(at[1]) << 16 | e4m3_bits(at[0]));
        pair1.v[i] = static_cast<int32_t>(e4m3_bits(at[9]) << 16 | e4m3_bits(at[8]));
    }
#endif
}

// ---------------------------------------------------------------- rounding to FP8 and FP4, as activations are
// 2^ceil(log2(size / largest)) of the largest magnitude of a group, whose bits are `size_bits`, as the bits of a float;
// NaN where the group has an infinity or NaN.
LANE float group_scale(int32_t size_bits, float floor, float largest) {
    float size;
    std::memcpy(&size, &size_bits, sizeof size);
    if (!(size_bits < 0x7F800000)) size = NAN;
    else size = (size > floor ? size : floor) / largest;
    uint32_t bits;
    std::memcpy(&bits, &size, sizeof bits);
    if (size == size) bits = (bits + 0x7FFFFFu) & 0x7F800000u;
    if (bits == 0x7F800000u) bits = 0x7FC00000u;  // no power of two will do
    std::memcpy(&size, &bits, sizeof size);
    return size;
}

// Bits of the largest magnitude of `count` vectors: NaN is above infinity.
LANE int32_t largest_bits(const F16* v, int count) {
    I16 top = iset1(0);
    for (int i = 0; i < count; ++i) top = max(top, as_int(v[i]) & iset1(0x7FFFFFFF));
    return most_of(top);
}

LANE F16 signed_as(F16 size, F16 v) {  // a zero that came from below is -0
    return as_float(as_int(size) | (as_int(v) & iset1(static_cast<int32_t>(0x80000000u))));
}

// Rounds values of at most 448 to e4m3's 3 bits of mantissa, 2^-9 the least step, ties to even.
LANE F16 to_e4m3(F16 v) {
    const I16 exponent = max(as_int(v) & iset1(0x7F800000), iset1((127 - 6) << 23));
    const F16 shift = as_float((exponent + iset1(20 << 23)) | iset1(0x00400000));
    return signed_as((v + shift) - shift, v);
}

// v (16 `count` values, one group) to e4m3 with the group's scale and back; gives the scale.
LANE float round_fp8(F16* v, int count) {
    const float scale = group_scale(largest_bits(v, count), 1e-4f, 448.0f);
    const F16 times = set1(scale), over = set1(1.0f / scale);
    for (int i = 0; i < count; ++i) v[i] = to_e4m3(v[i] * over) * times;
    return scale;
}

// Sixteen float lanes, whatever the machine: what every kernel is written in.
//
// Each source is compiled once per level (PYROSOME_LEVEL 2: AVX-512 with VBMI, VNNI and BF16; 1: AVX2 with FMA and F16C;
// 0: plain C++).  An operation here gives the same bits at every level: lanes never mix except where it says so, a
// product and a sum are fused where `fma` says so and nowhere else, and functions such as exp are written out below.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if PYROSOME_LEVEL > 0
#include <immintrin.h>
#endif

#define LANE inline __attribute__((always_inline))

constexpr int LANES = 16;

// Loops over registers are unrolled where there are registers.
#if PYROSOME_LEVEL == 2
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL2 _Pragma("GCC unroll 2")
#else
#define UNROLL
#define UNROLL2
#endif

// ---------------------------------------------------------------- types
#if PYROSOME_LEVEL == 2
struct F16 { __m512 v; };        // 16 floats
struct I16 { __m512i v; };       // 16 int32, or 64 bytes
struct Mask { __mmask16 v; };    // 16 truths
#elif PYROSOME_LEVEL == 1
struct F16 { __m256 v[2]; };
struct I16 { __m256i v[2]; };
struct Mask { __m256 v[2]; };
#else
// The compiler's own vectors: it lowers them to what the processor has, in little time.
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
struct F16 { Floats v; };
struct I16 { Ints v; };
struct Mask { Ints v; };  // 0 or -1
#endif

// One expression per level: EACH2 over the halves of AVX2, EACH16 over plain lanes.
#define EACH2 for (int i = 0; i < 2; ++i)
#define EACH16 for (int i = 0; i < 16; ++i)

// ---------------------------------------------------------------- floats
LANE F16 zero() {
    F16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_setzero_ps();
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_setzero_ps();
#else
    r.v = Floats{};
#endif
    return r;
}

LANE F16 set1(float x) {
    F16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_set1_ps(x);
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_set1_ps(x);
#else
    r.v = Floats{} + x;
#endif
    return r;
}

LANE F16 load(const float* p) {
    F16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_loadu_ps(p);
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_loadu_ps(p + 8 * i);
#else
    std::memcpy(&r, p, sizeof r);
#endif
    return r;
}

LANE void store(float* p, F16 a) {
#if PYROSOME_LEVEL == 2
    _mm512_storeu_ps(p, a.v);
#elif PYROSOME_LEVEL == 1
    EACH2 _mm256_storeu_ps(p + 8 * i, a.v[i]);
#else
    std::memcpy(p, &a, sizeof a);
#endif
}

// The first n of 16, zeros after; nothing past them is read or written.
LANE F16 load_part(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
#if PYROSOME_LEVEL == 2
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
#else
    float part[16] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
#endif
}

LANE void store_part(float* p, F16 a, int64_t n) {
    if (n >= LANES) return store(p, a);
#if PYROSOME_LEVEL == 2
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
#else
    float part[16];
    store(part, a);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
#endif
}

#if PYROSOME_LEVEL == 2
#define FLOAT2(name, wide, half, plain) \
    LANE F16 name(F16 a, F16 b) { return {_mm512_##wide(a.v, b.v)}; }
#elif PYROSOME_LEVEL == 1
#define FLOAT2(name, wide, half, plain) \
    LANE F16 name(F16 a, F16 b) { return {{_mm256_##half(a.v[0], b.v[0]), _mm256_##half(a.v[1], b.v[1])}}; }
#else
#define FLOAT2(name, wide, half, plain)  \
    LANE F16 name(F16 x, F16 y) {        \
        const Floats a = x.v, b = y.v;   \
        return {plain};                  \
    }
#endif
FLOAT2(operator+, add_ps, add_ps, a + b)
FLOAT2(operator-, sub_ps, sub_ps, a - b)
FLOAT2(operator*, mul_ps, mul_ps, a * b)
FLOAT2(operator/, div_ps, div_ps, a / b)
FLOAT2(max, max_ps, max_ps, a > b ? a : b)  // b where either is NaN
FLOAT2(min, min_ps, min_ps, a < b ? a : b)
#undef FLOAT2

LANE F16 fma(F16 a, F16 b, F16 c) {  // a b + c, rounded once
#if PYROSOME_LEVEL == 2
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
#else
    F16 r;
    EACH16 r.v[i] = std::fmaf(a.v[i], b.v[i], c.v[i]);
    return r;
#endif
}

LANE F16 sqrt(F16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_sqrt_ps(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_sqrt_ps(a.v[0]), _mm256_sqrt_ps(a.v[1])}};
#else
    F16 r;
    EACH16 r.v[i] = std::sqrt(a.v[i]);
    return r;
#endif
}

// The lanes folded in halves: 16 -> 8 -> 4 -> 2 -> 1.
LANE float fold(F16 a) {
#if PYROSOME_LEVEL > 0
#if PYROSOME_LEVEL == 2
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
    const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float l[16];
    store(l, a);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; ++i) l[i] = l[i] + l[i + w];
    return l[0];
#endif
}

// ---------------------------------------------------------------- 32-bit integers
LANE I16 as_int(F16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_castps_si512(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}};
#else
    I16 r;
    std::memcpy(&r, &a, sizeof r);
    return r;
#endif
}

LANE F16 as_float(I16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_castsi512_ps(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}};
#else
    F16 r;
    std::memcpy(&r, &a, sizeof r);
    return r;
#endif
}

LANE I16 iset1(int32_t x) {
    I16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_set1_epi32(x);
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_set1_epi32(x);
#else
    r.v = Ints{} + x;
#endif
    return r;
}

LANE I16 iload(const void* p) {  // 64 bytes
    I16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_loadu_si512(p);
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
#else
    std::memcpy(&r, p, sizeof r);
#endif
    return r;
}

LANE void istore(void* p, I16 a) {
#if PYROSOME_LEVEL == 2
    _mm512_storeu_si512(p, a.v);
#elif PYROSOME_LEVEL == 1
    EACH2 _mm256_storeu_si256(static_cast<__m256i*>(p) + i, a.v[i]);
#else
    std::memcpy(p, &a, sizeof a);
#endif
}

LANE I16 iload_halves(const uint16_t* p) {  // 16 times 16 bits, each a lane
    I16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
#else
    EACH16 r.v[i] = p[i];
#endif
    return r;
}

LANE I16 iload_bytes(const uint8_t* p) {  // 16 bytes, each a lane
    I16 r;
#if PYROSOME_LEVEL == 2
    r.v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif PYROSOME_LEVEL == 1
    EACH2 r.v[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
    EACH16 r.v[i] = p[i];
#endif
    return r;
}

#if PYROSOME_LEVEL == 2
#define INT2(name, wide, half, plain) \
    LANE I16 name(I16 a, I16 b) { return {_mm512_##wide(a.v, b.v)}; }
#elif PYROSOME_LEVEL == 1
#define INT2(name, wide, half, plain) \
    LANE I16 name(I16 a, I16 b) { return {{_mm256_##half(a.v[0], b.v[0]), _mm256_##half(a.v[1], b.v[1])}}; }
#else
#define INT2(name, wide, half, plain)  \
    LANE I16 name(I16 x, I16 y) {      \
        const Ints a = x.v, b = y.v;   \
        return {plain};                \
    }
#endif
INT2(operator+, add_epi32, add_epi32, (Ints)((Words)a + (Words)b))
INT2(operator-, sub_epi32, sub_epi32, (Ints)((Words)a - (Words)b))
INT2(operator&, and_si512, and_si256, a& b)
INT2(operator|, or_si512, or_si256, a | b)
INT2(operator^, xor_si512, xor_si256, a ^ b)
INT2(max, max_epi32, max_epi32, a > b ? a : b)
INT2(min, min_epi32, min_epi32, a < b ? a : b)
#undef INT2

template <int N>
LANE I16 shl(I16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_slli_epi32(a.v, N)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_slli_epi32(a.v[0], N), _mm256_slli_epi32(a.v[1], N)}};
#else
    I16 r;
    r.v = (Ints)((Words)a.v << N);
    return r;
#endif
}

template <int N>
LANE I16 shr(I16 a) {  // zeros come in
#if PYROSOME_LEVEL == 2
    return {_mm512_srli_epi32(a.v, N)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_srli_epi32(a.v[0], N), _mm256_srli_epi32(a.v[1], N)}};
#else
    I16 r;
    r.v = (Ints)((Words)a.v >> N);
    return r;
#endif
}

LANE F16 load_bf16(const uint16_t* p) { return as_float(shl<16>(iload_halves(p))); }

LANE I16 to_int(F16 a) {  // nearest, ties to even
#if PYROSOME_LEVEL == 2
    return {_mm512_cvtps_epi32(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}};
#else
    I16 r;
    EACH16 r.v[i] = static_cast<int32_t>(std::nearbyintf(a.v[i]));
    return r;
#endif
}

LANE F16 to_float(I16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_cvtepi32_ps(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}};
#else
    F16 r;
    r.v = __builtin_convertvector(a.v, Floats);
    return r;
#endif
}

// ---------------------------------------------------------------- comparisons
LANE Mask less(F16 a, F16 b) {  // false where either is NaN
#if PYROSOME_LEVEL == 2
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_cmp_ps(a.v[0], b.v[0], _CMP_LT_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_LT_OQ)}};
#else
    Mask r;
    r.v = a.v < b.v;
    return r;
#endif
}

LANE Mask greater(I16 a, I16 b) {
#if PYROSOME_LEVEL == 2
    return {_mm512_cmpgt_epi32_mask(a.v, b.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v[0], b.v[0])),
             _mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v[1], b.v[1]))}};
#else
    Mask r;
    r.v = a.v > b.v;
    return r;
#endif
}

LANE F16 select(Mask m, F16 a, F16 b) {  // a where true, else b
#if PYROSOME_LEVEL == 2
    return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_blendv_ps(b.v[0], a.v[0], m.v[0]), _mm256_blendv_ps(b.v[1], a.v[1], m.v[1])}};
#else
    F16 r;
    r.v = m.v ? a.v : b.v;
    return r;
#endif
}

LANE I16 select(Mask m, I16 a, I16 b) { return as_int(select(m, as_float(a), as_float(b))); }

LANE uint32_t bits_of(Mask m) {  // bit i is lane i
#if PYROSOME_LEVEL == 2
    return m.v;
#elif PYROSOME_LEVEL == 1
    return static_cast<uint32_t>(_mm256_movemask_ps(m.v[0])) | static_cast<uint32_t>(_mm256_movemask_ps(m.v[1])) << 8;
#else
    uint32_t r = 0;
    EACH16 r |= (m.v[i] & 1u) << i;
    return r;
#endif
}

// Integers that order as floats do: -0 is 0, and NaN is above all, so that a fault upstream shows.
LANE I16 order_of(F16 a) {
    I16 bits = as_int(a + zero());
    bits = select(greater(bits & iset1(0x7FFFFFFF), iset1(0x7F800000)), iset1(0x7FC00000), bits);
    return select(greater(iset1(0), bits), bits ^ iset1(0x7FFFFFFF), bits);
}

LANE int32_t most_of(I16 a) {  // the greatest of the lanes
#if PYROSOME_LEVEL == 2
    return _mm512_reduce_max_epi32(a.v);
#else
    int32_t l[16];
    istore(l, a);
    for (int i = 1; i < 16; ++i) l[0] = l[i] > l[0] ? l[i] : l[0];
    return l[0];
#endif
}
LANE int32_t least_of(I16 a) { return ~most_of(iset1(-1) - a); }  // ~ turns the order round

// ---------------------------------------------------------------- neighbours
LANE F16 swapped(F16 a) {  // lanes 2 i and 2 i + 1 exchanged
#if PYROSOME_LEVEL == 2
    return {_mm512_permute_ps(a.v, 0xB1)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_permute_ps(a.v[0], 0xB1), _mm256_permute_ps(a.v[1], 0xB1)}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[i ^ 1];
    return r;
#endif
}

LANE F16 evens(F16 a) {  // lane 2 i in both lanes of the pair
#if PYROSOME_LEVEL == 2
    return {_mm512_moveldup_ps(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_moveldup_ps(a.v[0]), _mm256_moveldup_ps(a.v[1])}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[i & ~1];
    return r;
#endif
}

LANE F16 odds(F16 a) {
#if PYROSOME_LEVEL == 2
    return {_mm512_movehdup_ps(a.v)};
#elif PYROSOME_LEVEL == 1
    return {{_mm256_movehdup_ps(a.v[0]), _mm256_movehdup_ps(a.v[1])}};
#else
    F16 r;
    EACH16 r.v[i] = a.v[i | 1];
    return r;
#endif
}

// F pairs of x, as complex numbers, times those of `turn` (sign 1) or their conjugates (-1).
LANE void turn_pairs(float* x, const float* turn, int64_t F, float sign) {
    alignas(64) const float way[16] = {-sign, sign, -sign, sign, -sign, sign, -sign, sign,
                                       -sign, sign, -sign, sign, -sign, sign, -sign, sign};
    for (int64_t i = 0; i < 2 * F; i += LANES) {
        const F16 a = load_part(x + i, 2 * F - i), t = load_part(turn + i, 2 * F - i);
        store_part(x + i, fma(a, evens(t), swapped(a) * (odds(t) * load(way))), 2 * F - i);
    }
}

// ---------------------------------------------------------------- functions
// e^x within 2 units in the last place; 0 below -87.33, where results would be subnormal; inf from 88.73; NaN of NaN.
LANE F16 exp(F16 x) {
    const F16 low = set1(-87.33f), high = set1(88.73f);
    const F16 y = max(low, min(high, x));  // this order keeps NaN
    const F16 shifted = fma(y, set1(1.44269504f), set1(12582912.0f));  // its last bits: the nearest integer to y / ln 2
    const F16 n = shifted - set1(12582912.0f);
    F16 r = fma(n, set1(-0.693145752f), y);
    r = fma(n, set1(-1.42860677e-6f), r);
    F16 p = set1(1.98756915e-4f);
    p = fma(p, r, set1(1.39819995e-3f));
    p = fma(p, r, set1(8.33345191e-3f));
    p = fma(p, r, set1(4.16657959e-2f));
    p = fma(p, r, set1(1.66666655e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r * r, r) + set1(1.0f);
    // 2^n in two steps: 2^128 is no float, 2^64 x 2^64 is infinite as it should be
    const I16 whole = as_int(shifted) - iset1(0x4B400000);
    const I16 half = as_int(fma(n, set1(0.5f), set1(12582912.0f))) - iset1(0x4B400000);
    const F16 one = as_float(shl<23>(half + iset1(127))), two = as_float(shl<23>(whole - half + iset1(127)));
    return select(less(x, low), zero(), p * one * two);
}

LANE F16 sigmoid(F16 x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

LANE float first(F16 a) {
#if PYROSOME_LEVEL == 2
    return _mm512_cvtss_f32(a.v);
#elif PYROSOME_LEVEL == 1
    return _mm256_cvtss_f32(a.v[0]);
#else
    return a.v[0];
#endif
}
LANE float exp1(float x) { return first(exp(set1(x))); }
LANE float sigmoid1(float x) { return first(sigmoid(set1(x))); }

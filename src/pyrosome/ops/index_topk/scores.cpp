// Scores of FP4 rows: score[t, n] = sum_h weight[t, h] relu(q[t, h] . key[n]), heads in order.
//
// Keys are read as they lie in their pages: sixteen rows at a time, their codes go to lanes as bytes and are multiplied
// by the query's own codes in integers.  A query that was rounded to FP4 is such codes times powers of two, so its
// products are exact; any other is multiplied in floats, by the same structure.
#include "indexer.h"

namespace indexer {
namespace {

constexpr int64_t HEADS = 4;                               // at once: a query's heads are padded to a multiple
constexpr int64_t TOGETHER = PYROSOME_LEVEL == 2 ? 2 : 1;  // blocks at once

// The 16 bytes of one group of 16 rows: out[w] has bytes 4 w .. 4 w + 3 of each.
LANE void transpose(const uint8_t* row, int64_t stride, I16* out) {
#if PYROSOME_LEVEL == 2
    __m512i part[4];  // quarter i of part j is of row 4 i + j
    for (int j = 0; j < 4; ++j) {
        const auto at = [&](int i) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (4 * i + j) * stride));
        };
        part[j] = _mm512_castsi128_si512(at(0));
        part[j] = _mm512_mask_broadcast_i32x4(part[j], 0x00F0, at(1));
        part[j] = _mm512_mask_broadcast_i32x4(part[j], 0x0F00, at(2));
        part[j] = _mm512_mask_broadcast_i32x4(part[j], 0xF000, at(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpackhi_epi32(part[0], part[1]);
    const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]), d = _mm512_unpackhi_epi32(part[2], part[3]);
    out[0].v = _mm512_unpacklo_epi64(a, c), out[1].v = _mm512_unpackhi_epi64(a, c);
    out[2].v = _mm512_unpacklo_epi64(b, d), out[3].v = _mm512_unpackhi_epi64(b, d);
#else
    uint8_t words[4][LANES][4];
    for (int r = 0; r < LANES; ++r)
        for (int w = 0; w < 4; ++w) std::memcpy(words[w][r], row + r * stride + 4 * w, 4);
    for (int w = 0; w < 4; ++w) out[w] = iload(words[w]);
#endif
}

// Half of what each E8M0 byte stands for.
struct Halves {
    float of[256];
    Halves() {
        for (int b = 0; b < 256; ++b) of[b] = 0.5f * e8m0_value(static_cast<uint8_t>(b));
    }
};
const Halves half_scale;

// 12 + twice the value of each byte's low (or high) e2m1 code.
template <bool HIGH>
LANE I16 bytes_of(I16 codes) {
#define ROW 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
    alignas(64) static const uint8_t table[64] = {ROW, ROW, ROW, ROW};
#undef ROW
#if PYROSOME_LEVEL == 2
    // Bits 4 and 5 of an index belong to another code; the table repeats, so they do not matter.
    const __m512i code = HIGH ? _mm512_srli_epi16(codes.v, 4) : codes.v;
    return {_mm512_permutexvar_epi8(code, _mm512_load_si512(table))};
#elif PYROSOME_LEVEL == 1
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(table)), low = _mm256_set1_epi8(15);
    I16 r;
    EACH2 {
        const __m256i code = HIGH ? _mm256_srli_epi16(codes.v[i], 4) : codes.v[i];
        r.v[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(code, low));
    }
    return r;
#else
    uint8_t b[64];
    istore(b, codes);
    for (int i = 0; i < 64; ++i) b[i] = table[HIGH ? b[i] >> 4 : b[i] & 15];
    return iload(b);
#endif
}

// The power of two, as an exponent with its bias, that takes the largest of some groups to 64 .. 127; 0 where that is too
// far away.
int32_t power_of(const float* x, int64_t groups) {
    I16 most = iset1(0);
    for (int64_t c = 0; c < groups * GROUP; c += LANES) most = max(most, as_int(load(x + c)) & iset1(0x7FFFFFFF));
    const int32_t top = most_of(most), exponent = top >> 23;
    if (!top) return 127;
    return exponent < 127 - 60 || exponent > 127 + 60 ? 0 : 127 + 6 - (exponent - 127);
}

LANE void store_bytes(int8_t* p, I16 v) {  // their low bytes
#if PYROSOME_LEVEL == 2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v.v));
#else
    int32_t lane[LANES];
    istore(lane, v);
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<int8_t>(lane[i]);
#endif
}

LANE uint32_t even_bytes(uint64_t x) {
    x &= 0x00FF00FF00FF00FFu, x = (x | x >> 8) & 0x0000FFFF0000FFFFu;
    return static_cast<uint32_t>(x | x >> 16);
}

// A group's channels, times that power of two, as integers of 8 bits; false where they are something else.
LANE bool take_codes(const float* x, int32_t power, int32_t* codes, int32_t* start) {
    const F16 times = as_float(iset1(power << 23)), over = as_float(iset1((254 - power) << 23));
    const F16 v[2] = {load(x), load(x + LANES)};
    const I16 whole[2] = {to_int(v[0] * times), to_int(v[1] * times)};
    const I16 rest = as_int(v[0] - to_float(whole[0]) * over) | as_int(v[1] - to_float(whole[1]) * over);
    if (bits_of(greater(rest & iset1(0x7FFFFFFF), iset1(0)))) return false;
    int8_t bytes[GROUP];
    store_bytes(bytes, whole[0]), store_bytes(bytes + LANES, whole[1]);
    for (int j = 0; j < FOURS; j += 2) {
        uint64_t eight;
        std::memcpy(&eight, bytes + 4 * j, sizeof eight);
        codes[j * HEADS] = static_cast<int32_t>(even_bytes(eight));
        codes[(j + 1) * HEADS] = static_cast<int32_t>(even_bytes(eight >> 8));
    }
    *start = -12 * static_cast<int32_t>(fold(to_float(whole[0] + whole[1])));  // exact
    return true;
}

// ---------------------------------------------------------------- scores
// sum[i] += four times four channels of the keys (256 bytes) by those of four heads' codes.
template <int B>
LANE void add_products(I16 (&sum)[B][HEADS], const uint8_t* keys, int64_t next, const int32_t* codes) {
#if PYROSOME_LEVEL == 2
    UNROLL for (int j = 0; j < 4; ++j) {
        __m512i k[B];
        UNROLL for (int b = 0; b < B; ++b) k[b] = _mm512_load_si512(keys + b * next + 64 * j);
        UNROLL for (int i = 0; i < HEADS; ++i) {
            const __m512i c = _mm512_set1_epi32(codes[j * HEADS + i]);
            UNROLL for (int b = 0; b < B; ++b) sum[b][i].v = _mm512_dpbusd_epi32(sum[b][i].v, k[b], c);
        }
    }
#elif PYROSOME_LEVEL == 1
    for (int b = 0; b < B; ++b)
        for (int i = 0; i < HEADS; ++i)
            for (int half = 0; half < 2; ++half) {
                __m256i pairs = _mm256_setzero_si256();  // at most 4 x 2 x 24 x 127: 16 bits do
                for (int j = 0; j < 4; ++j) {
                    const auto* at = reinterpret_cast<const __m256i*>(keys + b * next + 64 * j) + half;
                    const __m256i c = _mm256_set1_epi32(codes[j * HEADS + i]);
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_load_si256(at), c));
                }
                const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                sum[b][i].v[half] = _mm256_add_epi32(sum[b][i].v[half], fours);
            }
#else
    typedef int16_t Shorts __attribute__((vector_size(64), aligned(4), may_alias));
    for (int b = 0; b < B; ++b)
        for (int i = 0; i < HEADS; ++i) {
            Shorts pairs = {};
            for (int j = 0; j < 4; ++j) {
                int8_t c[4];
                std::memcpy(c, &codes[j * HEADS + i], 4);
                const Words k = (Words)iload(keys + b * next + 64 * j).v;
                const uint32_t even = (c[0] & 0xFFFFu) | static_cast<uint32_t>(c[2]) << 16;
                const uint32_t odd = (c[1] & 0xFFFFu) | static_cast<uint32_t>(c[3]) << 16;
                pairs += (Shorts)(k & 0x00FF00FFu) * (Shorts)(Words{} + even);
                pairs += (Shorts)(k >> 8 & 0x00FF00FFu) * (Shorts)(Words{} + odd);
            }
            sum[b][i].v += ((Ints)((Words)pairs << 16) >> 16) + ((Ints)pairs >> 16);
        }
#endif
}

// score[b] of B blocks of a page from `block` on, by a query in codes; EVEN where a head's groups have one power of two.
template <int B, bool EVEN>
void score_codes(const Page& page, int64_t block, const Query& q, int64_t H, int64_t G, Ahead& ahead, F16* score) {
    const int64_t next = G * FOURS * 64;
    const uint8_t* keys = page.codes + block * next;
    const float* key_scale = page.scales + block * G * LANES;
    const int32_t *codes = q.codes, *start = q.start;
    const float* scale = q.scale;
    F16 out[B];
    for (int b = 0; b < B; ++b) out[b] = zero();
    for (int64_t h = 0; h < H; h += HEADS) {
        ahead.fetch();
        F16 total[B][HEADS];
        UNROLL for (int b = 0; b < B; ++b)
            UNROLL for (int i = 0; i < HEADS; ++i) total[b][i] = zero();
        for (int64_t g = 0; g < G; ++g, codes += FOURS * HEADS, start += HEADS, scale += HEADS) {
            I16 sum[B][HEADS];
            UNROLL for (int b = 0; b < B; ++b)
                UNROLL for (int i = 0; i < HEADS; ++i) sum[b][i] = iset1(start[i]);
            add_products<B>(sum, keys + g * FOURS * 64, next, codes);
            add_products<B>(sum, keys + g * FOURS * 64 + 256, next, codes + 4 * HEADS);
            UNROLL for (int b = 0; b < B; ++b) {
                const F16 s = load(key_scale + (b * G + g) * LANES);
                UNROLL for (int i = 0; i < HEADS; ++i)
                    total[b][i] = EVEN ? fma(to_float(sum[b][i]), s, total[b][i])
                                       : fma(to_float(sum[b][i]) * s, set1(scale[i]), total[b][i]);
            }
        }
        UNROLL for (int b = 0; b < B; ++b)
            UNROLL for (int i = 0; i < HEADS; ++i) out[b] = fma(relu(total[b][i]), set1(q.weight[h + i]), out[b]);
    }
    for (int b = 0; b < B; ++b) score[b] = out[b];
}

// The score of one block by any query, whose keys have been widened.
F16 score_values(const Page& page, int64_t block, const float* keys, const Query& q, int64_t H, int64_t G) {
    const float* key_scale = page.scales + block * G * LANES;
    const float* values = q.values;
    F16 out = zero();
    for (int64_t h = 0; h < H; h += HEADS) {
        F16 total[HEADS];
        for (int i = 0; i < HEADS; ++i) total[i] = zero();
        for (int64_t g = 0; g < G; ++g) {
            F16 sum[HEADS];
            UNROLL for (int i = 0; i < HEADS; ++i) sum[i] = zero();
            for (int64_t c = 0; c < GROUP; ++c, values += HEADS) {
                const F16 k = load(keys + (g * GROUP + c) * LANES);
                UNROLL for (int i = 0; i < HEADS; ++i) sum[i] = fma(k, set1(values[i]), sum[i]);
            }
            UNROLL for (int i = 0; i < HEADS; ++i) total[i] = fma(sum[i], load(key_scale + g * LANES), total[i]);
        }
        for (int i = 0; i < HEADS; ++i) out = fma(relu(total[i]), set1(q.weight[h + i]), out);
    }
    return out;
}

}  // namespace

void unpack(const Keys& keys, int64_t page, const Page& out) {
    const uint8_t* codes = keys.codes + page * PAGE * keys.code_bytes;
    const uint8_t* scales = keys.scales + page * PAGE * keys.scale_bytes;
    for (int64_t b = 0; b < BLOCKS; ++b, codes += LANES * keys.code_bytes, scales += LANES * keys.scale_bytes)
        for (int64_t g = 0; g < keys.G; ++g) {
            I16 words[4];
            transpose(codes + g * GROUP / 2, keys.code_bytes, words);
            uint8_t* to = out.codes + (b * keys.G + g) * FOURS * 64;
            for (int w = 0; w < 4; ++w) {
                istore(to + 128 * w, bytes_of<false>(words[w]));
                istore(to + 128 * w + 64, bytes_of<true>(words[w]));
            }
            float* scale = out.scales + (b * keys.G + g) * LANES;
            for (int r = 0; r < LANES; ++r) scale[r] = half_scale.of[scales[r * keys.scale_bytes + g]];
        }
}

void widen(const Page& page, int64_t G, float* out) {
    const I16 byte = iset1(255), offset = iset1(12);
    for (int64_t j = 0; j < BLOCKS * G * FOURS; ++j, out += 4 * LANES) {
        const I16 four = iload(page.codes + 64 * j);
        store(out, to_float((four & byte) - offset));
        store(out + LANES, to_float((shr<8>(four) & byte) - offset));
        store(out + 2 * LANES, to_float((shr<16>(four) & byte) - offset));
        store(out + 3 * LANES, to_float(shr<24>(four) - offset));
    }
}

Query prepare(const float* q, const float* weight, int64_t H, int64_t G, int64_t limit, Scratch& scratch) {
    const int64_t padded = (H + HEADS - 1) / HEADS * HEADS, C = G * GROUP;
    Query r{false, false, nullptr, nullptr, nullptr, nullptr, nullptr, limit};
    r.codes = scratch.take<int32_t>(padded * C / 4), r.start = scratch.take<int32_t>(padded * G);
    r.scale = scratch.take<float>(padded * G), r.weight = scratch.take<float>(padded);
    std::fill(r.codes, r.codes + padded * C / 4, 0);
    std::fill(r.start, r.start + padded * G, 0);
    std::fill(r.scale, r.scale + padded * G, 0.0f);
    std::fill(r.weight + H, r.weight + padded, 0.0f);
    const auto take = [&](int64_t each) {  // groups that share a power of two
        for (int64_t h = 0; h < H; ++h)
            for (int64_t g = 0, power = 0; g < G; ++g) {
                const int64_t at = h / HEADS * G + g, i = h % HEADS;
                const float* x = q + h * C + g * GROUP;
                if (g % each == 0 && !(power = power_of(x, each))) return false;
                if (!take_codes(x, power, r.codes + at * FOURS * HEADS + i, r.start + at * HEADS + i)) return false;
                r.scale[at * HEADS + i] = first(as_float(iset1((254 - power) << 23)));
            }
        return true;
    };
    const auto fold_scales = [&] {
        for (int64_t h = 0; h < H; ++h) {
            const float s = r.scale[h / HEADS * G * HEADS + h % HEADS];
            r.weight[h] = weight[h] * s;
            if (!(r.weight[h] / s == weight[h])) return false;
        }
        return true;
    };
    r.whole = r.even = take(G) && fold_scales();
    if (r.even) return r;
    r.whole = take(1);
    std::copy(weight, weight + H, r.weight);
    if (r.whole) return r;
    r.values = scratch.take<float>(padded * C);
    std::fill(r.values, r.values + padded * C, 0.0f);
    for (int64_t h = 0; h < H; ++h)
        for (int64_t c = 0; c < C; ++c) {  // place c of a Page's order
            const int64_t channel = c / 8 * 8 + c % 4 * 2 + c / 4 % 2;
            r.values[(h / HEADS * C + c) * HEADS + h % HEADS] = q[h * C + channel];
        }
    return r;
}

void score_page(const Page& page, const float* wide, const Query& q, int64_t blocks, int64_t H, int64_t G, Ahead& ahead,
                F16* score) {
    int64_t b = 0;
    ahead.lines = (ahead.bytes / 64 + 1) * TOGETHER * HEADS / (blocks * H) + 1;
    if (q.whole) {
        const auto several = q.even ? score_codes<TOGETHER, true> : score_codes<TOGETHER, false>;
        const auto one = q.even ? score_codes<1, true> : score_codes<1, false>;
        for (; b + TOGETHER <= blocks; b += TOGETHER) several(page, b, q, H, G, ahead, score + b);
        for (; b < blocks; ++b) one(page, b, q, H, G, ahead, score + b);
    }
    for (; b < blocks; ++b) score[b] = score_values(page, b, wide + b * G * GROUP * LANES, q, H, G);
}

}  // namespace indexer

// Attention over rows that bfloat16 holds exactly: products of bfloat16 pairs, a running softmax over splits of 128 keys
// in order, the sink, and the rotation back, in one pass.
//
// Queries are rounded to bfloat16, and so are the softmax's weights, as the official kernel does.  Scores have heads
// across lanes (one row serves all of them), outputs have channels.
#include <limits>

#include "../rows.h"
#include "../tiles.h"

namespace {

constexpr int64_t SPLIT = 128;
constexpr int64_t PAGE_ROWS = 64;
constexpr int64_t AHEAD = 4;  // rows asked for before they are read
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

    int64_t page_place(int64_t t, int64_t i) const {
        return table[span[t] * width + i / PAGE_ROWS] * PAGE_ROWS + i % PAGE_ROWS;
    }

    // Asks memory for a row that will be read soon: chosen rows lie anywhere.
    void ask(int64_t t, int64_t i) const {
        if (kind != 0) return;
        const int64_t place = page_place(t, i);
        for (int64_t at = 0; at < data_bytes; at += 64) __builtin_prefetch(data + place * data_bytes + at);
        __builtin_prefetch(scale + place * scale_bytes);
    }

    void read(int64_t t, int64_t i, int64_t C, uint16_t* out) const {
        int64_t place;
        if (kind == 0) {
            place = page_place(t, i);
        } else {
            const int64_t at = i - 1;  // 0 stands for nothing
            if (at < 0) return std::fill_n(out, C, static_cast<uint16_t>(0)), void();
            if (at >= spans * ring_rows) {
                const float* row = fresh + (at - spans * ring_rows) * C;
                for (int64_t c = 0; c < C; ++c) {
                    uint32_t bits;
                    std::memcpy(&bits, row + c, sizeof bits);
                    out[c] = static_cast<uint16_t>(bits >> 16);
                }
                return;
            }
            place = slot[at / ring_rows] * ring_rows + at % ring_rows;
        }
        decode_row(data + place * data_bytes, scale + place * scale_bytes, nope, C, out);
    }
};

// Words of neighbouring rows: out[c] = first[c] in the high half, second[c] in the low.
LANE void interleave(const uint16_t* first_row, const uint16_t* second_row, int64_t count, uint32_t* out) {
    for (int64_t c = 0; c < count; c += LANES)
        istore(out + c, shl<16>(iload_halves(first_row + c)) | iload_halves(second_row + c));
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

// One token, `heads` of its heads from h0 on; lanes = heads rounded up to whole tiles of 32 or 64.
struct Work {
    int64_t H, C, F;
    int64_t W;  // C rounded up to a multiple of 32, zeros past C
    float scale;
    const Source* source;
    int64_t parts;
    const float* sink;

    void run(int64_t t, int64_t h0, int64_t heads, int64_t lanes, const float* q, const float* turn, float* out) const {
        Scratch scratch;
        const int64_t words = W / 2, strips = lanes / STRIP;
        auto* query = scratch.take<uint32_t>(words * lanes);  // [pair of channels][head]
        auto* rows = scratch.take<uint16_t>((SPLIT + 1) * W);
        auto* values = scratch.take<uint32_t>(SPLIT / 2 * TILE);  // [pair of keys][channel], of a block of channels
        auto* score = scratch.take<float>(SPLIT * lanes);      // [key][head]
        auto* weight = scratch.take<uint32_t>(lanes * SPLIT / 2);   // [pair of keys][head], then turned
        auto* turned = scratch.take<uint32_t>(lanes * SPLIT / 2);   // [head][pair of keys]
        auto* o = scratch.take<float>(lanes * W);
        auto* top = scratch.take<float>(lanes);
        auto* mass = scratch.take<float>(lanes);
        std::fill(o, o + lanes * W, 0.0f);
        std::fill(top, top + lanes, -std::numeric_limits<float>::infinity());
        std::fill(mass, mass + lanes, 0.0f);
        load_query(q + (t * H + h0) * C, heads, lanes, query, o);
        std::fill(o, o + lanes * W, 0.0f);
        if (W > C) std::fill(rows, rows + (SPLIT + 1) * W, static_cast<uint16_t>(0));
        for (int64_t p = 0; p < parts; ++p) {
            const Source& s = source[p];
            const int64_t* index = s.index + t * s.K;
            for (int64_t k0 = 0; k0 < s.K; k0 += SPLIT) {
                int64_t n = 0;
                const int64_t k1 = std::min(s.K, k0 + SPLIT);
                for (int64_t k = k0; k < k1; ++k) {
                    if (k + AHEAD < s.K && index[k + AHEAD] >= 0) s.ask(t, index[k + AHEAD]);
                    if (index[k] >= 0) s.read(t, index[k], C, rows + n++ * W);
                }
                if (!n) continue;
                std::fill(score, score + n * lanes, 0.0f);
                for (int64_t w = 0; w < words; w += SEGMENT)  // the queries of a segment stay in a core's first cache
                    multiply_pairs(reinterpret_cast<const uint32_t*>(rows) + w, words, query + w * lanes,
                                   std::min(SEGMENT, words - w), score, lanes, n, strips);
                softmax(score, n, lanes, top, mass, weight, o);
                if (n % 2) std::fill(rows + n * W, rows + (n + 1) * W, static_cast<uint16_t>(0));
                const int64_t pairs = (n + 1) / 2;
                for (int64_t i = 0; i < (pairs + 15) / 16 * 16; i += 16)
                    for (int64_t h = 0; h < lanes; h += 16)
                        transpose(weight + i * lanes + h, lanes, turned + h * (SPLIT / 2) + i, SPLIT / 2);
                for (int64_t c = 0; c < W; c += TILE) {
                    const int64_t wide = std::min(TILE, W - c), block = wide > 32 ? 64 : 32;
                    for (int64_t i = 0; i < pairs; ++i)
                        interleave(rows + 2 * i * W + c, rows + (2 * i + 1) * W + c, block, values + i * block);
                    multiply_pairs(turned, SPLIT / 2, values, pairs, o + c, W, heads, block / STRIP);
                }
            }
        }
        finish(h0, heads, top, mass, o, turn + t * F * 2, out + (t * H + h0) * C);
    }

    // Queries as pairs with heads across lanes; `spare` holds a row for each lane meanwhile.
    void load_query(const float* q, int64_t heads, int64_t lanes, uint32_t* query, float* spare) const {
        const int64_t words = W / 2;
        auto* pairs = reinterpret_cast<uint32_t*>(spare);  // [head][pair], as the rows have them: the earlier one low
        for (int64_t h = 0; h < heads; ++h) {
            uint32_t bits[16];
            for (int64_t c = 0; c < C; c += LANES) {
                istore(bits, round_bf16(load_part(q + h * C + c, C - c)));
                for (int i = 0; i < 8; ++i) pairs[h * words + c / 2 + i] = bits[2 * i + 1] | bits[2 * i] >> 16;
            }
        }
        for (int64_t h = 0; h < lanes; h += 16)
            for (int64_t w = 0; w < words; w += 16) transpose(pairs + h * words + w, words, query + w * lanes + h, lanes);
    }

    // Scores of n keys to weights e^(score - top) as pairs of keys, with a new running maximum: what was summed so far is
    // scaled down to it.
    void softmax(float* score, int64_t n, int64_t lanes, float* top, float* mass, uint32_t* weight, float* o) const {
        const F16 times = set1(scale);
        for (int64_t h = 0; h < lanes; h += LANES) {
            F16 high = load(top + h);
            for (int64_t k = 0; k < n; ++k) {
                const F16 s = load(score + k * lanes + h) * times;
                store(score + k * lanes + h, s);
                high = max(high, s);
            }
            const F16 keep = exp(load(top + h) - high);
            F16 sum = zero();
            for (int64_t k = 0; k < n; k += 2) {
                const F16 a = exp(load(score + k * lanes + h) - high);
                const F16 b = k + 1 < n ? exp(load(score + (k + 1) * lanes + h) - high) : zero();
                sum = sum + a;
                sum = sum + b;
                istore(weight + k / 2 * lanes + h, round_bf16(a) | shr<16>(round_bf16(b)));
            }
            for (int64_t i = (n + 1) / 2; i < (n + 31) / 32 * 16; ++i) istore(weight + i * lanes + h, iset1(0));
            store(mass + h, fma(load(mass + h), keep, sum));
            store(top + h, high);
            float factor[16];
            store(factor, keep);
            for (int i = 0; i < LANES; ++i)
                if (factor[i] != 1.0f && mass[h + i] > 0)
                    for (int64_t c = 0; c < W; c += LANES) store(o + (h + i) * W + c, load(o + (h + i) * W + c) * set1(factor[i]));
        }
    }

    void finish(int64_t h0, int64_t heads, const float* top, const float* mass, float* o, const float* turn, float* out) const {
        for (int64_t h = 0; h < heads; ++h) {
            const float high = std::max(top[h], sink[h0 + h]);
            const float share = mass[h] > 0 ? exp1(top[h] - high) : 0.0f;
            const float total = mass[h] * share + exp1(sink[h0 + h] - high);
            const F16 factor = set1(mass[h] > 0 ? share / total : mass[h] == mass[h] ? 0.0f : mass[h]);
            for (int64_t c = 0; c < C; c += LANES) store_part(out + h * C + c, load(o + h * W + c) * factor, C - c);
            turn_pairs(out + h * C + C - 2 * F, turn, F, -1.0f);
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
    const int64_t block = H <= 32 || T < threads ? 32 : 64, blocks = (H + block - 1) / block;
    const Work work{H, C, F, (C + 31) / 32 * 32, scale, source, parts, sink};
    parallel(T * blocks, threads, [&](int64_t part) {
        const int64_t h0 = part % blocks * block, heads = std::min(block, H - h0);
        work.run(part / blocks, h0, heads, heads > 32 ? 64 : 32, q, turn, out);
    });
}

// Weights re-laid from rows to tiles, at about the rate at which memory is copied: a load spends its time here.
//
// SIDE outputs by SIDE words of 4 bytes are transposed in registers, so that a block is written whole; what is left at
// the edges of a matrix goes word by word.
#include "tiles.h"

namespace {

#define UNROLL16 _Pragma("GCC unroll 16")

constexpr int64_t WORD = 4;     // bytes of one output in a block
constexpr int64_t AHEAD = 512;  // bytes of a row asked for ahead of their use: tried, not derived

template <bool FP4>
constexpr int64_t BLOCKS = (FP4 ? 16 : 128) / WORD;  // of one strip, in a group

// Four bytes of a row -> the lane's word of a block.
LANE uint32_t fp4_word(uint32_t bytes) {  // inputs k0..k7, low nibbles even: evens to the high half, odds to the low
    const auto close = [](uint32_t y) {
        y = (y | y >> 4) & 0x00FF00FFu;
        return (y | y >> 8) & 0xFFFFu;
    };
    return close(bytes & 0x0F0F0F0Fu) << 16 | close(bytes >> 4 & 0x0F0F0F0Fu);
}

// A word of a row that has `left` bytes from there on -> lane `lane` of a block; zeros where it has none.
template <bool FP4>
LANE void put_word(const uint8_t* from, int64_t left, uint8_t* block, int64_t lane) {
    uint32_t bytes = 0;
    if (left >= WORD) std::memcpy(&bytes, from, WORD);
    else if (left > 0) std::memcpy(&bytes, from, static_cast<size_t>(left));
    if (FP4) {
        const uint32_t word = fp4_word(bytes);
        std::memcpy(block + 4 * lane, &word, 4);
    } else {  // pair 0 in the first 8 bytes of each 16, pair 1 in the others; the earlier input high
        uint8_t* at = block + lane / 4 * 16 + lane % 4 * 2;
        at[0] = static_cast<uint8_t>(bytes >> 8), at[1] = static_cast<uint8_t>(bytes);
        at[8] = static_cast<uint8_t>(bytes >> 24), at[9] = static_cast<uint8_t>(bytes >> 16);
    }
}

// ---------------------------------------------------------------- SIDE words of SIDE rows at once
#if PYROSOME_LEVEL == 2
using Vector = __m512i;
constexpr int SIDE = 16;

LANE void transpose(const uint8_t* from, int64_t stride, Vector* out) {
    Vector r[16], pair[16];
    UNROLL16 for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
    UNROLL16 for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL16 for (int i = 0; i < 16; i += 4) {  // r[i + c]: in its quarter l, word 4 l + c of rows i .. i + 3
        r[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    UNROLL16 for (int c = 0; c < 4; ++c) {
        const Vector even0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const Vector odd0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);
        const Vector even1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const Vector odd1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
        out[c] = _mm512_shuffle_i32x4(even0, even1, 0x88), out[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
        out[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88), out[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
    }
}

LANE Vector bytes_of(__m128i order, Vector v) { return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order)); }

LANE void put(uint8_t* to, Vector v, bool past_caches) {
    if (past_caches) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
    else _mm512_storeu_si512(to, v);
}
#elif PYROSOME_LEVEL == 1
using Vector = __m256i;
constexpr int SIDE = 8;

LANE void transpose(const uint8_t* from, int64_t stride, Vector* out) {
    Vector r[8], pair[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]), pair[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // r[i + c]: in its half l, word 4 l + c of rows i .. i + 3
        r[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]), r[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        out[c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20);
        out[4 + c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
    }
}

LANE Vector bytes_of(__m128i order, Vector v) { return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order)); }

LANE void put(uint8_t* to, Vector v, bool past_caches) {
    if (past_caches) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v);
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}
#else
constexpr int SIDE = 0;
#endif

// `past_caches`: `to` and `size` are whole lines, which are written without being fetched first.
LANE void put_line(uint8_t* to, const uint8_t* from, int64_t size, bool past_caches) {
#if PYROSOME_LEVEL > 0
    for (int64_t i = 0; past_caches && i < size; i += SIDE * WORD) {
        Vector v;
        std::memcpy(&v, from + i, sizeof v);
        put(to + i, v, true);
    }
#endif
    if (!past_caches) std::memcpy(to, from, static_cast<size_t>(size));
}

#if PYROSOME_LEVEL > 0
// Words of four scales, one of each group, of SIDE outputs -> SIDE bytes of each group, `step` bytes apart.
LANE void put_scales(uint8_t* to, int64_t step, Vector words) {
    const Vector close = bytes_of(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), words);
#if PYROSOME_LEVEL == 2
    const Vector order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const Vector bytes = _mm512_permutexvar_epi32(order, close);
#else
    const Vector bytes = _mm256_permutevar8x32_epi32(close, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
    uint8_t rows[4][SIDE];
    std::memcpy(rows, &bytes, sizeof rows);
    for (int g = 0; g < 4; ++g) std::memcpy(to + g * step, rows[g], SIDE);
}

// What `put_word` does to each word of a block.
template <bool FP4>
LANE Vector lay(Vector words) {
    if (!FP4) return bytes_of(_mm_setr_epi8(1, 0, 5, 4, 9, 8, 13, 12, 3, 2, 7, 6, 11, 10, 15, 14), words);
    // Of the four nibbles of 16 bits the second and the third change places: even inputs are then bytes 0 and 2 of a
    // word, and odd ones bytes 1 and 3.
    typedef uint32_t Lanes __attribute__((vector_size(sizeof(Vector))));
    const Lanes w = (Lanes)words;
    const Lanes parted = (w & 0xF00FF00Fu) | (w >> 4 & 0x00F000F0u) | (w << 4 & 0x0F000F00u);
    return bytes_of(_mm_setr_epi8(1, 3, 0, 2, 5, 7, 4, 6, 9, 11, 8, 10, 13, 15, 12, 14), (Vector)parted);
}
#endif

// `past_caches`: the tile is not read soon, so its lines need not be fetched before they are written.
template <bool FP4>
void pack(const Weight& w, int64_t tile, uint8_t* out, bool past_caches) {
    constexpr int64_t IN_GROUP = BLOCKS<FP4>;
    const int64_t n0 = tile * TILE, N = std::min(TILE, w.N - n0), strips = N > 32 ? 4 : 2;
    const int64_t row_bytes = FP4 ? w.K / 2 : w.K, groups = (w.K + (FP4 ? 31 : 127)) / (FP4 ? 32 : 128);
    const int64_t group_bytes = strips * (IN_GROUP * 64 + STRIP);
    const uint8_t* rows = w.data + n0 * row_bytes;
    const auto block = [&](int64_t b, int64_t v) {
        return out + b / IN_GROUP * group_bytes + (b % IN_GROUP * strips + v) * 64;
    };
    const auto scales = [&](int64_t n) {  // of output n: a byte for each group
        return w.scale + (FP4 ? w.row + n0 + n : (w.row + n0 + n) / 128) * groups;
    };
    Scratch scratch;  // a line of scales is put together here and written once
    const int64_t wide = strips * STRIP;
    auto* lines = scratch.take<uint8_t>(groups * wide);
    past_caches = past_caches && SIDE > 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && group_bytes % 64 == 0;
    int64_t whole = 0, fast = 0, fast_scales = 0;  // strips, and their blocks and scales, that go through registers
#if PYROSOME_LEVEL > 0
    whole = N / STRIP, fast = row_bytes / (SIDE * WORD) * SIDE;
    for (int64_t b = 0; b < fast; b += SIDE) {
        const int64_t ahead = b * WORD + AHEAD < row_bytes ? AHEAD : AHEAD + (TILE - 1) * row_bytes;  // the next tile
        for (int64_t n = 0; n < whole * STRIP; n += STRIP) {
            const uint8_t* from = rows + n * row_bytes + b * WORD;
            for (int i = 0; i < STRIP; ++i) __builtin_prefetch(from + i * row_bytes + ahead);
            Vector words[STRIP / SIDE][SIDE];
            UNROLL16 for (int h = 0; h < STRIP / SIDE; ++h) transpose(from + h * SIDE * row_bytes, row_bytes, words[h]);
            UNROLL16 for (int i = 0; i < SIDE; ++i)  // a line whole before the next: it leaves in one piece
                UNROLL16 for (int h = 0; h < STRIP / SIDE; ++h)
                    put(block(b + i, n / STRIP) + h * SIDE * WORD, lay<FP4>(words[h][i]), past_caches);
        }
    }
    if (FP4) {
        fast_scales = groups / (SIDE * WORD) * SIDE * WORD;
        for (int64_t n = 0; n < whole * STRIP; n += SIDE)
            for (int64_t g = 0; g < fast_scales; g += SIDE * WORD) {
                Vector words[SIDE];
                transpose(scales(n) + g, groups, words);
                for (int i = 0; i < SIDE; ++i) put_scales(lines + (g + i * WORD) * wide + n, wide, words[i]);
            }
    }
#endif
    for (int64_t n = 0; n < wide; ++n) {
        const bool done = n < whole * STRIP;
        const int64_t bytes = n < N ? row_bytes : 0;  // outputs past the matrix: zeros, under a scale of one
        for (int64_t b = done ? fast : 0; b < groups * IN_GROUP; ++b)
            put_word<FP4>(rows + n * row_bytes + b * WORD, bytes - b * WORD, block(b, n / STRIP), n % STRIP);
        for (int64_t g = done ? fast_scales : 0; g < groups; ++g)
            lines[g * wide + n] = n < N ? scales(n)[g] : 127;
    }
    uint8_t* to = out + IN_GROUP * strips * 64;
    for (int64_t g = 0; g < groups; ++g, to += group_bytes) put_line(to, lines + g * wide, wide, past_caches);
#if PYROSOME_LEVEL > 0
    if (past_caches) _mm_sfence();  // before another thread is told that the tile is there
#endif
}

}  // namespace

void pack_tile(const Weight& w, int64_t tile, uint8_t* out, bool past_caches) {
    if (w.format == FP4) pack<true>(w, tile, out, past_caches);
    else pack<false>(w, tile, out, past_caches);
}

// Re-lays `count` matrices, each [N, K] in rows, as tiles, one after the other.
EXPORT void pyrosome_tile(const Weight* rows, int64_t count, uint8_t* out, int threads) {
    const int64_t tiles = num_tiles(rows->N), each = tiled_bytes(rows->format, rows->N, rows->K);
    const int64_t whole = tiled_bytes(rows->format, TILE, rows->K);
    parallel(count * tiles, worth(count * each, threads), [&](int64_t part) {
        const int64_t tile = part % tiles;
        pack_tile(rows->of(part / tiles), tile, out + part / tiles * each + tile * whole, true);
    });
}

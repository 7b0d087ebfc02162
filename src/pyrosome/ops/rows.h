// Rows of the cache as they are stored (quant/rows.py): decoded to bfloat16, which holds every value exactly.
#pragma once
#include "native.h"

// 64 e4m3 codes under one scale byte, as bfloat16 in order of channels; NaN under byte 255.
LANE void decode_group(const uint8_t* codes, uint8_t byte, uint16_t* out) {
#if PYROSOME_LEVEL == 2
    const __m512i v = _mm512_loadu_si512(codes);
    const __m512i h0 = _mm512_load_si512(e4m3.high), h1 = _mm512_load_si512(e4m3.high + 64);
    const __m512i l0 = _mm512_load_si512(e4m3.low), l1 = _mm512_load_si512(e4m3.low + 64);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(h0, v, h1), v, sign, 0xF8);
    const __m512i low = _mm512_permutex2var_epi8(l0, v, l1);
    const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i size = _mm512_set1_epi16(0x7FFF), shift = _mm512_set1_epi16(static_cast<short>((byte - 127) * 128));
    __m512i part[2] = {_mm512_permutex2var_epi64(a, first, b), _mm512_permutex2var_epi64(a, last, b)};
    for (int i = 0; i < 2; ++i) {
        part[i] = _mm512_mask_add_epi16(part[i], _mm512_test_epi16_mask(part[i], size), part[i], shift);
        if (byte == 255) part[i] = _mm512_set1_epi16(0x7FC0);
        _mm512_storeu_si512(out + 32 * i, part[i]);
    }
#else
    const float scale = e8m0_value(byte);
    for (int i = 0; i < 64; ++i) {
        const float value = e4m3_value(codes[i]) * scale;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        out[i] = static_cast<uint16_t>(value == value ? bits >> 16 : 0x7FC0);
    }
#endif
}

// A row of C channels, of which `nope` in e4m3 (0: all are bfloat16 already).
LANE void decode_row(const uint8_t* data, const uint8_t* scale, int64_t nope, int64_t C, uint16_t* out) {
    for (int64_t c = 0; c < nope; c += 64) decode_group(data + c, scale[c / 64], out + c);
    const uint8_t* plain = data + nope;
    int64_t c = nope;
    for (; c + 32 <= C; c += 32, plain += 64) istore(out + c, iload(plain));
    if (c < C) std::memcpy(out + c, plain, (C - c) * sizeof(uint16_t));
}

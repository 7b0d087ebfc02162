// Rounding where the weights were trained with it (quant/activation.py), and rows to their stored bytes (quant/rows.py).
#pragma once
#include "native.h"

// A group of `count` values, at most 64, to FP8 and back; gives the scale.
LANE float round_fp8_group(float* x, int64_t count) {
    F16 v[4];
    for (int i = 0; i < 4; ++i) v[i] = count > 16 * i ? load_part(x + 16 * i, count - 16 * i) : zero();
    const float scale = round_fp8(v, 4);
    for (int i = 0; i < 4; ++i)
        if (count > 16 * i) store_part(x + 16 * i, v[i], count - 16 * i);
    return scale;
}

LANE void round_kv(float* x, int64_t nope) {
    for (int64_t c = 0; c < nope; c += 64) round_fp8_group(x + c, std::min<int64_t>(64, nope - c));
}

// x times the normalised Walsh-Hadamard matrix, C a power of two, in place.
LANE void hadamard(float* x, int64_t C, float norm) {
    for (int64_t half = 1; half < C; half *= 2)
        for (int64_t i = 0; i < C; i += 2 * half)
            for (int64_t j = i; j < i + half; ++j) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    for (int64_t c = 0; c < C; ++c) x[c] *= norm;
}

// A value of magnitude up to 6 to the nearest e2m1 value, ties to even.
LANE F16 to_e2m1(F16 v) {
    const I16 exponent = max(as_int(v) & iset1(0x7F800000), iset1(127 << 23));
    const F16 shift = as_float(exponent + iset1((22 << 23) | (1 << 22)));
    return signed_as((v + shift) - shift, v);
}

// Two vectors, a group of 32, to FP4 and back in units of the scale that is given back.
LANE float fp4_group(F16* v) {
    const float scale = group_scale(largest_bits(v, 2), 7.0527966e-38f, 6.0f);
    const F16 over = set1(1.0f / scale);
    for (int i = 0; i < 2; ++i) v[i] = to_e2m1(v[i] * over);
    return scale;
}

LANE void round_fp4_groups(float* x, int64_t C) {
    for (int64_t c = 0; c < C; c += 32) {
        F16 v[2] = {load_part(x + c, C - c), C - c > 16 ? load_part(x + c + 16, C - c - 16) : zero()};
        const F16 scale = set1(fp4_group(v));
        store_part(x + c, v[0] * scale, C - c);
        if (C - c > 16) store_part(x + c + 16, v[1] * scale, C - c - 16);
    }
}

// ---------------------------------------------------------------- stored bytes
LANE uint8_t scale_byte(float scale) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof bits);
    return static_cast<uint8_t>(bits >> 23 & 255);
}

// The e4m3 code of a value that is one.
LANE uint8_t e4m3_code(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint32_t sign = bits >> 24 & 128, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return static_cast<uint8_t>(sign | 127);
    if (size < (127u - 6) << 23) return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::fabs(v) * 512.0f));
    return static_cast<uint8_t>(sign | ((size >> 20) - (120u << 3)));
}

// A KV row as FP8 rows store it: `nope` codes, then bfloat16; a scale byte per 64 codes, the rest of `scale_bytes` zero.
LANE void encode_fp8_row(const float* x, int64_t nope, int64_t C, uint8_t* data, uint8_t* scale, int64_t scale_bytes) {
    if (scale_bytes) std::memset(scale, 0, scale_bytes);
    for (int64_t c = 0; c < nope; c += 64) {
        F16 v[4];
        for (int i = 0; i < 4; ++i) v[i] = load(x + c + 16 * i);
        const float s = group_scale(largest_bits(v, 4), 1e-4f, 448.0f);
        const F16 over = set1(1.0f / s);
        float codes[64];
        for (int i = 0; i < 4; ++i) store(codes + 16 * i, to_e4m3(v[i] * over));
        for (int i = 0; i < 64; ++i) data[c + i] = e4m3_code(codes[i]);
        scale[c / 64] = scale_byte(s);
    }
    for (int64_t c = nope; c < C; c += LANES) {
        uint32_t bits[16];
        istore(bits, round_bf16(load_part(x + c, C - c)));
        for (int64_t i = 0; i < std::min<int64_t>(LANES, C - c); ++i) {
            const uint16_t half = static_cast<uint16_t>(bits[i] >> 16);
            std::memcpy(data + nope + 2 * (c - nope + i), &half, 2);
        }
    }
}

// An index key as FP4 rows store it: nibbles, low first, and a scale byte per 32 channels.
LANE void encode_fp4_row(const float* x, int64_t C, uint8_t* data, uint8_t* scale) {
    for (int64_t c = 0; c < C; c += 32) {
        F16 v[2] = {load(x + c), load(x + c + 16)};
        scale[c / 32] = scale_byte(fp4_group(v));
        float size[32];
        store(size, v[0]), store(size + 16, v[1]);
        const auto code = [&](int i) {
            const int twice = static_cast<int>(std::fabs(size[i]) * 2.0f);  // 0 1 2 3 4 6 8 12
            const int level = twice <= 4 ? twice : twice == 6 ? 5 : twice == 8 ? 6 : 7;
            return static_cast<uint8_t>(level | (std::signbit(size[i]) ? 8 : 0));
        };
        for (int i = 0; i < 32; i += 2) data[(c + i) / 2] = static_cast<uint8_t>(code(i) | code(i + 1) << 4);
    }
}

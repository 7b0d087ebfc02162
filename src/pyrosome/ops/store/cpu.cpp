// Rows to where the cache keeps them.
#include "../round.h"

// Row m of x [M, C] to place[m] (negative: nowhere).  kind 0: float32; 1: bfloat16; 2: FP8 rows with `nope` codes; 3: FP4.
// The places of one call differ, but for those that nobody reads.
EXPORT void pyrosome_store_rows(const float* x, const int64_t* place, int64_t M, int64_t C, int kind, int64_t nope,
                                uint8_t* data, int64_t data_bytes, uint8_t* scale, int64_t scale_bytes) {
    for (int64_t m = 0; m < M; ++m) {
        if (place[m] < 0) continue;
        const float* row = x + m * C;
        uint8_t* to = data + place[m] * data_bytes;
        switch (kind) {
            case 0: std::memcpy(to, row, C * sizeof(float)); break;
            case 1: encode_fp8_row(row, 0, C, to, nullptr, 0); break;
            case 2: encode_fp8_row(row, nope, C, to, scale + place[m] * scale_bytes, scale_bytes); break;
            default: encode_fp4_row(row, C, to, scale + place[m] * scale_bytes);
        }
    }
}

// out = x [M, C] as its stored form would give it back.
EXPORT void pyrosome_round_trip(const float* x, float* out, int64_t M, int64_t C, int kind, int64_t nope) {
    std::memcpy(out, x, M * C * sizeof(float));
    for (int64_t m = 0; m < M; ++m) {
        float* row = out + m * C;
        if (kind == 3) {
            round_fp4_groups(row, C);
        } else if (kind) {
            round_kv(row, nope);
            for (int64_t c = nope; c < C; c += LANES) store_part(row + c, as_float(round_bf16(load_part(row + c, C - c))), C - c);
        }
    }
}

// What every kernel shares: the vector levels, one thread pool, and the order in which a dot product is summed.
//
// The order is part of the meaning: product k goes to lane k % 16, each lane adds its products in order of k by fused
// multiply-add, and the lanes are folded in halves (16 -> 8 -> 4 -> 2 -> 1).  It depends on K alone, never on how many
// rows or outputs are computed together, so a row's bits are the same alone and in any batch, at every level below.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__x86_64__) && !defined(PYROSOME_PORTABLE)
#include <immintrin.h>
#define X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#else
#define X86 0
#endif

enum Level { PORTABLE = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2 };
Level level();  // what this machine has, or what was forced

// A weight as stored, [N, K] logical: what `quant.formats` calls it, its bytes, and one scale byte per block.
struct Stored {
    int format;  // 0 float32, 1 fp8 (e4m3, 128 x 128 blocks), 2 fp4 (e2m1 pairs, 32 inputs of one row), 3 bfloat16
    const void* data;
    const uint8_t* scale;
};
constexpr int64_t TILE_N = 16;  // rows of a stored weight widened at once

// Rows n0..n1 of w as float32: in place where they are that already, else widened into `scratch` [n1 - n0, K].
const float* widened(const Stored& w, int64_t n0, int64_t n1, int64_t K, float* scratch);

// y[m, n0..n1] for M rows of x given by address; `w` holds rows n0..n1.  The order above.
void dot_block(const float* const* x, const float* w, float* const* y, int64_t M, int64_t n0, int64_t n1, int64_t K);

// As many of `threads` as have enough to do: a thread that is woken for less costs more than it brings.
int worth(int64_t operations, int threads);

// Runs part(i) for i in [0, parts) on up to `threads` threads of one pool; the caller takes a share.
void parallel(int64_t parts, int threads, const std::function<void(int64_t)>& part);

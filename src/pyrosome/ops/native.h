// What every kernel shares beside its lanes: one thread pool, scratch memory that is kept, and how weights are given.
#pragma once
#include <algorithm>
#include <functional>

#include "codes.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// As many of `threads` as have enough to do: a thread that is woken for less costs more than it brings.
int worth(int64_t operations, int threads);

// Runs part(i) for i in [0, parts) on up to `threads` threads of one pool; the caller takes a share.
void parallel(int64_t parts, int threads, const std::function<void(int64_t)>& part);

// Runs range(m0, m1) over strips of [0, M), one for each thread that `operations` in all are worth.
template <class F>
void each_range(int64_t M, int64_t operations, int threads, F range) {
    const int64_t strips = std::min<int64_t>(worth(operations, threads), M);
    parallel(strips, static_cast<int>(strips), [&](int64_t s) { range(M * s / strips, M * (s + 1) / strips); });
}

// Runs row(m) for every m of [0, M), shared out likewise.
template <class F>
void each_row(int64_t M, int64_t operations, int threads, F row) {
    each_range(M, operations, threads, [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; ++m) row(m);
    });
}

// Memory of this thread that lasts until the block that took it ends: kept for the next, so that no step allocates.
class Scratch {
  public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
    }

  private:
    void* bytes(int64_t size);  // aligned to 64
    size_t chunk_, used_;
};

// A weight [N, K] as it is held (numbers are part of the interface with native.py).
enum Format : int64_t { FLOAT32 = 0, FP8 = 1, FP4 = 2, BFLOAT16 = 3 };
struct Weight {
    int64_t format;
    int64_t tiled;         // 1: data is in tiles (tiles.h), codes and scales together; 0: rows as in a checkpoint
    const uint8_t* data;   // [N, K] elements, or tiles
    const uint8_t* scale;  // of rows: a byte for each block; else nothing
    int64_t N, K;
    int64_t stride, scale_stride;  // bytes from one matrix of a stack to the next
    int64_t row, row_stride;       // which row of its scales' matrix this one begins with: groups share blocks
    const int64_t* table;          // of a stack whose matrices lie apart: data and scale of each; null: by strides
    Weight of(int64_t i) const {
        Weight w = *this;
        if (table) {
            w.data = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(table[2 * i]));
            w.scale = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(table[2 * i + 1]));
            w.table = nullptr;
            return w;
        }
        w.data += i * stride, w.row += i * row_stride;
        if (scale) w.scale += i * scale_stride;
        return w;
    }
    int64_t bytes() const {  // of one matrix
        return N * K * (format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1) / (format == FP4 ? 2 : 1);
    }
};

// y[m][n0 .. n1) = x[m] . w[n] for M rows given by address, w in floats or bfloat16: term k to lane k % 16, each lane in
// order of k by fused multiply-add, the lanes folded in halves.
void dot_rows(const float* const* x, const Weight& w, float* const* y, int64_t M, int64_t n0, int64_t n1);
// The same for rows of floats at w [n1 - n0, K].
void dot_block(const float* const* x, const float* w, float* const* y, int64_t M, int64_t n0, int64_t n1, int64_t K);

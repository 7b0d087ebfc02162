// What a step of single tokens says of itself (model/step.py): a captured step's buffers, filled in one call.
#include "native.h"

extern "C" void pyrosome_rotation(const int64_t* position, const float* frequency, float* turn, int64_t T, int64_t F);

namespace {

constexpr int64_t PAGE_ROWS = 64;

// Numbers are part of the interface with engine/graphs.py, which has their arguments.
enum Kind : int64_t { EMIT, VISIBLE, ALL_ROWS, WINDOW_INDEX, RING_PLACE, FLAT_PLACE, PICKED, PAGE_PLACE, ROTATION };

struct Derived {
    int64_t kind, a, b;
    const void* table;
    int64_t width;  // of a row of the table, or of the result
    void* out[4];
    int64_t count;  // rows that end in the step, for what is of them
};

// Fields of a step in the order in which it packs them; each token is a span of its own.
struct Tokens {
    int64_t T;
    const int64_t *ids, *position, *span, *slot, *start, *stop, *floor;
};

// Calls run(m, t) for each token t that ends a row of `ratio`, the m-th of them.
template <class F>
void each_emit(const Tokens& s, int64_t ratio, int64_t count, F run) {
    for (int64_t t = 0, m = 0; t < s.T && m < count; ++t)
        if (s.position[t] >= 0 && (s.position[t] + 1) % ratio == 0) run(m++, t);
}

void derive(const Tokens& s, const Derived& d) {
    int64_t* out[4];
    for (int i = 0; i < 4; ++i) out[i] = static_cast<int64_t*>(d.out[i]);
    const auto* table = static_cast<const int64_t*>(d.table);
    const int64_t T = s.T;
    switch (d.kind) {
        case EMIT:  // a: ratio
            each_emit(s, d.a, d.count, [&](int64_t m, int64_t t) {
                out[0][m] = t, out[1][m] = s.position[t], out[2][m] = s.start[t], out[3][m] = s.slot[t];
            });
            break;
        case VISIBLE:  // a: ratio
            for (int64_t t = 0; t < T; ++t) out[0][t] = (s.position[t] + 1) / d.a;
            break;
        case ALL_ROWS:  // a: ratio
            for (int64_t t = 0; t < T; ++t)
                for (int64_t k = 0; k < d.width; ++k) out[0][t * d.width + k] = k < (s.position[t] + 1) / d.a ? k : -1;
            break;
        case WINDOW_INDEX:  // a: width, b: rows of a ring
            for (int64_t t = 0; t < T; ++t)
                for (int64_t w = 0; w < d.a; ++w) {
                    const int64_t back = d.a - 1 - w, at = s.position[t] - back, row = at > 0 ? at : 0;
                    const int64_t ring = 1 + t * d.b + row % std::max<int64_t>(d.b, 1), fresh = 1 + T * d.b + t - back;
                    out[0][t * d.a + w] = at < s.floor[t] ? -1 : at >= s.start[t] ? fresh : ring;
                }
            break;
        case RING_PLACE:  // a: rows of a ring
        case FLAT_PLACE:
            for (int64_t t = 0; t < T; ++t) {
                const bool kept = s.position[t] >= 0 && s.position[t] >= s.stop[t] - d.a;
                const int64_t slot = kept ? s.slot[t] : 0, row = std::max<int64_t>(s.position[t], 0) % d.a;
                if (d.kind == FLAT_PLACE) out[0][t] = slot * d.a + row;
                else out[0][t] = slot, out[1][t] = row;
            }
            break;
        case PICKED:  // a: 0 by ids, 1 by slots
            for (int64_t t = 0; t < T; ++t)
                std::copy_n(table + (d.a ? s.slot : s.ids)[t] * d.width, d.width, out[0] + t * d.width);
            break;
        case PAGE_PLACE:  // a: ratio
            each_emit(s, d.a, d.count, [&](int64_t m, int64_t t) {
                const int64_t row = s.position[t] / d.a;
                out[0][m] = table[s.slot[t] * d.width + row / PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS;
            });
            break;
        case ROTATION: {  // a: ratio of the rows that end, at their first positions; 0: of the tokens.  table: frequencies
            Scratch scratch;
            auto* position = scratch.take<int64_t>(T);
            int64_t count = T;
            if (d.a) {
                count = d.count;
                each_emit(s, d.a, count, [&](int64_t m, int64_t t) { position[m] = s.position[t] - (d.a - 1); });
            } else {
                std::copy_n(s.position, T, position);
            }
            pyrosome_rotation(position, static_cast<const float*>(d.table), static_cast<float*>(d.out[0]), count, d.width);
            break;
        }
    }
}

}  // namespace

// From a step's packed fields [7, T], which are copied to `kept`.
EXPORT void pyrosome_derive(const int64_t* packed, int64_t* kept, int64_t T, const Derived* derived, int64_t count) {
    std::copy_n(packed, 7 * T, kept);
    const Tokens tokens{T, kept, kept + T, kept + 2 * T, kept + 3 * T, kept + 4 * T, kept + 5 * T, kept + 6 * T};
    for (int64_t i = 0; i < count; ++i) derive(tokens, derived[i]);
}

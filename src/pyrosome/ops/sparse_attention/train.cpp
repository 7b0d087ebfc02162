// Attention with gradients, over rows in floats: each token's keys are the rows its parts name, and no score is kept
// but the softmax's weights.
#include "../products.h"

namespace {

struct Part {        // of native.py's `Part`
    const float* rows;    // [N, C]
    const int64_t* flat;  // [T, K]: which row
    const int64_t* index; // [T, K]: negative where there is none
    float* gradient;      // of the rows, or null
    int64_t K, N;
};

// Where a token's keys are, and their rows: `at[i]` is the place of key i among all places of the token.
int64_t keys_of(const Part* parts, int64_t P, int64_t t, const float** row, float** gradient, const float* const* first,
                float* const* own, int64_t C, int64_t* at) {
    int64_t n = 0, place = 0;
    for (int64_t p = 0; p < P; ++p) {
        const Part& part = parts[p];
        for (int64_t k = 0; k < part.K; ++k, ++place) {
            if (part.index[t * part.K + k] < 0) continue;
            const int64_t r = part.flat[t * part.K + k];
            row[n] = first[p] + r * C;
            if (gradient) gradient[n] = own[p] + r * C;
            at[n++] = place;
        }
    }
    return n;
}

int64_t places(const Part* parts, int64_t P) {
    int64_t K = 0;
    for (int64_t p = 0; p < P; ++p) K += parts[p].K;
    return K;
}

}  // namespace

// q [T, H, C], turn [T, F, 2] -> out [T, H, C]; p [T, H, K + 1] the weights of all places, zero where there is no row,
// and last the sink's.
EXPORT void pyrosome_attention_train(const float* q, const Part* parts, int64_t P, const float* sink, const float* turn,
                                     float* out, float* p, int64_t T, int64_t H, int64_t C, int64_t F, float scale,
                                     int threads) {
    const int64_t K = places(parts, P);
    each_row(T, 4 * T * H * C * K, threads, [&](int64_t t) {
        Scratch scratch;
        const auto row = scratch.take<const float*>(K);
        const auto at = scratch.take<int64_t>(K);
        const auto score = scratch.take<float>(H * (K + LANES));
        const float* first[8];
        for (int64_t i = 0; i < P; ++i) first[i] = parts[i].rows;
        const int64_t n = keys_of(parts, P, t, row, nullptr, first, nullptr, C, at), stride = K + LANES;
        products(q + t * H * C, row, H, n, C, score, stride);
        float* weight = p + t * H * (K + 1);
        std::memset(weight, 0, H * (K + 1) * sizeof(float));
        for (int64_t h = 0; h < H; ++h) {
            float* s = score + h * stride;
            float top = sink[h], mass = 0;
            for (int64_t k = 0; k < n; ++k) s[k] *= scale, top = std::max(top, s[k]);
            for (int64_t k = n; k < (n + LANES - 1) / LANES * LANES; ++k) s[k] = -INFINITY;
            for (int64_t k = 0; k < n; k += LANES) store(s + k, exp(load(s + k) - set1(top)));
            for (int64_t k = 0; k < n; ++k) mass += s[k];
            const float rest = exp1(sink[h] - top), share = 1 / (mass + rest);
            for (int64_t k = 0; k < n; ++k) weight[h * (K + 1) + at[k]] = s[k] *= share;
            weight[h * (K + 1) + K] = rest * share;
        }
        float* o = out + t * H * C;
        weighted(score, row, H, n, C, o, stride);
        for (int64_t h = 0; h < H; ++h) turn_pairs(o + (h + 1) * C - 2 * F, turn + t * F * 2, F, -1.0f);
    });
}

// From the gradient of `out`: that of q, of the sinks [S, H] (to be added up), and of each part's rows, which hold zeros
// or what is to be added to: S strips of tokens, each with rows of its own behind the first strip's.
EXPORT void pyrosome_attention_train_back(const float* gradient, const float* q, const float* out, const float* p,
                                          const Part* parts, int64_t P, const float* turn, float* dq, float* dsink,
                                          int64_t T, int64_t H, int64_t C, int64_t F, float scale, int64_t S) {
    const int64_t K = places(parts, P);
    parallel(S, static_cast<int>(S), [&](int64_t strip) {
        Scratch scratch;
        const auto row = scratch.take<const float*>(K);
        const auto to = scratch.take<float*>(K);
        const auto at = scratch.take<int64_t>(K);
        const int64_t stride = K + LANES;
        const auto weight = scratch.take<float>(H * stride), slope = scratch.take<float>(H * stride);
        const auto g = scratch.take<float>(H * C), o = scratch.take<float>(H * C);
        const float* first[8];
        float* own[8];
        for (int64_t i = 0; i < P; ++i) first[i] = parts[i].rows, own[i] = parts[i].gradient + strip * parts[i].N * C;
        for (int64_t h = 0; h < H; ++h) dsink[strip * H + h] = 0;
        for (int64_t t = T * strip / S; t < T * (strip + 1) / S; ++t) {
            const int64_t n = keys_of(parts, P, t, row, to, first, own, C, at);
            std::memcpy(g, gradient + t * H * C, H * C * sizeof(float));
            std::memcpy(o, out + t * H * C, H * C * sizeof(float));
            for (int64_t h = 0; h < H; ++h) turn_pairs(g + (h + 1) * C - 2 * F, turn + t * F * 2, F, 1.0f);
            for (int64_t h = 0; h < H; ++h) turn_pairs(o + (h + 1) * C - 2 * F, turn + t * F * 2, F, 1.0f);
            products(g, row, H, n, C, slope, stride);
            for (int64_t h = 0; h < H; ++h) {
                F16 sum = zero();
                for (int64_t c = 0; c < C; c += LANES) sum = fma(load(g + h * C + c), load(o + h * C + c), sum);
                const float mean = fold(sum);
                const float* kept = p + (t * H + h) * (K + 1);
                for (int64_t k = 0; k < n; ++k) {
                    const float w = weight[h * stride + k] = kept[at[k]];
                    slope[h * stride + k] = w * (slope[h * stride + k] - mean) * scale;
                }
                dsink[strip * H + h] -= kept[K] * mean;
            }
            weighted(slope, row, H, n, C, dq + t * H * C, stride);
            spread<2>({weight, slope}, {g, q + t * H * C}, to, H, n, C, stride);
        }
    });
}

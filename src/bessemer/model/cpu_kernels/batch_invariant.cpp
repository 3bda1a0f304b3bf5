#include "batch_invariant.h"

#include <algorithm>

#include "draw.h"
#include "parts.h"
#include "row_operations.h"

namespace bessemer {
namespace {

constexpr int64_t SMALL = 4096;  // numbers that one thread goes over sooner than two have agreed to share them
constexpr int64_t SOME = 16384;  // numbers of a part, a multiple of the lanes

// Calls work(first, last) for all rows; on several threads where that pays.
template <class Work>
void each_row(int64_t rows, int64_t width, int threads, Work&& work) {
    const int64_t parts = rows * width < SMALL ? 1 : std::min<int64_t>(rows, 4 * threads);
    run_parts(threads, parts, [&](int64_t part) { work(rows * part / parts, rows * (part + 1) / parts); });
}

Floats pointwise(int32_t function, Floats x) {
    if (function == TANH) return hyperbolic_tangent(x);
    return function == SIGMOID ? sigmoid(x) : activated(Activation(function), x);
}

}  // namespace

void norm_rows(const Norm& norm, const float* from, int64_t rows, int64_t width, float* to, int threads) {
    each_row(rows, width, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) norm_row(norm, from + row * width, width, to + row * width);
    });
}

void rotate_rows(const Rotation& rotation, int64_t rows, int64_t heads, int64_t width, float* values, int threads) {
    each_row(rows, heads * width, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t head = 0; head < heads; ++head) rotate_head(rotation, row, values + (row * heads + head) * width);
    });
}

void apply_pointwise(int32_t function, const float* from, int64_t count, float* to, int threads) {
    const int64_t parts = (count + SOME - 1) / SOME;
    run_parts(threads, parts, [&](int64_t part) {
        const int64_t last = std::min(count, (part + 1) * SOME);
        for (int64_t place = part * SOME; place < last; place += LANES) {
            const int64_t lanes = std::min(LANES, last - place);
            store_floats(to + place, pointwise(function, load_floats(from + place, lanes)), lanes);
        }
    });
}

void target_log_probs(const float* logits, int64_t rows, int64_t vocabulary, float temperature, const int64_t* targets, float* out,
                      int threads) {
    const int64_t parts = std::min<int64_t>(rows, 4 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        thread_local Scratch scratch;
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
            out[row] = row_log_prob(logits + row * vocabulary, vocabulary, temperature, targets[row], scratch);
    });
}

}  // namespace bessemer

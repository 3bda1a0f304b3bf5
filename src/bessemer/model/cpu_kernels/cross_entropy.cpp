#include "cross_entropy.h"

#include <algorithm>

#include "floats.h"
#include "guards.h"
#include "parts.h"

namespace bessemer {
namespace {

// Rows that a thread takes at a time.
constexpr int64_t SOME_ROWS = 4;

// Calls `work(place, count)` for every `count` ≤ 16 neighbours.
template <class Work>
void each_lanes(int64_t width, Work&& work) {
    for (int64_t place = 0; place < width; place += LANES) work(place, std::min(LANES, width - place));
}

// Of the last logits of a row, fewer than a register, the others are -∞.
Floats load_logits(const uint16_t* logits, int64_t count) {
    if (count == LANES) return load_bfloats(logits);
    uint16_t padded[LANES];
    std::fill(padded, padded + LANES, uint16_t(0xff80));
    std::copy(logits, logits + count, padded);
    return load_bfloats(padded);
}

void store_gradient(uint16_t* place, Floats values, int64_t count) {
    if (count == LANES) return store_bfloats(place, values);
    uint16_t padded[LANES];
    store_bfloats(padded, values);
    std::copy(padded, padded + count, place);
}

// 1 − p is summed over the others, so it keeps its digits as p nears 1.
void cross_entropy_row(const CrossEntropy& given, int64_t row, float* weights) {
    uint16_t* logits = given.logits + row * given.vocabulary;
    const int64_t width = given.vocabulary, target = given.targets[row];
    Floats most = broadcast(-INFINITY), bad = zero_floats();
    each_lanes(width, [&](int64_t place, int64_t count) {
        const Floats values = load_logits(logits + place, count);
        most = larger(most, values);
        // 0, and NaN for what is not finite, which `larger` and `exponential` do not pass on
        bad = bad + between(0, count, values - values, zero_floats());
        store_floats(weights + place, values);
    });
    const float largest = largest_of(most), own = weights[target] - largest, not_finite = sum_of(bad);
    weights[target] = -INFINITY;
    Floats sum = zero_floats();
    each_lanes(width, [&](int64_t place, int64_t) {
        const Floats powers = exponential(load_floats(weights + place) - broadcast(largest));
        sum = sum + powers;
        store_floats(weights + place, powers);
    });
    const float others = sum_of(sum) + not_finite, all = others + std::exp(own);
    const float log_sum = largest + std::log(all), log_odds = own - std::log(others);
    given.log_sums[row] = log_sum;
    given.log_odds[row] = log_odds;
    if (!given.wants_gradient) return;
    const float of_log_sum = 2.0f * given.z_loss * log_sum, odds = std::exp(-log_odds);
    // −(1 − p), and of the square of the log-sum p times its derivative
    const float of_target = of_log_sum / (1.0f + odds) - 1.0f / (1.0f + 1.0f / odds);
    const Floats factor = broadcast((1.0f + of_log_sum) / all);
    each_lanes(width, [&](int64_t place, int64_t count) {
        store_gradient(logits + place, load_floats(weights + place) * factor, count);
    });
    logits[target] = float_to_bfloat(of_target);
}

}  // namespace
}  // namespace bessemer

using namespace bessemer;

const char* bessemer_cross_entropy(const CrossEntropy* given, int32_t threads) {
    return guarded([&]() -> const char* {
        for (int64_t row = 0; row < given->rows; ++row)
            if (given->targets[row] < 0 || given->targets[row] >= given->vocabulary)
                return failure("target %lld is none of %lld", (long long)given->targets[row], (long long)given->vocabulary);
        const int64_t parts = (given->rows + SOME_ROWS - 1) / SOME_ROWS;
        run_parts(threads, parts, [&](int64_t part) {
            thread_local Scratch scratch;
            float* weights = scratch.room<float>(whole_lanes(given->vocabulary));
            for (int64_t row = part * SOME_ROWS; row < std::min(given->rows, (part + 1) * SOME_ROWS); ++row)
                cross_entropy_row(*given, row, weights);
        });
        return nullptr;
    });
}

#include "draw.h"

#include <algorithm>
#include <cmath>

#include "guards.h"
#include "parts.h"

namespace bessemer {
namespace {

constexpr int64_t BLOCK = 256;    // weights that are added up at once: only the sum that the number falls in is looked into
constexpr float LEAST = -3e38f;   // stands for -∞, of which a difference is NaN

// Calls `work(place, count)` for every `count` ≤ 16 neighbours of first … last - 1.
template <class Work>
void each_lanes(int64_t first, int64_t last, Work&& work) {
    for (int64_t place = first; place < last; place += LANES) work(place, std::min(LANES, last - place));
}

}  // namespace

Drawn draw_row(const float* logits, int64_t vocabulary, float temperature, double uniform, Scratch& scratch) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    float* weights = scratch.room<float>(whole_lanes(vocabulary) + blocks);
    float* sums = weights + whole_lanes(vocabulary);
    const Floats least = broadcast(LEAST), divisor = broadcast(temperature > 0.0f ? temperature : 1.0f);
    Floats most = least, bad = zero_floats();
    each_lanes(0, vocabulary, [&](int64_t place, int64_t count) {
        // what is NaN is the second, and stays
        const Floats scaled = larger(least, between(0, count, load_floats(logits + place, count) / divisor, least));
        bad = bad + (scaled - scaled);
        most = larger(most, scaled);
        store_floats(weights + place, scaled);
    });
    const float largest = largest_of(most);
    if (sum_of(bad) != 0.0f || largest <= LEAST) return {-1, 0.0f};
    if (temperature <= 0.0f) return {int32_t(std::find(weights, weights + vocabulary, largest) - weights), 0.0f};

    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
        Floats sum = zero_floats();
        each_lanes(block * BLOCK, std::min(vocabulary, (block + 1) * BLOCK), [&](int64_t place, int64_t) {
            const Floats powers = exponential(load_floats(weights + place) - broadcast(largest));
            sum = sum + powers;
            store_floats(weights + place, powers);
        });
        sums[block] = sum_of(sum);
        total += sums[block];
    }
    // where rounding leaves none above the target, it is the last that has a weight
    const double target = uniform * total;
    double below = 0.0, before = 0.0;
    int64_t chosen = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        if (sums[block] == 0.0f) continue;
        chosen = block;
        before = below;
        below += sums[block];
        if (below > target) break;
    }
    int64_t token = 0;
    double reached = before;
    for (int64_t place = chosen * BLOCK; place < std::min(vocabulary, (chosen + 1) * BLOCK); ++place) {
        if (weights[place] == 0.0f) continue;
        token = place;
        reached += weights[place];
        if (reached > target) break;
    }
    const double own = double(logits[token] / temperature) - double(largest);
    return {int32_t(token), float(own - std::log(total))};
}

}  // namespace bessemer

using namespace bessemer;

const char* bessemer_draw(const Draws* draws, int32_t threads) {
    return guarded([&]() -> const char* {
        const int64_t parts = std::min<int64_t>(draws->rows, 4 * threads);
        run_parts(threads, parts, [&](int64_t part) {
            thread_local Scratch scratch;
            for (int64_t row = draws->rows * part / parts; row < draws->rows * (part + 1) / parts; ++row) {
                const Drawn drawn = draw_row(draws->logits + row * draws->vocabulary, draws->vocabulary, draws->temperatures[row],
                                             draws->uniforms[row], scratch);
                draws->tokens[row] = drawn.token;
                draws->log_probs[row] = drawn.log_prob;
            }
        });
        return nullptr;
    });
}

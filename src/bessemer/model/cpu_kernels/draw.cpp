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

int64_t blocks_of(int64_t vocabulary) { return (vocabulary + BLOCK - 1) / BLOCK; }

// Of a row of logits at a temperature: e^(logit − largest) of each token, their sums over blocks, and the sum of all. At
// temperature 0 the weights are the logits themselves, without sums.
struct Softmax {
    bool is_finite;
    float largest;
    float *weights, *sums;
    double total;

    float log_prob(float logit, float temperature) const {
        return float(double(logit / temperature) - double(largest) - std::log(total));
    }
};

Softmax softmax(const float* logits, int64_t vocabulary, float temperature, Scratch& scratch) {
    float* weights = scratch.room<float>(whole_lanes(vocabulary) + blocks_of(vocabulary));
    Softmax row{false, LEAST, weights, weights + whole_lanes(vocabulary), 0.0};
    const Floats least = broadcast(LEAST), divisor = broadcast(temperature > 0.0f ? temperature : 1.0f);
    Floats most = least, bad = zero_floats();
    each_lanes(0, vocabulary, [&](int64_t place, int64_t count) {
        // what is NaN is the second, and stays
        const Floats scaled = larger(least, between(0, count, load_floats(logits + place, count) / divisor, least));
        bad = bad + (scaled - scaled);
        most = larger(most, scaled);
        store_floats(weights + place, scaled);
    });
    row.largest = largest_of(most);
    row.is_finite = sum_of(bad) == 0.0f && row.largest > LEAST;
    if (!row.is_finite || temperature <= 0.0f) return row;
    for (int64_t block = 0; block < blocks_of(vocabulary); ++block) {
        Floats sum = zero_floats();
        each_lanes(block * BLOCK, std::min(vocabulary, (block + 1) * BLOCK), [&](int64_t place, int64_t) {
            const Floats powers = exponential(load_floats(weights + place) - broadcast(row.largest));
            sum = sum + powers;
            store_floats(weights + place, powers);
        });
        row.sums[block] = sum_of(sum);
        row.total += row.sums[block];
    }
    return row;
}

}  // namespace

Drawn draw_row(const float* logits, int64_t vocabulary, float temperature, double uniform, Scratch& scratch) {
    const Softmax row = softmax(logits, vocabulary, temperature, scratch);
    if (!row.is_finite) return {-1, 0.0f};
    if (temperature <= 0.0f) return {int32_t(std::find(row.weights, row.weights + vocabulary, row.largest) - row.weights), 0.0f};

    // where rounding leaves none above the target, it is the last that has a weight
    const double target = uniform * row.total;
    double below = 0.0, before = 0.0;
    int64_t chosen = 0;
    for (int64_t block = 0; block < blocks_of(vocabulary); ++block) {
        if (row.sums[block] == 0.0f) continue;
        chosen = block;
        before = below;
        below += row.sums[block];
        if (below > target) break;
    }
    int64_t token = 0;
    double reached = before;
    for (int64_t place = chosen * BLOCK; place < std::min(vocabulary, (chosen + 1) * BLOCK); ++place) {
        if (row.weights[place] == 0.0f) continue;
        token = place;
        reached += row.weights[place];
        if (reached > target) break;
    }
    return {int32_t(token), row.log_prob(logits[token], temperature)};
}

float row_log_prob(const float* logits, int64_t vocabulary, float temperature, int64_t token, Scratch& scratch) {
    const Softmax row = softmax(logits, vocabulary, temperature, scratch);
    return row.is_finite ? row.log_prob(logits[token], temperature) : NAN;
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

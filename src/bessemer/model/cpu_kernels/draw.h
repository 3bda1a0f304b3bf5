// A token of each row of logits, by one uniform number: inverse-CDF sampling from the softmax. See docs/sampling.md.
#pragma once
#include <cstdint>

#include "floats.h"

namespace bessemer {

// Filled in by logits.py, which mirrors it.
struct Draws {
    int64_t rows, vocabulary;
    const float* logits;        // [rows][vocabulary]
    const float* temperatures;  // of each row; 0: the largest is taken, of equals the first
    const double* uniforms;     // of each row, in [0, 1)
    int32_t* tokens;            // of each row; -1 where its logits are not finite, or all -∞
    float* log_probs;           // of the tokens: log softmax(logits / temperature); at temperature 0 it is 0
};

struct Drawn {
    int32_t token;
    float log_prob;
};

// The first token whose cumulative share exceeds the uniform number; never one of probability 0.
Drawn draw_row(const float* logits, int64_t vocabulary, float temperature, double uniform, Scratch& scratch);
// log softmax(logits / temperature)[token], the bits that `draw_row` gives for it; NaN where the logits are not finite.
float row_log_prob(const float* logits, int64_t vocabulary, float temperature, int64_t token, Scratch& scratch);

}  // namespace bessemer

extern "C" {
const char* bessemer_draw(const bessemer::Draws* draws, int32_t threads);
}

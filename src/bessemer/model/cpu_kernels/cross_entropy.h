// Cross-entropy of logits, and its gradient in their place. See docs/kernels.md.
#pragma once
#include <cstdint>

namespace bessemer {

struct CrossEntropy {
    uint16_t* logits;        // bfloat16, [rows][vocabulary]; overwritten by the gradient where it is wanted
    const int64_t* targets;  // of each row
    float* log_sums;         // log Σ exp(logits) of each row
    float* log_odds;         // of the target: log p − log(1 − p)
    int64_t rows, vocabulary;
    float z_loss;  // weight of log_sums²
    int32_t wants_gradient;
};

}  // namespace bessemer

extern "C" {
const char* bessemer_cross_entropy(const bessemer::CrossEntropy* given, int32_t threads);
}

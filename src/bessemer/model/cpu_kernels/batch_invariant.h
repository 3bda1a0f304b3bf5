// Operations on rows by themselves, for a trainer whose forward pass has the bits of the engine's step. See docs/batch-invariance.md.
//
// Each is the loop of step.cpp for one row: what a row gets does not depend on the rows beside it or on the number of threads.
#pragma once
#include <cstdint>

#include "step.h"

namespace bessemer {

// An activation of step.h, or one of these.
enum Pointwise : int32_t { TANH = 4, SIGMOID = 5 };

// to[r] = the norm of from[r]; both [rows][width].
void norm_rows(const Norm& norm, const float* from, int64_t rows, int64_t width, float* to, int threads);
// Turns, in place, every head of rows [rows][heads][width] by the row's line of the rotation's table.
void rotate_rows(const Rotation& rotation, int64_t rows, int64_t heads, int64_t width, float* values, int threads);
// to[i] = function(from[i]).
void apply_pointwise(int32_t function, const float* from, int64_t count, float* to, int threads);
// log softmax(logits / temperature)[target] of each row, as `draw_row` gives it.
void target_log_probs(const float* logits, int64_t rows, int64_t vocabulary, float temperature, const int64_t* targets, float* out,
                      int threads);

}  // namespace bessemer

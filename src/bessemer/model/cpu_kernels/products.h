// The products of each kind of matrix, between `multiply` and registers.h. Blocks are counted in 16 outputs.
#pragma once
#include "matrices.h"

namespace bessemer {

// The numbers that codes of 4 bits stand for, with ZERO_OF_… added so that none has a sign. Of e2m1 they are doubled (OCP
// Microscaling 1.0, table 1); the others are llama.cpp's (kvalues_iq4nl in ggml-common.h).
constexpr int ZERO_OF_MX4 = 12, ZERO_OF_IQ4 = 128;
alignas(16) constexpr uint8_t MX4_TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
alignas(16) constexpr uint8_t IQ4_TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

void quantised_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last);
void float_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last);

}  // namespace bessemer

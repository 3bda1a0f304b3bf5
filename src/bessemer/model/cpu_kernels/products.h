// The products of each kind of matrix, between `multiply` and registers.h. Blocks are counted in 16 outputs.
#pragma once
#include "matrices.h"

namespace bessemer {

void quantised_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last);
void float_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last);

}  // namespace bessemer

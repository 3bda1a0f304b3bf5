// Tensors of GGUF files: packed as they are, and in codes of 8 bits. See docs/kernels.md.
#pragma once
#include <cstdint>

#include "matrices.h"

extern "C" {
// Encodes `count` blocks of a quantised number type, numbered as by llama.cpp, anew: int8 codes, one for each value in their order,
// and a scale for every 32 of them, a float16's value. Returns 1, and 0 for a type that is not known here.
int32_t bessemer_encode_blocks(int32_t type, const uint8_t* blocks, int64_t count, int8_t* codes, float* scales, int32_t threads);
// Takes `count` blocks of one of the types Q4_0, Q4_1 and Q8_0 apart: codes of a value each, or two neighbours to a byte and the first low,
// and a block's scale, and offset in Q4_1, a float16's value. Returns 1, and 0 for another type.
int32_t bessemer_split_blocks(int32_t type, const uint8_t* blocks, int64_t count, uint8_t* codes, float* scales, float* offsets,
                              int32_t threads);
// Packs n rows of k codes of 8 bits, or of 4 bits, two neighbours a byte and the first low, as a matrix has them: sixteen rows side by
// side, filled up with zeros. `flipped`: the bits of a byte that are changed.
void bessemer_pack_codes(int32_t bits, const uint8_t* codes, int64_t n, int64_t k, int32_t flipped, uint8_t* packed, int32_t threads);
// Packs n rows of k numbers, F32, F16 or BF16, as a matrix of the kind has them.
void bessemer_pack_floats(int32_t kind, const uint8_t* values, int64_t n, int64_t k, uint8_t* packed, int32_t threads);
// Packs the rows of a tensor of one of the types Q4_0, Q4_1, Q8_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS and MXFP4, n rows of
// k values, without a change of a number.
// The matrix has the tensor's n, k, kind and group, and memory for its codes and their scales; its bias is not read. Returns 1, and 0
// for another type.
int32_t bessemer_pack_blocks(int32_t type, const uint8_t* blocks, const bessemer::Matrix* matrix, int32_t threads);
// The blocks that were packed of some outputs, one row after the other.
int32_t bessemer_unpack_blocks(int32_t type, const bessemer::Matrix* matrix, const int64_t* outputs, int64_t count, uint8_t* blocks);
}

// Tensors of GGUF files in codes of 8 bits. See docs/kernels.md.
#pragma once
#include <cstdint>

extern "C" {
// Encodes `count` blocks of a quantised number type, numbered as by llama.cpp, anew: int8 codes, one for each value in their order,
// and a scale for every 32 of them, a float16's value. Returns 1, and 0 for a type that is not known here.
int32_t bessemer_encode_blocks(int32_t type, const uint8_t* blocks, int64_t count, int8_t* codes, float* scales, int32_t threads);
}

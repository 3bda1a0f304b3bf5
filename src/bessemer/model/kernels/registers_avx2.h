// The sixteen lanes of registers.h in two registers of AVX2: the same steps with the same roundings.
#pragma once
#include <immintrin.h>

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
struct Bytes { __m256i low, high; };  // 16 lanes of 4 neighbours

// `which` of both halves.
#define BOTH(type, function, ...) type{function(__VA_ARGS__)}
#undef BOTH

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load_halves(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

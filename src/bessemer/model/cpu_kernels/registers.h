// Sixteen outputs side by side: one register of AVX-512, two of AVX2, four of NEON, or plain arrays, which all round every step in the
// same way.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__F16C__) && \
    !defined(BESSEMER_PORTABLE) && !defined(BESSEMER_VNNI_OF_256)
#define BESSEMER_VNNI 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(BESSEMER_PORTABLE)
#define BESSEMER_AVX2 1
// AVX2's registers with VNNI: AVX-VNNI's instruction, or AVX-512VL's of the same name, by which a test computes with these loops.
#if defined(__AVXVNNI__) || defined(BESSEMER_VNNI_OF_256)
#define BESSEMER_AVX_VNNI 1
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(BESSEMER_PORTABLE)
#define BESSEMER_NEON 1
#ifdef __ARM_FEATURE_DOTPROD
#define BESSEMER_DOTPROD 1
#ifdef __ARM_FEATURE_MATMUL_INT8
#define BESSEMER_I8MM 1
#endif
#endif
#endif
// Nothing adds four products of bytes in 32 bits at once: pairs of them are added in 16.
#if (defined(BESSEMER_AVX2) && !defined(BESSEMER_AVX_VNNI)) || (defined(BESSEMER_NEON) && !defined(BESSEMER_DOTPROD))
#define BESSEMER_PAIRS 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(BESSEMER_NEON)
#include <arm_neon.h>
#endif

// Loops over arrays of registers. GCC gives an array registers where its loops are unrolled early, which it takes for too much where a
// lane is four registers; and passes through memory what it does not inline.
#if defined(BESSEMER_NEON) && defined(__GNUC__) && !defined(__clang__)
#define UNROLLED _Pragma("GCC unroll 16")
#else
#define UNROLLED
#endif
#ifdef BESSEMER_NEON
#define INLINED inline __attribute__((always_inline))
#else
#define INLINED inline
#endif

namespace bessemer::registers {

inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float magnitude = float(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Of a number of the type e4m3 that is not NaN: its bits at the place of float32's are the number over 2^120.
inline float e4m3_to_float(uint8_t code) {
    const uint32_t bits = uint32_t(code & 0x80) << 24 | uint32_t(code & 0x7f) << 20;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p120f;
}

// 2^(e - 128), exactly: below the normal numbers for the smallest two.
inline float exponent_to_float(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float bfloat_to_float(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To nearest, ties to even.
inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) {  // below the normal numbers: a multiple of 2⁻²⁴
        std::memcpy(&value, &bits, 4);
        return uint16_t(sign | uint16_t(std::nearbyint(value * 0x1p24f)));
    }
    const uint32_t half = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
    return uint16_t(sign | (half < 0x7c00 ? half : 0x7c00));
}

#if defined(__x86_64__) && !defined(__FMA__)
#define BESSEMER_FUSED_IN_DOUBLE 1

// a * b + c of four lanes, rounded once, where std::fma is a call of the library for each. A product of two floats is a float64 without
// rounding. Its sum with c is rounded to odd: to the float64 of larger magnitude that is not above it, with the last bit set where
// anything was left out. Rounding that to float32, which has fewer than 51 bits, is as if the sum had been exact (Boldo and Melquiond
// 2008). What was left out is Knuth's two-sum; of an infinity it is a NaN, which changes nothing.
inline __m128 fused(__m128 a, __m128 b, __m128 c) {
    auto two = [](__m128 first, __m128 second, __m128 third) {
        const __m128d product = _mm_mul_pd(_mm_cvtps_pd(first), _mm_cvtps_pd(second)), addend = _mm_cvtps_pd(third);
        const __m128d sum = _mm_add_pd(product, addend), of_addend = _mm_sub_pd(sum, product);
        const __m128d rest = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, of_addend)), _mm_sub_pd(addend, of_addend));
        const __m128d size = _mm_andnot_pd(_mm_set1_pd(-0.0), rest);
        const __m128i inexact = _mm_srli_epi64(_mm_castpd_si128(_mm_cmplt_pd(_mm_setzero_pd(), size)), 63);
        const __m128i outside = _mm_and_si128(inexact, _mm_srli_epi64(_mm_castpd_si128(_mm_xor_pd(rest, sum)), 63));
        const __m128i odd = _mm_or_si128(_mm_sub_epi64(_mm_castpd_si128(sum), outside), inexact);
        return _mm_cvtpd_ps(_mm_castsi128_pd(odd));
    };
    return _mm_movelh_ps(two(a, b, c), two(_mm_movehl_ps(a, a), _mm_movehl_ps(b, b), _mm_movehl_ps(c, c)));
}
inline float fused(float a, float b, float c) { return _mm_cvtss_f32(fused(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c))); }
#else
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
#endif

#ifdef BESSEMER_VNNI

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };  // 16 lanes of 4 neighbours

inline Floats zero_floats() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load_halves(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// Sixteen pairs of bfloat16: the first of each and the second.
inline void load_bfloat_pairs(const uint16_t* p, Floats& first, Floats& second) {
    const __m512i pairs = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
}
/// Four neighbours of each lane in e4m3, widened: their bits at the place of float32's are the number over 2^120.
inline void load_e4m3(const uint8_t* p, Floats (&four)[4]) {
    const __m512i codes = _mm512_loadu_si512(p), magnitude = _mm512_set1_epi32(0x07f00000), sign = _mm512_set1_epi32(int(0x80000000));
    const __m512i places[4] = {_mm512_slli_epi32(codes, 20), _mm512_slli_epi32(codes, 12), _mm512_slli_epi32(codes, 4), _mm512_srli_epi32(codes, 4)};
    const __m512i signs[4] = {_mm512_slli_epi32(codes, 24), _mm512_slli_epi32(codes, 16), _mm512_slli_epi32(codes, 8), codes};
    for (int j = 0; j < 4; ++j) {
        const __m512i bits = _mm512_or_si512(_mm512_and_si512(places[j], magnitude), _mm512_and_si512(signs[j], sign));
        four[j] = {_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f))};
    }
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats times(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline void store_floats(float* p, Floats a, int64_t count) {
    if (count >= 16) _mm512_storeu_ps(p, a.v);
    else _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), a.v);
}
inline Floats load_floats(const float* p, int64_t count) {
    return {count >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p)};
}
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// Each byte shifted up by four bits, and down by some; bits of a neighbouring byte may come in from the other side.
inline Bytes up_four(Bytes a) { return {_mm512_slli_epi16(a.v, 4)}; }
template <int BITS>
inline Bytes down(Bytes a) { return {_mm512_srli_epi16(a.v, BITS)}; }
// Of codes 0 … 15 what a table of 16 bytes, aligned to them, has at their places.
inline Bytes looked_up(Bytes codes, const uint8_t* table) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), codes.v)};
}
// The codes of low four bits, and of the bits of `upper` from the fifth on.
template <int BITS>
inline Bytes joined(Bytes low, Bytes upper) {
    return {_mm512_ternarylogic_epi32(low.v, upper.v, _mm512_set1_epi8(((1 << BITS) - 1) << 4), 0xf8)};
}
// Sixteen bytes as numbers, without a sign and with one.
inline Ints widened(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline Ints widened(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
// 2^(e - 128) of sixteen bytes e, exactly.
inline Floats powers_of_two(const uint8_t* exponents) {
    const __m512i e = widened(exponents).v, one = _mm512_set1_epi32(1);
    const __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    return {_mm512_castsi512_ps(_mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(e, one), small, _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23)))};
}
// The same four activations for every lane.
struct Fours { __m512i v; };
inline Fours broadcast_four(const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    return {_mm512_set1_epi32(four)};
}
// sum + the four products of each lane's bytes with the activations
inline Ints dot(Ints sum, Bytes weights, Fours activations) { return {_mm512_dpbusd_epi32(sum.v, weights.v, activations.v)}; }
// zero * correction, each lane its own zero point; a correction of 32 activations fits 16 bits
inline Ints times_zeros(const uint8_t* zeros, Ints correction) {
    return {_mm512_madd_epi16(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros)), correction.v)};
}
// Of 32 numbers; an infinity or a NaN where there is one.
inline float largest_magnitude(const float* p) {
    const __m512i positive = _mm512_set1_epi32(0x7fffffff);
    const __m512i first = _mm512_and_si512(_mm512_loadu_si512(p), positive), second = _mm512_and_si512(_mm512_loadu_si512(p + 16), positive);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(_mm512_reduce_max_epu32(_mm512_max_epu32(first, second))))));
}
// 32 codes, each p * factor to the nearest, ties to even; returns their sum.
inline int32_t round_to_bytes(const float* p, float factor, int8_t* codes) {
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(factor)));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + 16), _mm512_set1_ps(factor)));
    _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((__m128i*)(codes + 16), _mm512_cvtepi32_epi8(second));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
}

#elif defined(BESSEMER_AVX2)

#include "registers_avx2.h"

#elif defined(BESSEMER_NEON)

#include "registers_neon.h"

#else

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };

#define EACH_LANE for (int i = 0; i < 16; ++i)
inline Floats broadcast(float x) { Floats r; EACH_LANE r.v[i] = x; return r; }
inline Floats zero_floats() { Floats r; EACH_LANE r.v[i] = 0.0f; return r; }
inline Floats load_floats(const float* p) { Floats r; EACH_LANE r.v[i] = p[i]; return r; }
inline Floats load_halves(const uint16_t* p) { Floats r; EACH_LANE r.v[i] = half_to_float(p[i]); return r; }
inline void load_bfloat_pairs(const uint16_t* p, Floats& first, Floats& second) {
    EACH_LANE {
        first.v[i] = bfloat_to_float(p[2 * i]);
        second.v[i] = bfloat_to_float(p[2 * i + 1]);
    }
}
inline void load_e4m3(const uint8_t* p, Floats (&four)[4]) {
    for (int j = 0; j < 4; ++j) EACH_LANE four[j].v[i] = e4m3_to_float(p[4 * i + j]);
}
#ifdef BESSEMER_FUSED_IN_DOUBLE
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    Floats r;
    for (int i = 0; i < 16; i += 4)
        _mm_storeu_ps(r.v + i, fused(_mm_loadu_ps(a.v + i), _mm_loadu_ps(b.v + i), _mm_loadu_ps(c.v + i)));
    return r;
}
#else
inline Floats fma(Floats a, Floats b, Floats c) { Floats r; EACH_LANE r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]); return r; }
#endif
inline Floats add(Floats a, Floats b) { Floats r; EACH_LANE r.v[i] = a.v[i] + b.v[i]; return r; }
inline Floats times(Floats a, Floats b) { Floats r; EACH_LANE r.v[i] = a.v[i] * b.v[i]; return r; }
inline void store_floats(float* p, Floats a, int64_t count) { for (int i = 0; i < 16 && i < count; ++i) p[i] = a.v[i]; }
inline Floats load_floats(const float* p, int64_t count) { Floats r; EACH_LANE r.v[i] = i < count ? p[i] : 0.0f; return r; }
inline Floats to_floats(Ints a) { Floats r; EACH_LANE r.v[i] = float(a.v[i]); return r; }
inline Ints broadcast(int32_t x) { Ints r; EACH_LANE r.v[i] = x; return r; }
inline Bytes load_bytes(const uint8_t* p) { Bytes r; std::memcpy(r.v, p, 64); return r; }
inline void store_bytes(uint8_t* p, const Bytes& a) { std::memcpy(p, a.v, 64); }
inline Bytes low_nibbles(Bytes a) { for (auto& b : a.v) b &= 15; return a; }
inline Bytes high_nibbles(Bytes a) { for (auto& b : a.v) b >>= 4; return a; }
inline Bytes up_four(Bytes a) { for (auto& b : a.v) b = uint8_t(b << 4); return a; }
template <int BITS>
inline Bytes down(Bytes a) { for (auto& b : a.v) b >>= BITS; return a; }
inline Bytes looked_up(Bytes codes, const uint8_t* table) { for (auto& b : codes.v) b = table[b]; return codes; }
template <int BITS>
inline Bytes joined(Bytes low, const Bytes& upper) {
    for (int i = 0; i < 64; ++i) low.v[i] |= upper.v[i] & ((1 << BITS) - 1) << 4;
    return low;
}
inline Ints widened(const uint8_t* p) { Ints r; EACH_LANE r.v[i] = p[i]; return r; }
inline Ints widened(const int8_t* p) { Ints r; EACH_LANE r.v[i] = p[i]; return r; }
inline Floats powers_of_two(const uint8_t* exponents) { Floats r; EACH_LANE r.v[i] = exponent_to_float(exponents[i]); return r; }
struct Fours { const int8_t* v; };
inline Fours broadcast_four(const int8_t* activations) { return {activations}; }
inline Ints dot(Ints sum, const Bytes& weights, Fours activations) {
    const int8_t* x = activations.v;
    EACH_LANE {
        const uint8_t* w = weights.v + 4 * i;
        sum.v[i] += int32_t(w[0]) * x[0] + int32_t(w[1]) * x[1] + int32_t(w[2]) * x[2] + int32_t(w[3]) * x[3];
    }
    return sum;
}
inline Ints times_zeros(const uint8_t* zeros, Ints correction) { EACH_LANE correction.v[i] *= zeros[i]; return correction; }
inline float largest_magnitude(const float* p) {
    uint32_t largest = 0;
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    return magnitude;
}
inline int32_t round_to_bytes(const float* p, float factor, int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += codes[i] = int8_t(std::nearbyint(p[i] * factor));
    return sum;
}
#undef EACH_LANE

#endif

// 32 numbers as codes, ±127 the largest magnitude, and the scale that turns them back. Returns the sum of the codes. All but zero
// becomes zero; an infinity or a NaN makes the scale NaN, which a product must show.
inline int32_t quantise_group(const float* values, int8_t* codes, float* scale) {
    const float most = largest_magnitude(values);
    if (most >= 0x1p-100f && most < INFINITY) {
        *scale = most / 127.0f;
        return round_to_bytes(values, 127.0f / most, codes);
    }
    *scale = most < 1.0f ? 0.0f : NAN;
    std::memset(codes, 0, 32);
    return 0;
}

}  // namespace bessemer::registers

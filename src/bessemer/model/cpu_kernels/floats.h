// Arithmetic on the sixteen lanes of registers.h: what attention, norms and activations are written in.
//
// A product and a sum are rounded once where `fma` says so and nowhere else, so every row has the same bits in every loop.
#pragma once
#include <new>

#include "registers.h"

namespace bessemer::registers {

constexpr int64_t LANES = 16;

#if defined(BESSEMER_VNNI) || defined(BESSEMER_AVX2)
/// Sixteen codes of 4 bits, two to a byte, the even one low, as bytes: they are counted from -8.
inline __m128i sixteen_nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm_sub_epi8(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(8));
}
#endif

#ifdef BESSEMER_VNNI

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
/// Each lane of `a` where `left` is less than `right`, else of `b`.
inline Floats where_less(Floats left, Floats right, Floats a, Floats b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(left.v, right.v, _CMP_LT_OQ), b.v, a.v)};
}
/// `a` in lanes first … last - 1, `b` in the others.
inline Floats between(int64_t first, int64_t last, Floats a, Floats b) {
    const uint32_t below_last = last >= LANES ? 0xffff : (1u << last) - 1, below_first = (1u << first) - 1;
    return {_mm512_mask_blend_ps(__mmask16(below_last & ~below_first), b.v, a.v)};
}
/// 2^n · a for whole numbers n.
inline Floats scaled_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Floats rounded(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline float first_of(Floats a) { return _mm512_cvtss_f32(a.v); }
inline float largest_of(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Floats load_bfloats(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Floats load_signed_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Floats load_nibbles(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen_nibbles(p)))}; }
inline void store_halves(uint16_t* p, Floats a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_signed_bytes(int8_t* p, Floats a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline float sum_of(Floats a) {
    const __m512 halves = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    const __m512 quarters = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
    const __m128 quarter = _mm512_castps512_ps128(quarters), pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

/// Of eight vectors the two halves of each one's sum, which `joined` adds; the order does not depend on what the others hold.
inline Floats half_sums_of_eight(const Floats* vectors) {
    __m512 pairs[4], fours[2];
    for (int i = 0; i < 4; ++i) {
        const __m512 even = vectors[2 * i].v, odd = vectors[2 * i + 1].v;
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d even = _mm512_castps_pd(pairs[2 * i]), odd = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    return {_mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd))};
}
inline Floats joined(Floats a, Floats b) {
    return {_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
}

#elif defined(BESSEMER_AVX2)

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats absolute(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline void store_floats(float* p, Floats a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
inline Floats where_less(Floats left, Floats right, Floats a, Floats b) {
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(left.low, right.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(left.high, right.high, _CMP_LT_OQ))};
}
inline Floats between(int64_t first, int64_t last, Floats a, Floats b) {
    const Lanes inside = lanes_below(last), before = lanes_below(first);
    return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(_mm256_andnot_si256(before.low, inside.low))),
            _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(_mm256_andnot_si256(before.high, inside.high)))};
}
// In two steps, each a power that float32 has: n goes from -127 to 129.
inline Floats scaled_by_power(Floats a, Floats n) {
    auto scaled = [](__m256 values, __m256 powers) {
        const __m256i whole = _mm256_cvtps_epi32(powers), first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
        auto power = [](__m256i exponent) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
        };
        return _mm256_mul_ps(_mm256_mul_ps(values, power(first)), power(second));
    };
    return {scaled(a.low, n.low), scaled(a.high, n.high)};
}
inline Floats rounded(Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
inline float first_of(Floats a) { return _mm256_cvtss_f32(a.low); }
inline float largest_of(Floats a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats load_bfloats(const uint16_t* p) {
    auto wide = [](const uint16_t* place) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)place)), 16));
    };
    return {wide(p), wide(p + 8)};
}
inline Floats load_signed_bytes(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Floats load_nibbles(const uint8_t* p) {
    const __m128i bytes = sixteen_nibbles(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline void store_halves(uint16_t* p, Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.low, nearest));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.high, nearest));
}
inline void store_signed_bytes(int8_t* p, Floats a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline float sum_of(Floats a) {
    const __m256 halves = _mm256_add_ps(a.low, a.high);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// The first and third quarter plus the second and fourth.
inline __m256 quarters_added(Floats a) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a.low, a.high, 0x20), _mm256_permute2f128_ps(a.low, a.high, 0x31));
}
inline Floats half_sums_of_eight(const Floats* vectors) {
    auto of_four = [](const Floats* four) {
        auto summed = [](__m256 a, __m256 b, __m256 c, __m256 d) {
            const __m256d first = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
            const __m256d second = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
            return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(first, second)), _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
        };
        return quarters_added({summed(four[0].low, four[1].low, four[2].low, four[3].low),
                               summed(four[0].high, four[1].high, four[2].high, four[3].high)});
    };
    return {of_four(vectors), of_four(vectors + 4)};
}
inline Floats joined(Floats a, Floats b) { return {quarters_added(a), quarters_added(b)}; }

#elif !defined(BESSEMER_NEON)  // whose are in registers_neon.h

#define EACH_LANE for (int i = 0; i < 16; ++i)
inline Floats operator+(Floats a, Floats b) { EACH_LANE a.v[i] += b.v[i]; return a; }
inline Floats operator-(Floats a, Floats b) { EACH_LANE a.v[i] -= b.v[i]; return a; }
inline Floats operator*(Floats a, Floats b) { EACH_LANE a.v[i] *= b.v[i]; return a; }
inline Floats operator/(Floats a, Floats b) { EACH_LANE a.v[i] /= b.v[i]; return a; }
inline Floats larger(Floats a, Floats b) { EACH_LANE a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Floats smaller(Floats a, Floats b) { EACH_LANE a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Floats absolute(Floats a) { EACH_LANE a.v[i] = std::fabs(a.v[i]); return a; }
inline void store_floats(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats where_less(Floats left, Floats right, Floats a, Floats b) {
    EACH_LANE b.v[i] = left.v[i] < right.v[i] ? a.v[i] : b.v[i];
    return b;
}
inline Floats between(int64_t first, int64_t last, Floats a, Floats b) {
    EACH_LANE b.v[i] = i >= first && i < last ? a.v[i] : b.v[i];
    return b;
}
// In two steps, as with AVX2; std::ldexp is a call of the library.
inline Floats scaled_by_power(Floats a, Floats n) {
    auto power = [](int exponent) {
        const uint32_t bits = uint32_t(exponent + 127) << 23;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    };
    EACH_LANE {
        const int whole = int(n.v[i]), first = whole >> 1;
        a.v[i] = a.v[i] * power(first) * power(whole - first);
    }
    return a;
}
inline Floats rounded(Floats a) { EACH_LANE a.v[i] = std::nearbyint(a.v[i]); return a; }
inline float first_of(Floats a) { return a.v[0]; }
inline float largest_of(Floats a) {
    float most = a.v[0];
    EACH_LANE most = a.v[i] > most ? a.v[i] : most;
    return most;
}
inline Floats load_bfloats(const uint16_t* p) { Floats a; EACH_LANE a.v[i] = bfloat_to_float(p[i]); return a; }
inline Floats load_signed_bytes(const int8_t* p) { Floats a; EACH_LANE a.v[i] = p[i]; return a; }
inline Floats load_nibbles(const uint8_t* p) { Floats a; EACH_LANE a.v[i] = float((p[i / 2] >> (i % 2 * 4) & 15) - 8); return a; }

inline void store_halves(uint16_t* p, Floats a) { EACH_LANE p[i] = float_to_half(a.v[i]); }
inline void store_signed_bytes(int8_t* p, Floats a) { EACH_LANE p[i] = int8_t(std::nearbyint(a.v[i])); }

inline float sum_of(Floats a) {
    float quarter[4];
    for (int i = 0; i < 4; ++i) quarter[i] = (a.v[i] + a.v[i + 8]) + (a.v[i + 4] + a.v[i + 12]);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

inline Floats half_sums_of_eight(const Floats* vectors) {
    Floats halves;
    for (int i = 0; i < 8; ++i) {
        float quarter[4];
        for (int q = 0; q < 4; ++q) {
            const float* lanes = vectors[i].v + 4 * q;
            quarter[q] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
        }
        halves.v[i / 4 * 8 + i % 4] = quarter[0] + quarter[1];
        halves.v[i / 4 * 8 + i % 4 + 4] = quarter[2] + quarter[3];
    }
    return halves;
}
inline Floats joined(Floats a, Floats b) {
    Floats sums;
    for (int i = 0; i < 8; ++i) {
        const int place = i / 4 * 8 + i % 4;
        sums.v[i] = a.v[place] + a.v[place + 4];
        sums.v[i + 8] = b.v[place] + b.v[place + 4];
    }
    return sums;
}
#undef EACH_LANE

#endif

/// The sums of sixteen vectors, side by side.
inline Floats sums_of_sixteen(const Floats* vectors) { return joined(half_sums_of_eight(vectors), half_sums_of_eight(vectors + 8)); }

#ifndef BESSEMER_NEON
inline void store_bfloats(uint16_t* p, Floats a) {
#ifdef BESSEMER_VNNI
    const __m512i bits = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(64 << 16));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
#else
    float values[LANES];
    store_floats(values, a);
    for (int i = 0; i < LANES; ++i) p[i] = float_to_bfloat(values[i]);
#endif
}
#endif

/// exp(x) within 2 units in the last place; 0 below -87, where float32 has no normal numbers; 1 exactly at 0.
inline Floats exponential(Floats x) {
    const Floats within = smaller(larger(x, broadcast(-88.0f)), broadcast(89.0f));
    const Floats whole = rounded(within * broadcast(1.44269504f));
    Floats rest = fma(whole, broadcast(-0.693359375f), within);
    rest = fma(whole, broadcast(2.12194440e-4f), rest);
    Floats sum = broadcast(1.9875691500e-4f);
    sum = fma(sum, rest, broadcast(1.3981999507e-3f));
    sum = fma(sum, rest, broadcast(8.3334519073e-3f));
    sum = fma(sum, rest, broadcast(4.1665795894e-2f));
    sum = fma(sum, rest, broadcast(1.6666665459e-1f));
    sum = fma(sum, rest, broadcast(5.0000001201e-1f));
    sum = fma(sum, rest * rest, rest + broadcast(1.0f));
    return where_less(within, broadcast(-87.0f), zero_floats(), scaled_by_power(sum, whole));
}

inline Floats sigmoid(Floats x) {
    const Floats one = broadcast(1.0f);
    return one / (one + exponential(zero_floats() - x));
}

inline Floats hyperbolic_tangent(Floats x) {
    const Floats one = broadcast(1.0f), two = broadcast(2.0f);
    return one - two / (one + exponential(x + x));
}

/// The error function within 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
inline Floats error_function(Floats x) {
    const Floats one = broadcast(1.0f), size = absolute(x), step = one / fma(size, broadcast(0.3275911f), one);
    Floats sum = broadcast(1.061405429f);
    sum = fma(sum, step, broadcast(-1.453152027f));
    sum = fma(sum, step, broadcast(1.421413741f));
    sum = fma(sum, step, broadcast(-0.284496736f));
    sum = fma(sum, step, broadcast(0.254829592f));
    const Floats found = one - sum * step * exponential(zero_floats() - size * size);
    return where_less(x, zero_floats(), zero_floats() - found, found);
}

}  // namespace bessemer::registers

namespace bessemer {

using namespace registers;

inline int64_t whole_lanes(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/// Memory that grows, aligned to 64 bytes; what it held is lost when it does.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }

    template <class T>
    T* room(int64_t count) {
        const int64_t bytes = count * int64_t(sizeof(T));
        if (bytes > size_) {
            ::operator delete(memory_, std::align_val_t(64));
            memory_ = nullptr;
            memory_ = ::operator new(size_t(bytes + bytes / 4), std::align_val_t(64));
            size_ = bytes + bytes / 4;
        }
        return static_cast<T*>(memory_);
    }

    /// What the last `room` gave.
    template <class T>
    T* held() const {
        return static_cast<T*>(memory_);
    }

private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace bessemer

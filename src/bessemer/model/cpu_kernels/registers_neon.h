// The sixteen lanes of registers.h and floats.h in four registers of NEON: the same steps with the same roundings. A part of
// registers.h.
//
// A quarter, `v[i]`, is lanes 4 i … 4 i + 3. What NEON does differently from C++ is spelled out: its maximum passes a NaN on, so a
// comparison chooses.
#pragma once

struct Floats { float32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Bytes { uint8x16_t v[4]; };  // 16 lanes of 4 neighbours

// Four quarters, each what `quarter(i)` gives.
template <class Wide, class Quarter>
inline Wide quarters(Quarter&& quarter) {
    return {{quarter(0), quarter(1), quarter(2), quarter(3)}};
}

inline Floats broadcast(float x) { return quarters<Floats>([&](int) { return vdupq_n_f32(x); }); }
inline Floats zero_floats() { return broadcast(0.0f); }
inline Floats load_floats(const float* p) { return quarters<Floats>([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline Floats load_halves(const uint16_t* p) {
    return quarters<Floats>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
// Sixteen pairs of bfloat16: the first of each and the second.
inline void load_bfloat_pairs(const uint16_t* p, Floats& first, Floats& second) {
    auto pairs = [&](int i) { return vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)); };
    first = quarters<Floats>([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs(i), 16)); });
    second = quarters<Floats>([&](int i) { return vreinterpretq_f32_u32(vandq_u32(pairs(i), vdupq_n_u32(0xffff0000u))); });
}
inline void load_e4m3(const uint8_t* p, Floats (&four)[4]) {
    auto widened = [&](int j) {  // the bits at the place of float32's are the number over 2^120
        return quarters<Floats>([&](int i) {
            const uint32x4_t codes = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
            const uint32x4_t top = vshlq_u32(codes, vdupq_n_s32(24 - 8 * j)), sign = vandq_u32(top, vdupq_n_u32(0x80000000u));
            const uint32x4_t magnitude = vandq_u32(vshrq_n_u32(top, 4), vdupq_n_u32(0x07f00000u));
            return vmulq_f32(vreinterpretq_f32_u32(vorrq_u32(magnitude, sign)), vdupq_n_f32(0x1p120f));
        });
    };
    for (int j = 0; j < 4; ++j) four[j] = widened(j);
}
inline Floats fma(Floats a, Floats b, Floats c) { return quarters<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline Floats add(Floats a, Floats b) { return quarters<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline Floats times(Floats a, Floats b) { return quarters<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline void store_floats(float* p, Floats a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store_floats(float* p, Floats a, int64_t count) {
    if (count >= 16) return store_floats(p, a);
    float all[16];
    store_floats(all, a);
    std::memcpy(p, all, size_t(count) * sizeof(float));
}
inline Floats load_floats(const float* p, int64_t count) {
    if (count >= 16) return load_floats(p);
    float all[16] = {};
    std::memcpy(all, p, size_t(count) * sizeof(float));
    return load_floats(all);
}
inline Floats to_floats(Ints a) { return quarters<Floats>([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
inline Ints broadcast(int32_t x) { return quarters<Ints>([&](int) { return vdupq_n_s32(x); }); }
inline Bytes load_bytes(const uint8_t* p) { return quarters<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); }); }
inline void store_bytes(uint8_t* p, const Bytes& a) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, a.v[i]);
}
inline Bytes low_nibbles(Bytes a) { return quarters<Bytes>([&](int i) { return vandq_u8(a.v[i], vdupq_n_u8(15)); }); }
inline Bytes high_nibbles(Bytes a) { return quarters<Bytes>([&](int i) { return vshrq_n_u8(a.v[i], 4); }); }
inline Bytes up_four(Bytes a) { return quarters<Bytes>([&](int i) { return vshlq_n_u8(a.v[i], 4); }); }
template <int BITS>
inline Bytes down(Bytes a) { return quarters<Bytes>([&](int i) { return vshrq_n_u8(a.v[i], BITS); }); }
// Of codes 0 … 15 what a table of 16 bytes has at their places.
inline Bytes looked_up(Bytes codes, const uint8_t* table) {
    return quarters<Bytes>([&](int i) { return vqtbl1q_u8(vld1q_u8(table), codes.v[i]); });
}
// The codes of low four bits, and of the bits of `upper` from the fifth on.
template <int BITS>
inline Bytes joined(Bytes low, Bytes upper) {
    const uint8x16_t mask = vdupq_n_u8(((1 << BITS) - 1) << 4);
    return quarters<Bytes>([&](int i) { return vorrq_u8(low.v[i], vandq_u8(upper.v[i], mask)); });
}
// Sixteen bytes as numbers, with a sign and without one.
inline Ints widened(int8x16_t bytes) {
    const int16x8_t first = vmovl_s8(vget_low_s8(bytes)), second = vmovl_high_s8(bytes);
    return {{vmovl_s16(vget_low_s16(first)), vmovl_high_s16(first), vmovl_s16(vget_low_s16(second)), vmovl_high_s16(second)}};
}
inline Ints widened(const int8_t* p) { return widened(vld1q_s8(p)); }
inline Ints widened(const uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))), second = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
    return {{vmovl_s16(vget_low_s16(first)), vmovl_high_s16(first), vmovl_s16(vget_low_s16(second)), vmovl_high_s16(second)}};
}
// 2^(e - 128) of sixteen bytes e, exactly.
inline Floats powers_of_two(const uint8_t* exponents) {
    const Ints wide = widened(exponents);
    return quarters<Floats>([&](int i) {
        const int32x4_t one = vdupq_n_s32(1), small = vshlq_s32(vdupq_n_s32(0x00200000), wide.v[i]);
        const int32x4_t normal = vshlq_n_s32(vsubq_s32(wide.v[i], one), 23);
        return vreinterpretq_f32_s32(vbslq_s32(vcgtq_s32(wide.v[i], one), normal, small));
    });
}
// zero * correction, each lane its own zero point
inline Ints times_zeros(const uint8_t* zeros, Ints correction) {
    const Ints wide = widened(zeros);
    return quarters<Ints>([&](int i) { return vmulq_s32(wide.v[i], correction.v[i]); });
}
// Codes of 8 bits without the 128 that was added to them.
struct SignedBytes { int8x16_t v[4]; };
inline SignedBytes signed_bytes(Bytes a) {
    return quarters<SignedBytes>([&](int i) { return vreinterpretq_s8_u8(veorq_u8(a.v[i], vdupq_n_u8(128))); });
}

#ifdef BESSEMER_DOTPROD

// Sixteen activations, and sum + the four products of each lane's bytes with four of them: sdot takes these from a lane, so nothing
// is broadcast. Its bytes have signs, and codes of up to 7 bits fit; those of 8 lose their 128, or meet usdot as they are.
struct Sixteen { int8x16_t v; };
inline Sixteen load_sixteen(const int8_t* activations) { return {vld1q_s8(activations)}; }
template <int FOUR>
inline Ints dot(Ints sum, SignedBytes weights, Sixteen activations) {
    return quarters<Ints>([&](int i) { return vdotq_laneq_s32(sum.v[i], weights.v[i], activations.v, FOUR); });
}
template <int FOUR>
inline Ints dot(Ints sum, Bytes weights, Sixteen activations) {
#ifdef BESSEMER_I8MM
    return quarters<Ints>([&](int i) { return vusdotq_laneq_s32(sum.v[i], weights.v[i], activations.v, FOUR); });
#else
    return quarters<Ints>([&](int i) { return vdotq_laneq_s32(sum.v[i], vreinterpretq_s8_u8(weights.v[i]), activations.v, FOUR); });
#endif
}

#else

// The same four activations for every lane.
struct Fours { int8x16_t v; };
inline Fours broadcast_four(const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
using ByteWeights = SignedBytes;
inline ByteWeights byte_weights(Bytes a) { return signed_bytes(a); }
// Two products of codes of 8 bits are at most 2 · 128 · 127, which is within 16 bits; pairs are added in 32.
inline Ints dot(Ints sum, const ByteWeights& weights, Fours activations) {
    return quarters<Ints>([&](int i) {
        const int16x8_t first = vmull_s8(vget_low_s8(weights.v[i]), vget_low_s8(activations.v));
        return vpadalq_s16(sum.v[i], vpaddq_s16(first, vmull_high_s8(weights.v[i], activations.v)));
    });
}
// Codes of fewer bits: sums of single products, each neighbour's its own. Of a whole part they are at most 8 · 31 · 127, of half a part
// with 6 bits 4 · 63 · 127.
struct Pairs { int16x8_t v[8]; };
inline Pairs zero_pairs() {
    Pairs r;
    for (int i = 0; i < 8; ++i) r.v[i] = vdupq_n_s16(0);
    return r;
}
inline Pairs dot(Pairs sum, Bytes weights, Fours activations) {
    for (int i = 0; i < 4; ++i) {
        const int8x16_t codes = vreinterpretq_s8_u8(weights.v[i]);
        sum.v[2 * i] = vmlal_s8(sum.v[2 * i], vget_low_s8(codes), vget_low_s8(activations.v));
        sum.v[2 * i + 1] = vmlal_high_s8(sum.v[2 * i + 1], codes, activations.v);
    }
    return sum;
}
inline Ints add(Ints a, Pairs b) {
    return quarters<Ints>([&](int i) {
        return vaddq_s32(a.v[i], vpaddq_s32(vpaddlq_s16(b.v[2 * i]), vpaddlq_s16(b.v[2 * i + 1])));
    });
}

#endif

// Of 32 numbers; an infinity or a NaN where there is one.
inline float largest_magnitude(const float* p) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int i = 0; i < 32; i += 4)
        most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(p + i)), vdupq_n_u32(0x7fffffff)));
    const uint32_t largest = vmaxvq_u32(most);
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    return magnitude;
}
// 32 codes, each p * factor to the nearest, ties to even; returns their sum.
inline int32_t round_to_bytes(const float* p, float factor, int8_t* codes) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 32; i += 16) {
        int32x4_t four[4];
        for (int j = 0; j < 4; ++j) {
            four[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + i + 4 * j), factor));
            sum = vaddq_s32(sum, four[j]);
        }
        const int16x8_t first = vcombine_s16(vmovn_s32(four[0]), vmovn_s32(four[1]));
        const int16x8_t second = vcombine_s16(vmovn_s32(four[2]), vmovn_s32(four[3]));
        vst1q_s8(codes + i, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
    }
    return vaddvq_s32(sum);
}

// What follows is floats.h's.

inline Floats operator+(Floats a, Floats b) { return add(a, b); }
inline Floats operator-(Floats a, Floats b) { return quarters<Floats>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
inline Floats operator*(Floats a, Floats b) { return times(a, b); }
inline Floats operator/(Floats a, Floats b) { return quarters<Floats>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
/// Each lane of `a` where `left` is less than `right`, else of `b`.
inline Floats where_less(Floats left, Floats right, Floats a, Floats b) {
    return quarters<Floats>([&](int i) { return vbslq_f32(vcltq_f32(left.v[i], right.v[i]), a.v[i], b.v[i]); });
}
// The second one where either is a NaN.
inline Floats larger(Floats a, Floats b) { return where_less(b, a, a, b); }
inline Floats smaller(Floats a, Floats b) { return where_less(a, b, a, b); }
inline Floats absolute(Floats a) { return quarters<Floats>([&](int i) { return vabsq_f32(a.v[i]); }); }
/// `a` in lanes first … last - 1, `b` in the others.
inline Floats between(int64_t first, int64_t last, Floats a, Floats b) {
    static constexpr int32_t PLACES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32x4_t begin = vdupq_n_s32(int32_t(first)), end = vdupq_n_s32(int32_t(last));
    return quarters<Floats>([&](int i) {
        const int32x4_t place = vld1q_s32(PLACES + 4 * i);
        return vbslq_f32(vandq_u32(vcgeq_s32(place, begin), vcltq_s32(place, end)), a.v[i], b.v[i]);
    });
}
/// 2^n · a for whole numbers n, -127 … 129: in two steps, each a power that float32 has.
inline Floats scaled_by_power(Floats a, Floats n) {
    auto power = [](int32x4_t exponent) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23)); };
    return quarters<Floats>([&](int i) {
        const int32x4_t whole = vcvtnq_s32_f32(n.v[i]), first = vshrq_n_s32(whole, 1);
        return vmulq_f32(vmulq_f32(a.v[i], power(first)), power(vsubq_s32(whole, first)));
    });
}
inline Floats rounded(Floats a) { return quarters<Floats>([&](int i) { return vrndnq_f32(a.v[i]); }); }
inline float first_of(Floats a) { return vgetq_lane_f32(a.v[0], 0); }
inline float largest_of(Floats a) {
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.v[0], a.v[1]), vmaxnmq_f32(a.v[2], a.v[3])));
}
inline Floats load_bfloats(const uint16_t* p) {
    return quarters<Floats>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline Floats load_signed_bytes(const int8_t* p) { return to_floats(widened(p)); }
/// Sixteen codes of 4 bits, two to a byte, the even one low: they are counted from -8.
inline Floats load_nibbles(const uint8_t* p) {
    const uint8x8_t bytes = vld1_u8(p), low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
    const int8x16_t codes = vreinterpretq_s8_u8(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
    return to_floats(widened(vsubq_s8(codes, vdupq_n_s8(8))));
}
inline void store_halves(uint16_t* p, Floats a) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
inline void store_bfloats(uint16_t* p, Floats a) {
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t kept = vbslq_u32(vceqq_f32(a.v[i], a.v[i]), nearest, vorrq_u32(bits, vdupq_n_u32(64u << 16)));
        vst1_u16(p + 4 * i, vshrn_n_u32(kept, 16));
    }
}
inline void store_signed_bytes(int8_t* p, Floats a) {
    auto narrow = [&](int i) { return vqmovn_s32(vcvtnq_s32_f32(a.v[i])); };
    const int16x8_t first = vcombine_s16(narrow(0), narrow(1)), second = vcombine_s16(narrow(2), narrow(3));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(first), vqmovn_s16(second)));
}
inline float sum_of(Floats a) {
    const float32x4_t quarter = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(quarter), vget_high_f32(quarter)));
}
/// Of eight vectors the two halves of each one's sum, which `joined` adds; the order does not depend on what the others hold.
inline Floats half_sums_of_eight(const Floats* vectors) {
    auto halves = [](float32x4_t a, float32x4_t b) {  // of both: the first number plus the third, the second plus the fourth
        const float64x2_t even = vreinterpretq_f64_f32(a), odd = vreinterpretq_f64_f32(b);
        return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(even, odd)), vreinterpretq_f32_f64(vzip2q_f64(even, odd)));
    };
    auto of_four = [&](const Floats* four, int i) {
        return vpaddq_f32(halves(four[0].v[i], four[1].v[i]), halves(four[2].v[i], four[3].v[i]));
    };
    return quarters<Floats>([&](int i) {
        const Floats* four = vectors + i / 2 * 4;
        return vaddq_f32(of_four(four, i % 2 * 2), of_four(four, i % 2 * 2 + 1));
    });
}
inline Floats joined(Floats a, Floats b) {
    return {{vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]), vaddq_f32(b.v[0], b.v[1]), vaddq_f32(b.v[2], b.v[3])}};
}

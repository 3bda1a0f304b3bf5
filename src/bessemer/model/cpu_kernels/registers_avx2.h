// The sixteen lanes of registers.h in two registers of AVX2: the same steps with the same roundings. A part of registers.h.
#pragma once

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
struct Bytes { __m256i low, high; };  // 16 lanes of 4 neighbours

// All bits of the lanes below `count`.
struct Lanes { __m256i low, high; };
inline Lanes lanes_below(int64_t count) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), end = _mm256_set1_epi32(int(count));
    return {_mm256_cmpgt_epi32(end, places), _mm256_cmpgt_epi32(end, _mm256_add_epi32(places, _mm256_set1_epi32(8)))};
}

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load_halves(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
// Sixteen pairs of bfloat16: the first of each and the second.
inline void load_bfloat_pairs(const uint16_t* p, Floats& first, Floats& second) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)p), high = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
inline void load_e4m3(const uint8_t* p, Floats (&four)[4]) {
    auto widened = [](__m256i codes, int j) {
        const __m256i place = j < 3 ? _mm256_slli_epi32(codes, 20 - 8 * j) : _mm256_srli_epi32(codes, 4);
        const __m256i magnitude = _mm256_and_si256(place, _mm256_set1_epi32(0x07f00000));
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 24 - 8 * j), _mm256_set1_epi32(int(0x80000000)));
        return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(magnitude, sign)), _mm256_set1_ps(0x1p120f));
    };
    const __m256i low = _mm256_loadu_si256((const __m256i*)p), high = _mm256_loadu_si256((const __m256i*)(p + 32));
    for (int j = 0; j < 4; ++j) four[j] = {widened(low, j), widened(high, j)};
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats times(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline void store_floats(float* p, Floats a, int64_t count) {
    if (count >= 16) {
        _mm256_storeu_ps(p, a.low);
        _mm256_storeu_ps(p + 8, a.high);
        return;
    }
    const Lanes lanes = lanes_below(count);
    _mm256_maskstore_ps(p, lanes.low, a.low);
    if (count > 8) _mm256_maskstore_ps(p + 8, lanes.high, a.high);
}
inline Floats load_floats(const float* p, int64_t count) {
    if (count >= 16) return load_floats(p);
    const Lanes lanes = lanes_below(count);
    return {_mm256_maskload_ps(p, lanes.low), count > 8 ? _mm256_maskload_ps(p + 8, lanes.high) : _mm256_setzero_ps()};
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_bytes(uint8_t* p, Bytes a) {
    _mm256_storeu_si256((__m256i*)p, a.low);
    _mm256_storeu_si256((__m256i*)(p + 32), a.high);
}
inline Bytes low_nibbles(Bytes a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)}); }
// Each byte shifted up by four bits, and down by some; bits of a neighbouring byte may come in from the other side.
inline Bytes up_four(Bytes a) { return {_mm256_slli_epi16(a.low, 4), _mm256_slli_epi16(a.high, 4)}; }
template <int BITS>
inline Bytes down(Bytes a) { return {_mm256_srli_epi16(a.low, BITS), _mm256_srli_epi16(a.high, BITS)}; }
// Of codes 0 … 15 what a table of 16 bytes, aligned to them, has at their places.
inline Bytes looked_up(Bytes codes, const uint8_t* table) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(both, codes.low), _mm256_shuffle_epi8(both, codes.high)};
}
// The codes of low four bits, and of the bits of `upper` from the fifth on.
template <int BITS>
inline Bytes joined(Bytes low, Bytes upper) {
    const __m256i mask = _mm256_set1_epi8(((1 << BITS) - 1) << 4);
    return {_mm256_or_si256(low.low, _mm256_and_si256(upper.low, mask)), _mm256_or_si256(low.high, _mm256_and_si256(upper.high, mask))};
}
// Sixteen bytes as numbers, without a sign and with one.
inline Ints widened(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline Ints widened(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
// 2^(e - 128) of sixteen bytes e, exactly.
inline Floats powers_of_two(const uint8_t* exponents) {
    const Ints wide = widened(exponents);
    auto power = [](__m256i e) {
        const __m256i one = _mm256_set1_epi32(1), small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(small, _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23), _mm256_cmpgt_epi32(e, one)));
    };
    return {power(wide.low), power(wide.high)};
}
// The same four activations for every lane.
struct Fours { __m256i v; };
inline Fours broadcast_four(const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    return {_mm256_set1_epi32(four)};
}

inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

#ifdef BESSEMER_AVX_VNNI

// sum + the four products of each lane's bytes with the activations
inline Ints dot(Ints sum, Bytes weights, Fours activations) {
#ifdef __AVXVNNI__
    return {_mm256_dpbusd_avx_epi32(sum.low, weights.low, activations.v), _mm256_dpbusd_avx_epi32(sum.high, weights.high, activations.v)};
#else
    return {_mm256_dpbusd_epi32(sum.low, weights.low, activations.v), _mm256_dpbusd_epi32(sum.high, weights.high, activations.v)};
#endif
}

#else

// What 32 bytes of a lane are multiplied into. An instruction multiplies bytes without a sign by bytes with one and adds two products
// in 16 bits, where those of codes of 8 bits overflow. So these lose the 128 that was added to them, |c| meets the activation with
// the sign of c, two products are at most 2 · 128 · 127, and pairs are added in 32 bits at once. Codes of fewer bits meet activations
// as they are, and several pairs stay within 16 bits: 8 · 2 · 15 · 127, 4 · 2 · 31 · 127, 2 · 2 · 63 · 127; doubled floats of 4
// bits, up to 24, as those of 5 bits.
struct ByteWeights { Bytes codes, magnitudes; };
inline ByteWeights byte_weights(Bytes a) {
    const __m256i middle = _mm256_set1_epi8(char(128));
    const Bytes codes{_mm256_xor_si256(a.low, middle), _mm256_xor_si256(a.high, middle)};
    return {codes, {_mm256_abs_epi8(codes.low), _mm256_abs_epi8(codes.high)}};
}
inline Ints pairs_added(__m256i low, __m256i high) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)};
}
inline Ints dot(Ints sum, const ByteWeights& weights, Fours activations) {
    return add(sum, pairs_added(_mm256_maddubs_epi16(weights.magnitudes.low, _mm256_sign_epi8(activations.v, weights.codes.low)),
                                _mm256_maddubs_epi16(weights.magnitudes.high, _mm256_sign_epi8(activations.v, weights.codes.high))));
}
struct Pairs { __m256i low, high; };  // sums of two products in 16 bits
inline Pairs zero_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Pairs dot(Pairs sum, Bytes weights, Fours activations) {
    return {_mm256_add_epi16(sum.low, _mm256_maddubs_epi16(weights.low, activations.v)),
            _mm256_add_epi16(sum.high, _mm256_maddubs_epi16(weights.high, activations.v))};
}
inline Ints add(Ints a, Pairs b) { return add(a, pairs_added(b.low, b.high)); }

#endif

// zero * correction, each lane its own zero point; a correction of 32 activations fits 16 bits
inline Ints times_zeros(const uint8_t* zeros, Ints correction) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)zeros);
    return {_mm256_madd_epi16(_mm256_cvtepu8_epi32(bytes), correction.low),
            _mm256_madd_epi16(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), correction.high)};
}
// Of 32 numbers; an infinity or a NaN where there is one.
inline float largest_magnitude(const float* p) {
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 8)
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + i)), positive));
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
// 32 codes, each p * factor to the nearest, ties to even; returns their sum.
inline int32_t round_to_bytes(const float* p, float factor, int8_t* codes) {
    const __m256 factors = _mm256_set1_ps(factor);
    __m256i rounded[4];
    for (int i = 0; i < 4; ++i) rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p + 8 * i), factors));
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(rounded[0], rounded[1]), _mm256_add_epi32(rounded[2], rounded[3]));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
    // packing goes by halves of a register: four numbers of each lie in the first, four in the second
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)codes, _mm256_permutevar8x32_epi32(bytes, order));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

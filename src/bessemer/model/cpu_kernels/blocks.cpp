// The layouts are those of llama.cpp's ggml-common.h; model/formats/gguf_blocks.py reads the same ones, with the same roundings.
#include "blocks.h"

#include <algorithm>

#include "matrices.h"
#include "parts.h"
#include "registers.h"

namespace bessemer {
namespace {

using namespace registers;

// A number type: values and bytes of a block, and what decodes one to float32.
struct BlockType {
    int64_t values, bytes;
    void (*decode)(const uint8_t* block, float* values);
};

inline float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half_to_float(half);
}

inline uint32_t word_at(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

// Of 32 values the code, 0 … 31: the low halves of 16 bytes, then the high ones; bit i of `high` on top of value i.
inline int low_bits(const uint8_t* q, int i) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; }
inline int five_bits(const uint8_t* q, uint32_t high, int i) { return low_bits(q, i) | int(high >> i & 1) << 4; }

void decode_q4_0(const uint8_t* p, float* values) {
    const float d = half_at(p);
    for (int i = 0; i < 32; ++i) values[i] = d * float(low_bits(p + 2, i) - 8);
}

void decode_q4_1(const uint8_t* p, float* values) {
    const float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 32; ++i) values[i] = d * float(low_bits(p + 4, i)) + m;
}

void decode_q5_0(const uint8_t* p, float* values) {
    const float d = half_at(p);
    const uint32_t high = word_at(p + 2);
    for (int i = 0; i < 32; ++i) values[i] = d * float(five_bits(p + 6, high, i) - 16);
}

void decode_q5_1(const uint8_t* p, float* values) {
    const float d = half_at(p), m = half_at(p + 2);
    const uint32_t high = word_at(p + 4);
    for (int i = 0; i < 32; ++i) values[i] = d * float(five_bits(p + 8, high, i)) + m;
}

void decode_q8_0(const uint8_t* p, float* values) {
    const float d = half_at(p);
    for (int i = 0; i < 32; ++i) values[i] = d * float(int8_t(p[2 + i]));
}

// Scale and minimum of part `part` of 8, 6 bits each in 12 bytes: the first four whole in bytes 0-3 and 4-7, the low halves of the
// others in bytes 8-11, their two high bits on top of the first four's.
inline void scale_and_minimum(const uint8_t* packed, int part, float& scale, float& minimum) {
    if (part < 4) {
        scale = float(packed[part] & 63);
        minimum = float(packed[part + 4] & 63);
        return;
    }
    scale = float((packed[part + 4] & 15) | packed[part - 4] >> 6 << 4);
    minimum = float(packed[part + 4] >> 4 | packed[part] >> 6 << 4);
}

// Parts 2i and 2i + 1 are the low and the high halves of the i-th 32 bytes of q; bit `part` of high[i] is on top of value i.
template <bool five>
inline void decode_parts(const uint8_t* p, const uint8_t* high, const uint8_t* q, float* values) {
    const float d = half_at(p), m = half_at(p + 2);
    for (int part = 0; part < 8; ++part, values += 32) {
        float scale, minimum;
        scale_and_minimum(p + 4, part, scale, minimum);
        const float step = d * scale, less = m * minimum;
        const uint8_t* run = q + part / 2 * 32;
        const int half = part % 2 * 4;
        for (int i = 0; i < 32; ++i) {
            int code = run[i] >> half & 15;
            if (five) code |= (high[i] >> part & 1) << 4;
            values[i] = step * float(code) - less;
        }
    }
}

void decode_q4_k(const uint8_t* p, float* values) { decode_parts<false>(p, nullptr, p + 16, values); }
void decode_q5_k(const uint8_t* p, float* values) { decode_parts<true>(p, p + 16, p + 48, values); }

void decode_q6_k(const uint8_t* p, float* values) {
    const uint8_t *q = p, *high = p + 128, *scales = p + 192;
    const float d = half_at(p + 208);
    for (int run = 0; run < 8; ++run, values += 32) {  // four runs in each half of the block
        const uint8_t *low = q + run / 4 * 64 + run % 2 * 32, *top = high + run / 4 * 32;
        const int half = run % 4 / 2 * 4, pair = run % 4 * 2;
        const float steps[2] = {d * float(int8_t(scales[2 * run])), d * float(int8_t(scales[2 * run + 1]))};
        for (int i = 0; i < 32; ++i) {
            const int code = (low[i] >> half & 15) | (top[i] >> pair & 3) << 4;
            values[i] = steps[i / 16] * float(code - 32);
        }
    }
}

void decode_mxfp4(const uint8_t* p, float* values) {
    constexpr float DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
    const float half = std::ldexp(1.0f, int(p[0]) - 128);
    for (int i = 0; i < 32; ++i) values[i] = half * DOUBLED[low_bits(p + 1, i)];
}

const BlockType* block_type(int32_t type) {
    static constexpr BlockType Q4_0{32, 18, decode_q4_0}, Q4_1{32, 20, decode_q4_1}, Q5_0{32, 22, decode_q5_0},
        Q5_1{32, 24, decode_q5_1}, Q8_0{32, 34, decode_q8_0}, Q4_K{256, 144, decode_q4_k}, Q5_K{256, 176, decode_q5_k},
        Q6_K{256, 210, decode_q6_k}, MXFP4{32, 17, decode_mxfp4};
    switch (type) {
        case 2: return &Q4_0;
        case 3: return &Q4_1;
        case 6: return &Q5_0;
        case 7: return &Q5_1;
        case 8: return &Q8_0;
        case 12: return &Q4_K;
        case 13: return &Q5_K;
        case 14: return &Q6_K;
        case 39: return &MXFP4;
        default: return nullptr;
    }
}

}  // namespace
}  // namespace bessemer

using namespace bessemer;

int32_t bessemer_encode_blocks(int32_t type, const uint8_t* blocks, int64_t count, int8_t* codes, float* scales, int32_t threads) {
    const BlockType* found = block_type(type);
    if (!found) return 0;
    const BlockType kind = *found;
    const int64_t parts = std::min<int64_t>(count, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        float values[256];
        for (int64_t block = count * part / parts; block < count * (part + 1) / parts; ++block) {
            kind.decode(blocks + block * kind.bytes, values);
            for (int64_t first = 0; first < kind.values; first += GROUP) {
                const int64_t place = block * kind.values + first;
                float scale;
                quantise_group(values + first, codes + place, &scale);
                scales[place / GROUP] = half_to_float(float_to_half(scale));
            }
        }
    });
    return 1;
}

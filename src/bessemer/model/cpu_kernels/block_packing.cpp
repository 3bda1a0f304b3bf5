// Blocks of GGUF's types as the products read them: sixteen rows side by side, the codes' upper bits apart from the lower four. The
// layouts of blocks are those of llama.cpp's ggml-common.h, as in blocks.cpp.
#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "parts.h"

namespace bessemer {
namespace {

constexpr int64_t MOST_VALUES = 256, MOST_PARTS = MOST_VALUES / GROUP;

// What a block holds. parts: of each 32 values the codes of scale and minimum, or of the scales of both halves.
struct Block {
    uint16_t scale, offset;
    uint8_t parts[MOST_PARTS][2];
    uint8_t codes[MOST_VALUES];
};

// Sign of a float16: a K block's minimum is taken off, and a matrix's offset is added.
constexpr uint16_t SIGN = 0x8000;

inline uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half;
}
inline void put_half(uint8_t* p, uint16_t half) { std::memcpy(p, &half, 2); }

// Of 32 codes the low four bits in the halves of 16 bytes, and bit i of four bytes on top of code i.
inline void read_fives(const uint8_t* high, const uint8_t* q, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) {
        codes[i] = uint8_t((q[i] & 15) | (high[i / 8] >> i % 8 & 1) << 4);
        codes[i + 16] = uint8_t(q[i] >> 4 | (high[i / 8 + 2] >> i % 8 & 1) << 4);
    }
}
inline void write_fives(const uint8_t* codes, uint8_t* high, uint8_t* q) {
    std::memset(high, 0, 4);
    for (int i = 0; i < 32; ++i) high[i / 8] |= uint8_t((codes[i] >> 4) << i % 8);
    for (int i = 0; i < 16; ++i) q[i] = uint8_t((codes[i] & 15) | codes[i + 16] << 4);
}

void read_q5_0(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    read_fives(p + 2, p + 6, block.codes);
}
void write_q5_0(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    write_fives(block.codes, p + 2, p + 6);
}

void read_q5_1(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    block.offset = half_at(p + 2);
    read_fives(p + 4, p + 8, block.codes);
}
void write_q5_1(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    put_half(p + 2, block.offset);
    write_fives(block.codes, p + 4, p + 8);
}

// Codes of 6 bits of 8 scales and 8 minima in 12 bytes: the first four whole in bytes 0-3 and 4-7, the low halves of the others in
// bytes 8-11, their two high bits on top of the first four's.
inline void read_k_scales(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    block.offset = half_at(p + 2) ^ SIGN;
    const uint8_t* packed = p + 4;
    for (int i = 0; i < 4; ++i) {
        block.parts[i][0] = packed[i] & 63;
        block.parts[i][1] = packed[i + 4] & 63;
        block.parts[i + 4][0] = uint8_t((packed[i + 8] & 15) | packed[i] >> 6 << 4);
        block.parts[i + 4][1] = uint8_t(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
}
inline void write_k_scales(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    put_half(p + 2, block.offset ^ SIGN);
    uint8_t* packed = p + 4;
    for (int i = 0; i < 4; ++i) {
        packed[i] = uint8_t(block.parts[i][0] | block.parts[i + 4][0] >> 4 << 6);
        packed[i + 4] = uint8_t(block.parts[i][1] | block.parts[i + 4][1] >> 4 << 6);
        packed[i + 8] = uint8_t((block.parts[i + 4][0] & 15) | block.parts[i + 4][1] << 4);
    }
}

// Parts 2 i and 2 i + 1 are the low and the high halves of the i-th 32 bytes of q.
inline void read_k_nibbles(const uint8_t* q, uint8_t* codes) {
    for (int run = 0; run < 4; ++run)
        for (int i = 0; i < 32; ++i) {
            codes[64 * run + i] = q[32 * run + i] & 15;
            codes[64 * run + 32 + i] = q[32 * run + i] >> 4;
        }
}
inline void write_k_nibbles(const uint8_t* codes, uint8_t* q) {
    for (int run = 0; run < 4; ++run)
        for (int i = 0; i < 32; ++i) q[32 * run + i] = uint8_t((codes[64 * run + i] & 15) | codes[64 * run + 32 + i] << 4);
}

void read_q4_k(const uint8_t* p, Block& block) {
    read_k_scales(p, block);
    read_k_nibbles(p + 16, block.codes);
}
void write_q4_k(const Block& block, uint8_t* p) {
    write_k_scales(block, p);
    write_k_nibbles(block.codes, p + 16);
}

// Bit `part` of the i-th of 32 bytes is on top of value i of the part.
void read_q5_k(const uint8_t* p, Block& block) {
    read_k_scales(p, block);
    read_k_nibbles(p + 48, block.codes);
    for (int part = 0; part < 8; ++part)
        for (int i = 0; i < 32; ++i) block.codes[32 * part + i] |= uint8_t((p[16 + i] >> part & 1) << 4);
}
void write_q5_k(const Block& block, uint8_t* p) {
    write_k_scales(block, p);
    write_k_nibbles(block.codes, p + 48);
    std::memset(p + 16, 0, 32);
    for (int part = 0; part < 8; ++part)
        for (int i = 0; i < 32; ++i) p[16 + i] |= uint8_t((block.codes[32 * part + i] >> 4) << part);
}

// Each half of 128 values has four runs of 32: halves of 64 bytes, and two bits of 32 bytes.
struct SixesPlace {
    int low, high, half, pair;
    explicit SixesPlace(int run)
        : low(run / 4 * 64 + run % 2 * 32), high(128 + run / 4 * 32), half(run % 4 / 2 * 4), pair(run % 4 * 2) {}
};
void read_q6_k(const uint8_t* p, Block& block) {
    for (int run = 0; run < 8; ++run) {
        const SixesPlace at(run);
        for (int i = 0; i < 32; ++i)
            block.codes[32 * run + i] = uint8_t((p[at.low + i] >> at.half & 15) | (p[at.high + i] >> at.pair & 3) << 4);
    }
    std::memcpy(block.parts, p + 192, 16);
    block.scale = half_at(p + 208);
}
void write_q6_k(const Block& block, uint8_t* p) {
    std::memset(p, 0, 192);
    for (int run = 0; run < 8; ++run) {
        const SixesPlace at(run);
        for (int i = 0; i < 32; ++i) {
            p[at.low + i] |= uint8_t((block.codes[32 * run + i] & 15) << at.half);
            p[at.high + i] |= uint8_t((block.codes[32 * run + i] >> 4) << at.pair);
        }
    }
    std::memcpy(p + 192, block.parts, 16);
    put_half(p + 208, block.scale);
}

// A number type: values and bytes of a block, and what reads and writes one.
struct PackedType {
    int64_t values, bytes;
    void (*read)(const uint8_t* p, Block& block);
    void (*write)(const Block& block, uint8_t* p);
};

const PackedType* packed_type(int32_t type) {
    static constexpr PackedType Q5_0{32, 22, read_q5_0, write_q5_0}, Q5_1{32, 24, read_q5_1, write_q5_1},
        Q4_K{256, 144, read_q4_k, write_q4_k}, Q5_K{256, 176, read_q5_k, write_q5_k}, Q6_K{256, 210, read_q6_k, write_q6_k};
    switch (type) {
        case 6: return &Q5_0;
        case 7: return &Q5_1;
        case 12: return &Q4_K;
        case 13: return &Q5_K;
        case 14: return &Q6_K;
        default: return nullptr;
    }
}

// Where a matrix keeps an output's part and group.
struct Place {
    uint8_t *codes, *parts;
    uint16_t *scale, *offset;

    Place(const Matrix& matrix, int64_t output, int64_t part) {
        const int64_t block = output / WIDTH, lane = output % WIDTH, all = padded(matrix.k) / GROUP;
        const int64_t group = (block * (padded(matrix.k) / matrix.group) + part * GROUP / matrix.group) * WIDTH + lane;
        const int64_t at = block * all + part;
        codes = static_cast<uint8_t*>(const_cast<void*>(matrix.codes)) + at * GROUP * WIDTH * bits_of(matrix.kind) / 8 + 4 * lane;
        parts = matrix.parts ? const_cast<uint8_t*>(matrix.parts) + at * 2 * WIDTH + lane : nullptr;
        scale = const_cast<uint16_t*>(matrix.scales) + group;
        offset = matrix.offsets ? const_cast<uint16_t*>(matrix.offsets) + group : nullptr;
    }
};

constexpr uint32_t EACH_BYTE = 0x01010101;

// The codes of a part as words of four neighbours, to and from a lane of the matrix.
void put_codes(const uint8_t* codes, int64_t upper, uint8_t* lane) {
    uint32_t fours[8], planes[2] = {};
    std::memcpy(fours, codes, 32);
    for (int j = 0; j < 8; ++j) planes[j * upper / 8] |= (fours[j] >> 4 & 3 * EACH_BYTE) << ((j * upper + 4) % 8);
    for (int j = 0; j < 4; ++j) {
        const uint32_t low = (fours[2 * j] & 15 * EACH_BYTE) | (fours[2 * j + 1] & 15 * EACH_BYTE) << 4;
        std::memcpy(lane + 64 * j, &low, 4);
    }
    for (int64_t i = 0; i < upper; ++i) std::memcpy(lane + 64 * (4 + i), planes + i, 4);
}
void take_codes(const uint8_t* lane, int64_t upper, uint8_t* codes) {
    const uint32_t mask = ((1u << upper) - 1) * EACH_BYTE;
    for (int j = 0; j < 8; ++j) {
        uint32_t low, plane = 0;
        std::memcpy(&low, lane + 64 * (j / 2), 4);
        if (upper) std::memcpy(&plane, lane + 64 * (4 + j * upper / 8), 4);
        const uint32_t four = (low >> (j % 2 * 4) & 15 * EACH_BYTE) | (plane >> ((j * upper + 4) % 8) & mask) << 4;
        std::memcpy(codes + 4 * j, &four, 4);
    }
}

void pack_row(const PackedType& type, const uint8_t* blocks, const Matrix& matrix, int64_t output) {
    Block block;
    const int64_t upper = bits_of(matrix.kind) - 4;
    for (int64_t first = 0; first < matrix.k; first += type.values, blocks += type.bytes) {
        type.read(blocks, block);
        for (int64_t part = 0; part < type.values / GROUP; ++part) {
            const Place place(matrix, output, first / GROUP + part);
            put_codes(block.codes + GROUP * part, upper, place.codes);
            *place.scale = block.scale;
            if (place.offset) *place.offset = block.offset;
            if (place.parts) place.parts[0] = block.parts[part][0], place.parts[WIDTH] = block.parts[part][1];
        }
    }
}

void unpack_row(const PackedType& type, const Matrix& matrix, int64_t output, uint8_t* blocks) {
    Block block;
    const int64_t upper = bits_of(matrix.kind) - 4;
    for (int64_t first = 0; first < matrix.k; first += type.values, blocks += type.bytes) {
        for (int64_t part = 0; part < type.values / GROUP; ++part) {
            const Place place(matrix, output, first / GROUP + part);
            take_codes(place.codes, upper, block.codes + GROUP * part);
            block.scale = *place.scale;
            if (place.offset) block.offset = *place.offset;
            if (place.parts) block.parts[part][0] = place.parts[0], block.parts[part][1] = place.parts[WIDTH];
        }
        type.write(block, blocks);
    }
}

}  // namespace
}  // namespace bessemer

using namespace bessemer;

int32_t bessemer_pack_blocks(int32_t type, const uint8_t* blocks, const Matrix* matrix, int32_t threads) {
    const PackedType* found = packed_type(type);
    if (!found) return 0;
    const int64_t row_bytes = matrix->k / found->values * found->bytes;
    // outputs of one block share lines of memory
    const int64_t all = bessemer::blocks(matrix->n), parts = std::min<int64_t>(all, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        const int64_t last = std::min(all * (part + 1) / parts * WIDTH, matrix->n);
        for (int64_t output = all * part / parts * WIDTH; output < last; ++output)
            pack_row(*found, blocks + output * row_bytes, *matrix, output);
    });
    return 1;
}

int32_t bessemer_unpack_blocks(int32_t type, const Matrix* matrix, const int64_t* outputs, int64_t count, uint8_t* blocks) {
    const PackedType* found = packed_type(type);
    if (!found) return 0;
    const int64_t row_bytes = matrix->k / found->values * found->bytes;
    for (int64_t i = 0; i < count; ++i) unpack_row(*found, *matrix, outputs[i], blocks + i * row_bytes);
    return 1;
}

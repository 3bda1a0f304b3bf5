// Blocks of GGUF's types as the products read them: sixteen rows side by side, the codes' upper bits apart from the lower four. The
// layouts of blocks are those of llama.cpp's ggml-common.h, as in blocks.cpp.
#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "parts.h"
#include "registers.h"

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

// Of 32 codes the low halves of 16 bytes, then the high ones.
inline void read_halves(const uint8_t* q, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[i] = q[i] & 15, codes[i + 16] = q[i] >> 4;
}
inline void write_halves(const uint8_t* codes, uint8_t* q) {
    for (int i = 0; i < 16; ++i) q[i] = uint8_t(codes[i] | codes[i + 16] << 4);
}

// IQ4_NL too, whose codes are places in a table.
void read_q4_0(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    read_halves(p + 2, block.codes);
}
void write_q4_0(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    write_halves(block.codes, p + 2);
}

void read_q4_1(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    block.offset = half_at(p + 2);
    read_halves(p + 4, block.codes);
}
void write_q4_1(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    put_half(p + 2, block.offset);
    write_halves(block.codes, p + 4);
}

// A matrix has 128 added to each.
void read_q8_0(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    for (int i = 0; i < 32; ++i) block.codes[i] = p[2 + i] ^ 128;
}
void write_q8_0(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    for (int i = 0; i < 32; ++i) p[2 + i] = block.codes[i] ^ 128;
}

void read_mxfp4(const uint8_t* p, Block& block) {
    block.scale = p[0];
    read_halves(p + 1, block.codes);
}
void write_mxfp4(const Block& block, uint8_t* p) {
    p[0] = uint8_t(block.scale);
    write_halves(block.codes, p + 1);
}

// A part's scale plus 32, 6 bits: the low four in the halves of four bytes behind two with the upper ones.
void read_iq4_xs(const uint8_t* p, Block& block) {
    block.scale = half_at(p);
    for (int part = 0; part < 8; ++part) {
        const int low = p[4 + part / 2] >> (part % 2 * 4) & 15, high = p[2 + part / 4] >> (part % 4 * 2) & 3;
        block.parts[part][0] = uint8_t((low | high << 4) - 32);
        block.parts[part][1] = 0;
        read_halves(p + 8 + 16 * part, block.codes + 32 * part);
    }
}
void write_iq4_xs(const Block& block, uint8_t* p) {
    put_half(p, block.scale);
    std::memset(p + 2, 0, 6);
    for (int part = 0; part < 8; ++part) {
        const int scale = int8_t(block.parts[part][0]) + 32;
        p[4 + part / 2] |= uint8_t((scale & 15) << (part % 2 * 4));
        p[2 + part / 4] |= uint8_t(scale >> 4 << (part % 4 * 2));
        write_halves(block.codes + 32 * part, p + 8 + 16 * part);
    }
}

// A number type: values and bytes of a block, and what reads and writes one.
struct PackedType {
    int64_t values, bytes;
    void (*read)(const uint8_t* p, Block& block);
    void (*write)(const Block& block, uint8_t* p);
};

const PackedType* packed_type(int32_t type) {
    static constexpr PackedType Q5_0{32, 22, read_q5_0, write_q5_0}, Q5_1{32, 24, read_q5_1, write_q5_1},
        Q4_K{256, 144, read_q4_k, write_q4_k}, Q5_K{256, 176, read_q5_k, write_q5_k}, Q6_K{256, 210, read_q6_k, write_q6_k},
        Q4_0{32, 18, read_q4_0, write_q4_0}, Q4_1{32, 20, read_q4_1, write_q4_1}, Q8_0{32, 34, read_q8_0, write_q8_0},
        MXFP4{32, 17, read_mxfp4, write_mxfp4}, IQ4_NL{32, 18, read_q4_0, write_q4_0}, IQ4_XS{256, 136, read_iq4_xs, write_iq4_xs};
    switch (type) {
        case 2: return &Q4_0;
        case 3: return &Q4_1;
        case 8: return &Q8_0;
        case 6: return &Q5_0;
        case 7: return &Q5_1;
        case 12: return &Q4_K;
        case 13: return &Q5_K;
        case 14: return &Q6_K;
        case 20: return &IQ4_NL;
        case 23: return &IQ4_XS;
        case 39: return &MXFP4;
        default: return nullptr;
    }
}

// Where a matrix keeps an output's part and group, from the first part on.
struct Place {
    uint8_t *codes, *parts, *exponent;
    uint16_t *scale, *offset;
    int64_t step, parts_of_group, part = 0;

    Place(const Matrix& matrix, int64_t output) {
        const int64_t block = output / WIDTH, lane = output % WIDTH, all = padded(matrix.k) / GROUP;
        parts_of_group = matrix.group / GROUP;
        step = GROUP * WIDTH * bits_of(matrix.kind) / 8;
        const int64_t group = block * (all / parts_of_group) * WIDTH + lane;
        codes = static_cast<uint8_t*>(const_cast<void*>(matrix.codes)) + block * all * step + 4 * lane;
        parts = matrix.parts ? const_cast<uint8_t*>(matrix.parts) + block * all * 2 * WIDTH + lane : nullptr;
        exponent = matrix.kind == MX4 ? const_cast<uint8_t*>(matrix.zeros) + group : nullptr;
        scale = matrix.scales ? const_cast<uint16_t*>(matrix.scales) + group : nullptr;
        offset = matrix.offsets ? const_cast<uint16_t*>(matrix.offsets) + group : nullptr;
    }

    // The place of another output of the same sixteen.
    Place beside(int64_t lanes) const {
        Place other = *this;
        other.codes += 4 * lanes;
        if (parts) other.parts += lanes;
        if (exponent) other.exponent += lanes;
        if (scale) other.scale += lanes;
        if (offset) other.offset += lanes;
        return other;
    }

    void next() {
        codes += step;
        if (parts) parts += 2 * WIDTH;
        if (++part % parts_of_group) return;
        if (exponent) exponent += WIDTH;
        if (scale) scale += WIDTH;
        if (offset) offset += WIDTH;
    }
};

constexpr uint32_t EACH_BYTE = 0x01010101;

// The codes of a part as words of four neighbours, to and from a lane of the matrix. UPPER: bits of a code above the four low ones.
template <int UPPER>
inline void put_codes(const uint8_t* codes, uint8_t* lane) {
    if constexpr (UPPER == 4) {
        for (int j = 0; j < 8; ++j) std::memcpy(lane + 64 * j, codes + 4 * j, 4);
        return;
    }
    uint32_t fours[8], planes[2] = {};
    std::memcpy(fours, codes, 32);
    if constexpr (UPPER > 0)
        for (int j = 0; j < 8; ++j) planes[j * UPPER / 8] |= (fours[j] >> 4 & 3 * EACH_BYTE) << ((j * UPPER + 4) % 8);
    for (int j = 0; j < 4; ++j) {
        const uint32_t low = (fours[2 * j] & 15 * EACH_BYTE) | (fours[2 * j + 1] & 15 * EACH_BYTE) << 4;
        std::memcpy(lane + 64 * j, &low, 4);
    }
    for (int i = 0; i < UPPER; ++i) std::memcpy(lane + 64 * (4 + i), planes + i, 4);
}
template <int UPPER>
inline void take_codes(const uint8_t* lane, uint8_t* codes) {
    if constexpr (UPPER == 4) {
        for (int j = 0; j < 8; ++j) std::memcpy(codes + 4 * j, lane + 64 * j, 4);
        return;
    }
    for (int j = 0; j < 8; ++j) {
        uint32_t low, plane = 0;
        std::memcpy(&low, lane + 64 * (j / 2), 4);
        if constexpr (UPPER > 0) std::memcpy(&plane, lane + 64 * (4 + j * UPPER / 8), 4);
        const uint32_t upper = plane >> ((j * UPPER + 4) % 8) & ((1u << UPPER) - 1) * EACH_BYTE;
        const uint32_t four = (low >> (j % 2 * 4) & 15 * EACH_BYTE) | upper << 4;
        std::memcpy(codes + 4 * j, &four, 4);
    }
}

// Up to sixteen outputs that lie side by side, a block of each at a time: what they share of a line is written while it is near.
template <int UPPER>
void pack_rows(const PackedType& type, const uint8_t* blocks, int64_t row_bytes, const Matrix& matrix, int64_t output, int64_t count) {
    Block block;
    Place first(matrix, output);
    for (int64_t value = 0; value < matrix.k; value += type.values, blocks += type.bytes) {
        for (int64_t lane = 0; lane < count; ++lane) {
            type.read(blocks + lane * row_bytes, block);
            Place place = first.beside(lane);
            for (int64_t part = 0; part < type.values / GROUP; ++part, place.next()) {
                put_codes<UPPER>(block.codes + GROUP * part, place.codes);
                if (place.exponent) *place.exponent = uint8_t(block.scale);
                else *place.scale = block.scale;
                if (place.offset) *place.offset = block.offset;
                if (place.parts) place.parts[0] = block.parts[part][0], place.parts[WIDTH] = block.parts[part][1];
            }
        }
        for (int64_t part = 0; part < type.values / GROUP; ++part) first.next();
    }
}

template <int UPPER>
void unpack_row(const PackedType& type, const Matrix& matrix, int64_t output, uint8_t* blocks) {
    Block block;
    Place place(matrix, output);
    for (int64_t first = 0; first < matrix.k; first += type.values, blocks += type.bytes) {
        for (int64_t part = 0; part < type.values / GROUP; ++part, place.next()) {
            take_codes<UPPER>(place.codes, block.codes + GROUP * part);
            block.scale = place.exponent ? *place.exponent : *place.scale;
            if (place.offset) block.offset = *place.offset;
            if (place.parts) block.parts[part][0] = place.parts[0], block.parts[part][1] = place.parts[WIDTH];
        }
        type.write(block, blocks);
    }
}

// Four bytes, each the low half of one of four halves of bytes, in their order.
inline uint32_t spread(uint32_t halves) {
    halves = (halves | halves << 8) & 0x00ff00ff;
    return (halves | halves << 4) & 0x0f0f0f0f;
}

// Words of sixteen rows side by side. Of nibbles a word holds eight neighbours: the first four become low halves, the others high ones.
template <bool NIBBLES>
void pack_words(const uint8_t* rows, int64_t outputs, int64_t row_bytes, int64_t words, uint32_t flip, uint8_t* packed) {
    for (int64_t j = 0; j < words; ++j, packed += 4 * WIDTH) {
        uint32_t lanes[WIDTH] = {};
        const int64_t left = row_bytes - 4 * j;
        if (left >= 4)
            for (int64_t lane = 0; lane < outputs; ++lane) std::memcpy(lanes + lane, rows + lane * row_bytes + 4 * j, 4);
        else if (left > 0)
            for (int64_t lane = 0; lane < outputs; ++lane) std::memcpy(lanes + lane, rows + lane * row_bytes + 4 * j, size_t(left));
        for (uint32_t& word : lanes) word = (NIBBLES ? spread(word & 0xffff) | spread(word >> 16) << 4 : word) ^ flip;
        std::memcpy(packed, lanes, sizeof lanes);
    }
}

// Halves of sixteen rows side by side, two neighbours at a time.
void pack_halves(const uint8_t* rows, int64_t outputs, int64_t k, uint8_t* packed) {
    for (int64_t i = 0; i < k; i += 2) {
        uint16_t lanes[2][WIDTH] = {};
        for (int64_t lane = 0; lane < outputs; ++lane) {
            const uint8_t* place = rows + (lane * k + i) * 2;
            std::memcpy(&lanes[0][lane], place, 2);
            if (i + 1 < k) std::memcpy(&lanes[1][lane], place + 2, 2);
        }
        std::memcpy(packed + i * WIDTH * 2, lanes, i + 1 < k ? sizeof lanes : sizeof lanes[0]);
    }
}

}  // namespace
}  // namespace bessemer

using namespace bessemer;

int32_t bessemer_split_blocks(int32_t type, const uint8_t* blocks, int64_t count, uint8_t* codes, float* scales, float* offsets,
                              int32_t threads) {
    constexpr int32_t Q4_0 = 2, Q4_1 = 3, Q8_0 = 8;
    if (type != Q4_0 && type != Q4_1 && type != Q8_0) return 0;
    const int64_t head = type == Q4_1 ? 4 : 2, bytes = head + (type == Q8_0 ? 32 : 16), parts = std::min<int64_t>(count, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        for (int64_t block = count * part / parts; block < count * (part + 1) / parts; ++block) {
            const uint8_t *p = blocks + block * bytes, *q = p + head;
            scales[block] = registers::half_to_float(half_at(p));
            if (type == Q4_1) offsets[block] = registers::half_to_float(half_at(p + 2));
            if (type == Q8_0) {
                std::memcpy(codes + 32 * block, q, 32);
                continue;
            }
            uint8_t* pairs = codes + 16 * block;
            for (int i = 0; i < 8; ++i) {
                pairs[i] = uint8_t((q[2 * i] & 15) | q[2 * i + 1] << 4);
                pairs[i + 8] = uint8_t(q[2 * i] >> 4 | (q[2 * i + 1] & 240));
            }
        }
    });
    return 1;
}

void bessemer_pack_floats(int32_t kind, const uint8_t* values, int64_t n, int64_t k, uint8_t* packed, int32_t threads) {
    const int64_t size = kind == F32 ? 4 : 2, row_bytes = k * size, padded_bytes = (kind == BF16 ? padded(k) : k) * size;
    const int64_t all = bessemer::blocks(n), parts = std::min<int64_t>(all, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        for (int64_t block = all * part / parts; block < all * (part + 1) / parts; ++block) {
            const uint8_t* rows = values + block * WIDTH * row_bytes;
            uint8_t* out = packed + block * WIDTH * padded_bytes;
            const int64_t outputs = std::min(WIDTH, n - block * WIDTH);
            if (kind == F16) pack_halves(rows, outputs, k, out);
            else pack_words<false>(rows, outputs, row_bytes, padded_bytes / 4, 0, out);
        }
    });
}

void bessemer_pack_codes(int32_t bits, const uint8_t* codes, int64_t n, int64_t k, int32_t flipped, uint8_t* packed, int32_t threads) {
    const int64_t row_bytes = k * bits / 8, words = padded(k) * bits / 32, all = bessemer::blocks(n);
    const int64_t parts = std::min<int64_t>(all, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {
        for (int64_t block = all * part / parts; block < all * (part + 1) / parts; ++block)
            (bits == 4 ? pack_words<true> : pack_words<false>)(
                codes + block * WIDTH * row_bytes, std::min(WIDTH, n - block * WIDTH), row_bytes, words, uint32_t(flipped) * EACH_BYTE,
                packed + block * words * 4 * WIDTH);
    });
}

int32_t bessemer_pack_blocks(int32_t type, const uint8_t* blocks, const Matrix* matrix, int32_t threads) {
    const PackedType* found = packed_type(type);
    if (!found) return 0;
    const int64_t row_bytes = matrix->k / found->values * found->bytes;
    const int64_t all = bessemer::blocks(matrix->n), parts = std::min<int64_t>(all, 8 * threads), upper = bits_of(matrix->kind) - 4;
    const auto pack = upper == 0 ? pack_rows<0> : upper == 1 ? pack_rows<1> : upper == 2 ? pack_rows<2> : pack_rows<4>;
    run_parts(threads, parts, [&](int64_t part) {
        const int64_t last = std::min(all * (part + 1) / parts * WIDTH, matrix->n);
        for (int64_t output = all * part / parts * WIDTH; output < last; output += WIDTH)
            pack(*found, blocks + output * row_bytes, row_bytes, *matrix, output, std::min(WIDTH, last - output));
    });
    return 1;
}

int32_t bessemer_unpack_blocks(int32_t type, const Matrix* matrix, const int64_t* outputs, int64_t count, uint8_t* blocks) {
    const PackedType* found = packed_type(type);
    if (!found) return 0;
    const int64_t row_bytes = matrix->k / found->values * found->bytes;
    const int64_t upper = bits_of(matrix->kind) - 4;
    const auto unpack = upper == 0 ? unpack_row<0> : upper == 1 ? unpack_row<1> : upper == 2 ? unpack_row<2> : unpack_row<4>;
    for (int64_t i = 0; i < count; ++i) unpack(*found, *matrix, outputs[i], blocks + i * row_bytes);
    return 1;
}

// The kernels on seeded numbers, without Python: what they give as a hash by case, for machines that run C++ and no PyTorch.
//
//     kernels_elsewhere [numbers] [matrices] [attention] [rows] [step]
//
// prints the arithmetic, then a line `case hash` for each. The hashes of two builds are equal where every bit is, but for the bits of a
// NaN, which processors choose. With PRODUCTS_ALONE only numbers and matrices are compiled in. test_kernels_elsewhere.py compiles and
// compares.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "batch_invariant.h"
#include "blocks.h"
#include "cross_entropy.h"
#include "draw.h"
#include "floats.h"
#include "step.h"

using namespace bessemer;

namespace {

// Steele, Lea and Flood 2014, SplitMix64.
struct Draw {
    uint64_t state;
    uint64_t bits() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }
    // In [-1, 1), most of them small.
    float number() {
        const float uniform = float(int32_t(bits() >> 40) - (1 << 23)) * 0x1p-23f;
        return uniform * uniform * uniform;
    }
    // Any bits that are no NaN.
    float any() {
        for (;;) {
            const uint32_t word = uint32_t(bits());
            float value;
            std::memcpy(&value, &word, 4);
            if (value == value) return value;
        }
    }
};

template <class T>
struct Numbers {
    T* values;
    int64_t count;
    explicit Numbers(int64_t size)
        : values(static_cast<T*>(::operator new(size_t(size + 64) * sizeof(T), std::align_val_t(64)))), count(size) {
        std::memset(static_cast<void*>(values), 0, size_t(size + 64) * sizeof(T));
    }
    Numbers(const Numbers&) = delete;
    ~Numbers() { ::operator delete(values, std::align_val_t(64)); }
    T& operator[](int64_t i) { return values[i]; }
};

// Of attention_tile.h's name there is another: these are ours.
using Floats32 = ::Numbers<float>;

void fill(Floats32& numbers, uint64_t seed, float scale = 1.0f) {
    Draw draw{seed};
    for (int64_t i = 0; i < numbers.count; ++i) numbers[i] = scale * draw.number();
}
template <class T>
void fill_bytes(::Numbers<T>& numbers, uint64_t seed) {
    Draw draw{seed};
    for (int64_t i = 0; i < numbers.count * int64_t(sizeof(T)); ++i) reinterpret_cast<uint8_t*>(numbers.values)[i] = uint8_t(draw.bits());
}
// float16s in ±[2⁻¹⁴, 2).
uint16_t small_half(Draw& draw) {
    const uint64_t bits = draw.bits();
    return uint16_t((bits & 1) << 15 | (1 + bits / 2 % 15) << 10 | (bits >> 32 & 1023));
}

// FNV-1a.
struct Hash {
    uint64_t value = 0xcbf29ce484222325u;
    void word(uint32_t word) {
        for (int i = 0; i < 4; ++i) value = (value ^ (word >> 8 * i & 255)) * 0x100000001b3u;
    }
    void floats(const float* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, values + i, 4);
            word((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
        }
    }
    void bytes(const void* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i) word(static_cast<const uint8_t*>(values)[i]);
    }
};

void tell(const std::string& name, const Hash& hash) { std::printf("%s %016llx\n", name.c_str(), (unsigned long long)hash.value); }
void must(const char* failed) {
    if (!failed) return;
    std::fprintf(stderr, "%s\n", failed);
    std::exit(1);
}
void must(bool held, const char* what) {
    if (!held) must(what);
}

// --- numbers ---------------------------------------------------------------------------------------------------------------------

void numbers() {
    Floats32 wide(LANES), other(LANES), third(LANES), out(LANES);
    Draw draw{1};
    Hash fused, narrow, loads;
    for (int i = 0; i < 20000; ++i) {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            float &a = wide[lane], &b = other[lane], &c = third[lane];
            a = draw.any();
            b = draw.any();
            c = draw.any();
            if (i % 4 == 0) continue;
            const float sign = draw.below(2) ? 1.0f : -1.0f;
            const int place = int(draw.below(80));
            if (i % 4 == 1) {  // what is left of a product
                a = float(1 << 23 | draw.below(1 << 23));
                b = float(1 << 23 | draw.below(1 << 23));
                c = -a * b;
            } else if (i % 4 == 2) {  // a product halfway between two floats, and less than a float64 keeps of it
                a = float(4097 + 2 * draw.below(600));
                b = float(4097 + 2 * draw.below(600));
                c = std::ldexp(sign, -place);
            } else {  // a little less than halfway between two floats below the normal numbers
                const float off = float(draw.below(64)) * 0x1p-23f;
                a = (1.0f + off) * 0x1p-75f;
                b = (1.0f - off) * 0x1p-75f * sign;
                c = std::ldexp(float(draw.below(1 << 22)), -149);
            }
        }
        store_floats(out.values, fma(load_floats(wide.values), load_floats(other.values), load_floats(third.values)));
        fused.floats(out.values, LANES);
        uint16_t halves[LANES];
        store_halves(halves, load_floats(wide.values));
        narrow.bytes(halves, sizeof halves);
        store_bfloats(halves, load_floats(wide.values));
        narrow.bytes(halves, sizeof halves);
        store_halves(halves, load_floats(third.values));
        narrow.bytes(halves, sizeof halves);
    }
    for (int half = 0; half < 1 << 16; half += LANES) {
        uint16_t halves[LANES];
        for (int lane = 0; lane < LANES; ++lane) halves[lane] = uint16_t(half + lane);
        store_floats(out.values, load_halves(halves));
        loads.floats(out.values, LANES);
        store_floats(out.values, load_bfloats(halves));
        loads.floats(out.values, LANES);
    }
    ::Numbers<uint8_t> bytes(256);
    for (int i = 0; i < 256; ++i) bytes[i] = uint8_t(i);
    for (int i = 0; i < 256; i += LANES) {
        store_floats(out.values, powers_of_two(bytes.values + i));
        loads.floats(out.values, LANES);
        store_floats(out.values, load_signed_bytes(reinterpret_cast<int8_t*>(bytes.values) + i));
        loads.floats(out.values, LANES);
        store_floats(out.values, load_nibbles(bytes.values + i));
        loads.floats(out.values, LANES);
    }
    for (int i = 0; i < 256; i += 64) {
        for (int j = 0; j < 64; ++j) bytes[i + j] = ((i + j) & 127) == 127 ? 0 : uint8_t(i + j);
        Floats four[4];
        load_e4m3(bytes.values + i, four);
        for (const Floats& some : four) {
            store_floats(out.values, some);
            loads.floats(out.values, LANES);
        }
    }
    tell("numbers.fused", fused);
    tell("numbers.narrowed", narrow);
    tell("numbers.widened", loads);
}

// --- matrices --------------------------------------------------------------------------------------------------------------------

// Of llama.cpp's types by their numbers.
int64_t block_bytes(int type) {
    switch (type) {
        case 6: return 22;    // Q5_0
        case 7: return 24;    // Q5_1
        case 12: return 144;  // Q4_K
        case 13: return 176;  // Q5_K
        case 14: return 210;  // Q6_K
        case 20: return 18;   // IQ4_NL
        case 23: return 136;  // IQ4_XS
        default: return 17;   // MXFP4
    }
}

struct Packed {
    ::Numbers<uint8_t> codes, zeros, parts;
    ::Numbers<uint16_t> scales, offsets;
    Floats32 bias, wide_scales;
    Matrix matrix;

    // type: of GGUF, as llama.cpp numbers them; -1: codes or floats of the kind itself.
    Packed(Kind kind, int64_t n, int64_t k, int32_t group, int type, bool has_zeros, bool has_offsets, bool has_parts, uint64_t seed)
        : codes(blocks(n) * WIDTH * padded(k) * 4), zeros(blocks(n) * WIDTH * padded(k)), parts(blocks(n) * WIDTH * padded(k)),
          scales(blocks(n) * WIDTH * padded(k)), offsets(blocks(n) * WIDTH * padded(k)), bias(n),
          wide_scales(blocks(n) * WIDTH * padded(k)) {
        fill(bias, seed);
        Draw draw{seed + 1};
        for (int64_t i = 0; i < scales.count; ++i) scales[i] = small_half(draw), offsets[i] = small_half(draw);
        for (int64_t i = 0; i < zeros.count; ++i) zeros[i] = kind == MX4 ? uint8_t(draw.below(256)) : uint8_t(draw.below(16));
        fill(wide_scales, seed + 2);
        const bool is_float = kind == F32 || kind == F16 || kind == BF16;
        matrix = {n, k, kind, group, codes.values, is_float || kind == MX4 ? nullptr : scales.values,
                  has_zeros || kind == MX4 ? zeros.values : nullptr, has_offsets ? offsets.values : nullptr,
                  has_parts ? parts.values : nullptr, seed % 2 ? bias.values : nullptr};
        if (kind == F8) matrix.scales = reinterpret_cast<const uint16_t*>(wide_scales.values);
        if (type >= 0) {
            pack_blocks(type, seed + 3);
            return;
        }
        ::Numbers<uint8_t> source(n * k * 4);
        fill_bytes(source, seed + 3);
        if (is_float) {
            for (int64_t i = 0; i < n * k; ++i) {
                const float value = draw.number();
                if (kind == F32) std::memcpy(source.values + 4 * i, &value, 4);
                const uint16_t half = kind == F16 ? float_to_half(value) : float_to_bfloat(value);
                if (kind != F32) std::memcpy(source.values + 2 * i, &half, 2);
            }
            bessemer_pack_floats(kind, source.values, n, k, codes.values, 2);
        } else {
            for (int64_t i = 0; kind == F8 && i < n * k; ++i)
                if ((source[i] & 127) == 127) source[i] = 1;
            bessemer_pack_codes(kind == Q4 ? 4 : 8, source.values, n, k, kind == Q8 ? 128 : 0, codes.values, 2);
        }
    }

    void pack_blocks(int type, uint64_t seed) {
        const bool wide = matrix.group == 256;
        const int64_t size = block_bytes(type);
        const int64_t count = matrix.n * matrix.k / (wide ? 256 : 32);
        ::Numbers<uint8_t> source(count * size), again(count * size);
        fill_bytes(source, seed);
        Draw draw{seed + 1};
        for (int64_t block = 0; block < count && type != 39; ++block)
            for (int64_t at : {type == 14 ? 208 : 0, type == 14 ? 208 : 2}) {
                const uint16_t half = small_half(draw);
                if (at == 0 || type == 14 || matrix.offsets) std::memcpy(source.values + block * size + at, &half, 2);
            }
        must(bessemer_pack_blocks(type, source.values, &matrix, 2), "the type is not known");
        std::vector<int64_t> outputs(size_t(matrix.n));
        for (int64_t n = 0; n < matrix.n; ++n) outputs[size_t(n)] = n;
        bessemer_unpack_blocks(type, &matrix, outputs.data(), matrix.n, again.values);
        must(!std::memcmp(source.values, again.values, size_t(count * size)), "blocks are not what was packed");
    }
};

// Rows of activations: groups of zeros, of widely different sizes and of halves of a step among them, at last an infinity and a NaN.
void fill_rows(Floats32& values, int64_t m, int64_t k) {
    fill(values, uint64_t(m));
    for (int64_t r = 0; r < m; ++r)
        for (int64_t i = 0; i < k; ++i) {
            const int64_t group = (r + i / 32) % 7;
            if (group == 4) values[r * k + i] = i % 32 ? float(i % 32) - 15.5f : 127.0f;  // ties
            values[r * k + i] *= group == 0 ? 0.0f : group == 1 ? 1e-30f : group == 2 ? 1e4f : group == 3 && i % 32 ? 0.0f : 1.0f;
        }
    if (m < 40) return;
    values[(m - 2) * k + 5] = INFINITY;
    values[(m - 1) * k + 6] = NAN;
}

void product(const std::string& name, const Packed& packed) {
    const Matrix& matrix = packed.matrix;
    Hash read;
    Floats32 row(matrix.k);
    for (int64_t output = 0; output < matrix.n; output += 3) {
        bessemer_read_row(&matrix, output, row.values);
        read.floats(row.values, matrix.k);
    }
    tell(name + ".row", read);
    for (int64_t codes_each : {1, 2}) {
        if (codes_each == 2 && !is_coded(matrix.kind)) break;
        Hash hash;
        for (int64_t m : {1, 2, 3, 8, 40}) {
            Floats32 values(m * matrix.k), out(m * matrix.n);
            ::Numbers<char> memory(rows_bytes(matrix.kind, m, matrix.k, codes_each));
            fill_rows(values, m, matrix.k);
            must(bessemer_multiply(&matrix, values.values, m, matrix.k, codes_each, out.values, matrix.n, memory.values, m == 8 ? 2 : 1));
            hash.floats(out.values, out.count);
        }
        tell(name + (codes_each == 2 ? ".16" : ".8"), hash);
    }
}

void matrices() {
    constexpr int64_t N = 73;
    product("F32", {F32, N, 77, 32, -1, false, false, false, 11});
    product("F16", {F16, N, 77, 32, -1, false, false, false, 12});
    product("BF16", {BF16, N, 77, 32, -1, false, false, false, 13});
    product("F8", {F8, N, 203, 128, -1, false, false, false, 14});
    product("Q8.whole", {Q8, N, 200, 224, -1, false, false, false, 15});
    product("Q8.32", {Q8, N, 200, 32, -1, false, false, false, 16});
    product("Q8.64", {Q8, N, 256, 64, -1, false, false, false, 17});
    product("Q4.whole", {Q4, N, 200, 224, -1, false, false, false, 18});
    product("Q4.32", {Q4, N, 200, 32, -1, false, false, false, 19});
    product("Q4.128", {Q4, N, 256, 128, -1, false, false, false, 20});
    product("Q4.zeros", {Q4, N, 200, 32, -1, true, false, false, 21});
    product("Q4.whole.zeros", {Q4, N, 200, 224, -1, true, false, false, 22});
    product("Q4.offsets", {Q4, N, 200, 32, -1, false, true, false, 23});
    product("Q5_0", {Q5, N, 224, 32, 6, false, false, false, 24});
    product("Q5_1", {Q5, N, 224, 32, 7, false, true, false, 25});
    product("Q4_K", {Q4, N, 512, 256, 12, false, true, true, 26});
    product("Q5_K", {Q5, N, 512, 256, 13, false, true, true, 27});
    product("Q6_K", {Q6, N, 512, 256, 14, false, false, true, 28});
    product("IQ4_NL", {IQ4, N, 224, 32, 20, false, false, false, 29});
    product("IQ4_XS", {IQ4, N, 512, 256, 23, false, false, true, 30});
    product("MXFP4", {MX4, N, 224, 32, 39, false, false, false, 31});
    // codes at their ends meet activations at theirs: the largest sums of products that there are
    for (Kind kind : {Q8, Q4, Q5, Q6, IQ4, MX4}) {
        const bool of_halves = kind == Q6;
        Packed whole(kind, 16, 256, of_halves ? 256 : 32, -1, false, false, of_halves, 32);
        std::memset(whole.parts.values, 127, size_t(whole.parts.count));
        for (int byte : {0, 255}) {
            std::memset(whole.codes.values, byte, size_t(whole.codes.count));
            if (kind == MX4 || kind == IQ4) std::memset(whole.codes.values, byte & 0x77, size_t(whole.codes.count));
            Floats32 values(256), out(16);
            ::Numbers<char> memory(rows_bytes(kind, 1, 256, 1));
            Hash hash;
            for (float one : {1.0f, -1.0f}) {
                for (int64_t i = 0; i < 256; ++i) values[i] = one;
                must(bessemer_multiply(&whole.matrix, values.values, 1, 256, 1, out.values, 16, memory.values, 1));
                hash.floats(out.values, 16);
            }
            tell("ends." + std::to_string(kind) + "." + std::to_string(byte), hash);
        }
    }
    for (int type : {2, 3, 6, 7, 8, 12, 13, 14, 39}) {
        ::Numbers<uint8_t> source(8 * 256);
        fill_bytes(source, uint64_t(type));
        for (int64_t i = 0; i < source.count; ++i) source[i] &= 0x3f;  // scales that are finite, wherever they lie
        ::Numbers<int8_t> codes(8 * 256);
        Floats32 scales(8 * 8);
        must(bessemer_encode_blocks(type, source.values, 8, codes.values, scales.values, 1), "the type is not known");
        Hash hash;
        hash.bytes(codes.values, codes.count);
        hash.floats(scales.values, scales.count);
        tell("encoded." + std::to_string(type), hash);
    }
}

#ifndef PRODUCTS_ALONE

// --- attention -------------------------------------------------------------------------------------------------------------------

int64_t page_bytes(PageType type, int64_t numbers) {
    return type == PAGE_F32 ? 4 * numbers : type == PAGE_I4 ? numbers / 2 : type == PAGE_I8 ? numbers : 2 * numbers;
}

struct Case {
    const char* name;
    int64_t heads, kv_heads, key_width, value_width;
    bool latent;
    Scores scores;
};

void attend_case(const Case& given, PageType type) {
    constexpr int64_t BLOCK = 16, BLOCKS = 64, WIDE = 24;
    const int64_t kv = given.kv_heads, slots = BLOCKS * kv * BLOCK;
    ::Numbers<uint8_t> keys(page_bytes(type, slots * given.key_width)), values(page_bytes(type, slots * given.value_width));
    Floats32 key_scales(slots), value_scales(slots);
    const Pages pages{keys.values, given.latent ? keys.values : values.values, key_scales.values,
                      given.latent ? key_scales.values : value_scales.values, kv, BLOCK, given.key_width, given.value_width,
                      given.latent ? given.key_width : given.value_width, BLOCKS, type};
    // a prompt, a prompt behind 300 tokens, single tokens: short and long
    const std::vector<int64_t> before = {0, 300, 5, 290}, rows = {37, 10, 1, 1};
    std::vector<int64_t> starts = {0};
    std::vector<int32_t> positions, tables;
    for (size_t s = 0; s < rows.size(); ++s) {
        starts.push_back(starts.back() + rows[s]);
        for (int64_t row = 0; row < rows[s]; ++row) positions.push_back(int32_t(before[s] + row));
        for (int64_t block = 0; block < WIDE; ++block) tables.push_back(int32_t((block * 7 + int64_t(s) * 13) % BLOCKS));
    }
    // what lies there already: every page is written, some of them by several sequences
    Floats32 key(kv * given.key_width), value(kv * given.value_width);
    for (int64_t position = 0; position < WIDE * BLOCK; ++position)
        for (int64_t s = 0; s < int64_t(rows.size()); ++s) {
            fill(key, uint64_t(position * 4 + s), position % 9 ? 1.0f : 30.0f);
            fill(value, uint64_t(position * 4 + s) + 77777);
            if (position % 50 == 7) std::memset(key.values, 0, size_t(key.count) * 4);
            const int64_t begin[] = {0, 1};
            const int32_t at[] = {int32_t(position)};
            const Ragged one{1, begin, at, tables.data() + s * WIDE, WIDE};
            must(bessemer_write_pages(&pages, &one, key.values, given.latent ? nullptr : value.values));
        }
    const Ragged batch{int64_t(rows.size()), starts.data(), positions.data(), tables.data(), WIDE};
    Floats32 queries(starts.back() * given.heads * given.key_width), sinks(given.heads);
    fill(queries, 5, 4.0f);
    fill(sinks, 6);
    Scores scores = given.scores;
    if (scores.sinks) scores.sinks = sinks.values;
    Hash hash;
    hash.bytes(keys.values, keys.count);
    hash.bytes(values.values, values.count);
    hash.floats(key_scales.values, slots);
    for (int threads : {1, 2}) {
        Floats32 out(starts.back() * given.heads * given.value_width);
        must(bessemer_paged_attention(&pages, &scores, &batch, given.heads, queries.values, out.values, threads));
        hash.floats(out.values, out.count);
    }
    tell(std::string("attention.") + given.name + "." + std::to_string(type), hash);
}

void attention() {
    static const float some = 0;
    const Case cases[] = {
        {"plain", 2, 2, 64, 64, false, {0.125f, 0, 0, nullptr}},
        {"grouped", 10, 2, 32, 48, false, {0.2f, 0, 0, &some}},
        {"many", 14, 2, 40, 24, false, {0.2f, 0, 100, nullptr}},
        {"softcap", 3, 1, 80, 80, false, {0.1f, 20.0f, 0, nullptr}},
        {"latent", 4, 1, 48, 32, true, {0.15f, 0, 0, nullptr}},
    };
    for (const Case& one : cases)
        for (PageType type : {PAGE_F32, PAGE_F16, PAGE_BF16, PAGE_I8, PAGE_I4}) attend_case(one, type);
}

// --- rows ------------------------------------------------------------------------------------------------------------------------

void rows() {
    for (int64_t width : {16, 100}) {
        Floats32 from(5 * width), to(5 * width), weight(width), bias(width);
        fill(from, 1, 3.0f);
        fill(weight, 2);
        fill(bias, 3);
        Hash hash;
        for (NormKind kind : {NO_NORM, RMS_NORM, LAYER_NORM}) {
            norm_rows({weight.values, bias.values, 1e-5f, kind}, from.values, 5, width, to.values, 1);
            hash.floats(to.values, to.count);
        }
        tell("norms." + std::to_string(width), hash);
    }
    for (int64_t width : {12, 64})
        for (int64_t interleaved : {0, 1}) {
            Floats32 cosines(9 * width), sines(9 * width), heads(9 * 3 * width);
            fill(cosines, 1);
            fill(sines, 2);
            fill(heads, 3);
            rotate_rows({cosines.values, sines.values, width, 9, interleaved}, 9, 3, width, heads.values, 1);
            Hash hash;
            hash.floats(heads.values, heads.count);
            tell("rotations." + std::to_string(width) + "." + std::to_string(interleaved), hash);
        }
    for (int32_t function = 0; function <= SIGMOID; ++function) {
        Floats32 from(20011), to(20011);
        fill(from, 4, 120.0f);
        Draw draw{5};
        for (int64_t i = 0; i < 2000; ++i) from[i] = draw.any();
        from[2000] = INFINITY, from[2001] = -INFINITY, from[2002] = 0.0f, from[2003] = -0.0f;
        apply_pointwise(function, from.values, from.count, to.values, 2);
        Hash hash;
        hash.floats(to.values, to.count);
        tell("pointwise." + std::to_string(function), hash);
    }
    constexpr int64_t ROWS = 6, VOCABULARY = 1003;
    Floats32 logits(ROWS * VOCABULARY), log_probs(ROWS);
    fill(logits, 6, 25.0f);
    logits[2 * VOCABULARY + 9] = -INFINITY;
    logits[3 * VOCABULARY + 3] = INFINITY;
    logits[4 * VOCABULARY + 1000] = NAN;
    const float temperatures[ROWS] = {0.7f, 0.0f, 1.0f, 1.0f, 1.0f, 2.0f};
    const double uniforms[ROWS] = {0.25, 0.5, 0.999999, 0.1, 0.2, 0.0};
    int32_t tokens[ROWS];
    const Draws draws{ROWS, VOCABULARY, logits.values, temperatures, uniforms, tokens, log_probs.values};
    must(bessemer_draw(&draws, 1));
    Hash drawn;
    drawn.bytes(tokens, sizeof tokens);
    drawn.floats(log_probs.values, ROWS);
    const int64_t targets[ROWS] = {0, 5, 1002, 500, 17, 3};
    target_log_probs(logits.values, ROWS, VOCABULARY, 0.9f, targets, log_probs.values, 1);
    drawn.floats(log_probs.values, ROWS);
    tell("draws", drawn);

    ::Numbers<uint16_t> narrow(ROWS * VOCABULARY);
    for (int64_t i = 0; i < narrow.count; ++i) narrow[i] = float_to_bfloat(logits[i]);
    Floats32 log_sums(ROWS), log_odds(ROWS);
    for (int32_t gradient : {0, 1}) {
        const CrossEntropy given{narrow.values, targets, log_sums.values, log_odds.values, ROWS, VOCABULARY, 1e-3f, gradient};
        must(bessemer_cross_entropy(&given, 1));
        Hash hash;
        hash.floats(log_sums.values, ROWS);
        hash.floats(log_odds.values, ROWS);
        for (int64_t i = 0; i < narrow.count; ++i) {
            const float value = bfloat_to_float(narrow[i]);
            hash.floats(&value, 1);
        }
        tell("cross_entropy." + std::to_string(gradient), hash);
    }
}

// --- a step ----------------------------------------------------------------------------------------------------------------------

// Two layers whose matrices are of these kinds, a prompt and tokens after it.
void step_of(const char* name, Kind kind, int type, Activation activation, PageType pages_type, int32_t codes_each) {
    constexpr int64_t HIDDEN = 256, HEADS = 8, KV = 2, WIDTH_OF_HEAD = 32, INNER = 256, VOCABULARY = 101, LAYERS = 2;
    constexpr int64_t BLOCK = 16, BLOCKS = 32;
    const bool of_parts = type == 12 || type == 14;
    uint64_t seed = 100;
    auto made = [&](int64_t n, int64_t k) {
        auto* packed = new Packed(kind, n, k, of_parts ? 256 : 32, type, false, type == 12, of_parts, seed += 10);
        for (int64_t i = 0; i < packed->scales.count; ++i) packed->scales[i] &= uint16_t(0x9fff), packed->offsets[i] &= uint16_t(0x9fff);
        return packed;
    };
    std::vector<Packed*> all;
    auto matrix = [&](int64_t n, int64_t k) {
        all.push_back(made(n, k));
        return &all.back()->matrix;
    };
    Floats32 weight(INNER), cosines(600 * WIDTH_OF_HEAD), sines(600 * WIDTH_OF_HEAD);
    for (int64_t i = 0; i < INNER; ++i) weight[i] = 1.0f + float(i % 5) * 0.1f;
    fill(cosines, 8);
    fill(sines, 9);
    const Norm norm{weight.values, nullptr, 1e-5f, RMS_NORM}, none{nullptr, nullptr, 0, NO_NORM};
    const int64_t slots = BLOCKS * KV * BLOCK;
    std::vector<Layer> layers;
    std::vector<::Numbers<uint8_t>*> memory;
    std::vector<Floats32*> scales;
    for (int64_t l = 0; l < LAYERS; ++l) {
        for (int i = 0; i < 2; ++i) {
            memory.push_back(new ::Numbers<uint8_t>(page_bytes(pages_type, slots * WIDTH_OF_HEAD)));
            scales.push_back(new Floats32(slots));
        }
        const size_t last = memory.size();
        const Pages pages{memory[last - 2]->values, memory[last - 1]->values, scales[last - 2]->values, scales[last - 1]->values,
                          KV, BLOCK, WIDTH_OF_HEAD, WIDTH_OF_HEAD, WIDTH_OF_HEAD, BLOCKS, pages_type};
        const Matrix *query = matrix(HEADS * WIDTH_OF_HEAD, HIDDEN), *key = matrix(KV * WIDTH_OF_HEAD, HIDDEN),
                     *value = matrix(KV * WIDTH_OF_HEAD, HIDDEN), *output = matrix(HIDDEN, HEADS * WIDTH_OF_HEAD),
                     *up = matrix(INNER, HIDDEN), *gate = matrix(INNER, HIDDEN), *down = matrix(HIDDEN, INNER);
        layers.push_back({norm, none, norm, none, norm, none, {{query, key, value}, 3}, {{output}, 1}, {{up, gate}, 2}, {{down}, 1},
                          {cosines.values, sines.values, WIDTH_OF_HEAD, 600, l}, {0.18f, 0, l ? 40 : 0, nullptr}, pages, 0});
    }
    Floats32 table(VOCABULARY * HIDDEN);
    fill(table, 10);
    Model model{LAYERS, HIDDEN, HEADS, KV, WIDTH_OF_HEAD, INNER, VOCABULARY, layers.data(), {table.values, TABLE_F32, 1.5f}, norm,
                {{matrix(VOCABULARY, HIDDEN)}, 1}, 1.0f, 30.0f, activation, 0, codes_each};
    std::vector<int32_t> tokens, positions, blocks_of_table;
    for (int64_t row = 0; row < 70; ++row) tokens.push_back(int32_t(row * 37 % VOCABULARY)), positions.push_back(int32_t(row));
    for (int64_t block = 0; block < 2 * BLOCKS; ++block) blocks_of_table.push_back(int32_t(block * 5 % BLOCKS));
    const int32_t* tables[] = {blocks_of_table.data()};
    const int64_t widths[] = {BLOCKS / 2}, starts[] = {0, 70}, wanted[] = {3, 69};
    Floats32 logits(2 * VOCABULARY);
    Hash hash;
    for (int threads : {1, 2}) {
        Step step(model, threads);
        const Batch prompt{70, 1, tokens.data(), positions.data(), starts, tables, widths,
                           2, wanted, logits.values, nullptr, nullptr, nullptr, nullptr};
        must(step.refusal(prompt));
        step.run(prompt);
        hash.floats(logits.values, logits.count);
        const int64_t singles[] = {0, 1, 2};
        const int32_t next[] = {7, 8}, at[] = {70, 12};
        const float temperatures[] = {0.0f, 1.0f};
        Draw draw{11};
        double uniforms[2 * 6];
        for (double& uniform : uniforms) uniform = double(draw.bits() >> 11) * 0x1p-53;
        int32_t chosen[2 * 6];
        float log_probs[2 * 6];
        const Batch batch{2, 2, next, at, singles, tables, widths, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
        must(step.generate(batch, {6, temperatures, uniforms, chosen, log_probs}));
        hash.bytes(chosen, sizeof chosen);
        hash.floats(log_probs, 12);
    }
    tell(std::string("step.") + name, hash);
    for (Packed* one : all) delete one;
    for (auto* one : memory) delete one;
    for (auto* one : scales) delete one;
}

void step() {
    step_of("Q8", Q8, -1, SILU, PAGE_F16, 1);
    step_of("Q4_K", Q4, 12, GELU, PAGE_I8, 2);
    step_of("Q6_K", Q6, 14, GELU_TANH, PAGE_BF16, 1);
    step_of("BF16", BF16, -1, RELU, PAGE_F32, 1);
}

#endif

}  // namespace

int main(int count, char** names) {
    std::printf("arithmetic %s\n", bessemer_arithmetic());
    auto wanted = [&](const char* name) {
        for (int i = 1; i < count; ++i)
            if (!std::strcmp(names[i], name)) return true;
        return count == 1;
    };
    if (wanted("numbers")) numbers();
    if (wanted("matrices")) matrices();
#ifndef PRODUCTS_ALONE
    if (wanted("attention")) attention();
    if (wanted("rows")) rows();
    if (wanted("step")) step();
#endif
}

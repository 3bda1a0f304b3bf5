// The inside of attention.cpp: products of some queries with 16 keys, and of their weights with 16 values.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention.h"

namespace bessemer {

constexpr int64_t SEGMENT = 256;  // keys with a softmax of their own
// What stays in registers: sums over so many channels of some lines, and of so many lines that read the pages themselves.
#ifdef BESSEMER_NEON
template <int lines>
constexpr int64_t CHUNK = lines == 1 ? 64 : lines == 2 ? 32 : 16;
constexpr int LINES_OF_PAGES = 2;
#else
template <int lines>
constexpr int64_t CHUNK = 64;
constexpr int LINES_OF_PAGES = 3;
#endif

// What every segment of a tile needs. The 16 keys and values of one tile lie as [channels / 16][16 keys][16 channels], so that
// every place in them is a constant away from the first.
struct Task {
    const Pages& pages;
    const Scores& scores;
    const int32_t* table;
    int64_t kv_head, lines;
    int64_t key_lanes, value_lanes;   // widths, filled up to whole registers
    const int32_t *lowest, *highest;  // positions that each line sees
    const float* queries;             // [lines][key_lanes], scaled
    float *keys, *values, *weights;   // one tile's, and [lines][SEGMENT]
};

// Where the keys and values of some positions lie, as rows of all pages; `rows` of the first one at its place in a segment.
struct Slots {
    int64_t rows[SEGMENT];

    Slots(const Task& task, int64_t first, int64_t last, int64_t place) {
        const int64_t size = task.pages.block_size;
        for (int64_t position = first; position < last;) {
            const int64_t block = position / size, end = std::min(last, (block + 1) * size);
            int64_t row = (task.table[block] * task.pages.kv_heads + task.kv_head) * size + position % size;
            for (; position < end; ++position) rows[place++] = row++;
        }
    }
};

// How numbers lie in pages: EACH of them in a T.
template <PageType type>
struct Numbers;
template <>
struct Numbers<PAGE_F32> {
    using T = float;
    static constexpr int64_t EACH = 1;
    static Floats load(const T* p) { return load_floats(p); }
    static void store(T* p, Floats a) { store_floats(p, a); }
};
template <>
struct Numbers<PAGE_F16> {
    using T = uint16_t;
    static constexpr int64_t EACH = 1;
    static Floats load(const T* p) { return load_halves(p); }
    static void store(T* p, Floats a) { store_halves(p, a); }
};
template <>
struct Numbers<PAGE_BF16> {
    using T = uint16_t;
    static constexpr int64_t EACH = 1;
    static Floats load(const T* p) { return load_bfloats(p); }
    static void store(T* p, Floats a) { store_bfloats(p, a); }
};
template <>
struct Numbers<PAGE_I8> {
    using T = int8_t;
    static constexpr int64_t EACH = 1;
    static Floats load(const T* p) { return load_signed_bytes(p); }
    static void store(T* p, Floats a) { store_signed_bytes(p, a); }
};
template <>
struct Numbers<PAGE_I4> {
    using T = uint8_t;
    static constexpr int64_t EACH = 2;
    static Floats load(const T* p) { return load_nibbles(p); }
    // Of codes beyond 7 the nearest there is.
    static void store(T* p, Floats a) {
        int8_t codes[LANES];
        store_signed_bytes(codes, smaller(a, broadcast(7.0f)));
        for (int i = 0; i < LANES / 2; ++i) p[i] = uint8_t((codes[2 * i] + 8) | (codes[2 * i + 1] + 8) << 4);
    }
};

// Neighbours of a head that are mixed with each other: as many as divide the channels of keys and of values, a power of two.
inline int64_t mixed_channels(const Pages& pages) {
    const int64_t both = pages.key_width | pages.value_width;
    return both & -both;
}

// Multiplies each `size` neighbours of a row by Sylvester's Hadamard matrix over the root of `size`, which is its own inverse and
// changes no product of two rows (Ashkboos et al. 2024, QuaRot).
inline void mix_channels(float* row, int64_t width, int64_t size) {
    const float factor = 1.0f / std::sqrt(float(size));
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t begin = 0; begin < width; begin += 2 * half)
            for (int64_t i = begin; i < begin + half; ++i) {
                const float first = row[i], second = row[i + half];
                row[i] = first + second;
                row[i + half] = first - second;
            }
    for (int64_t i = 0; i < width; ++i) row[i] *= factor;
}

// One row of a page as float32, one key of a tile; filled up with zeros.
template <PageType type>
inline void widen(const void* pages, int64_t offset, int64_t width, float* out) {
    using N = Numbers<type>;
    const typename N::T* from = static_cast<const typename N::T*>(pages) + offset / N::EACH;
    int64_t channel = 0;
    for (; channel + LANES <= width; channel += LANES) store_floats(out + channel * LANES, N::load(from + channel / N::EACH));
    if (channel < width) {
        typename N::T rest[LANES] = {};
        std::copy(from + channel / N::EACH, from + width / N::EACH, rest);
        store_floats(out + channel * LANES, N::load(rest));
    }
}

// The 16 scores of one line with the keys of a tile. The order of each sum depends on the width alone.
inline Floats products(const float* query, const float* keys, int64_t width) {
    Floats sums[LANES];
    const Floats first = load_floats(query);
#ifdef BESSEMER_NEON
    UNROLLED for (int four = 0; four < LANES; four += 4) {  // keys, whose sums fill half of the registers
        const float* place = keys + four * LANES;
        UNROLLED for (int key = 0; key < 4; ++key) sums[four + key] = first * load_floats(place + key * LANES);
        for (int64_t channel = LANES; channel < width; channel += LANES) {
            const Floats some = load_floats(query + channel);
            place += LANES * LANES;
            UNROLLED for (int key = 0; key < 4; ++key) sums[four + key] = fma(some, load_floats(place + key * LANES), sums[four + key]);
        }
    }
#else
    for (int key = 0; key < LANES; ++key) sums[key] = first * load_floats(keys + key * LANES);
    for (int64_t channel = LANES; channel < width; channel += LANES) {
        const Floats some = load_floats(query + channel);
        keys += LANES * LANES;
        for (int key = 0; key < LANES; ++key) sums[key] = fma(some, load_floats(keys + key * LANES), sums[key]);
    }
#endif
    return sums_of_sixteen(sums);
}

// Adds the values of keys first … last - 1 of a tile to the sums of `lines` lines, key after key, in `size` registers each.
template <int lines, int size>
inline void add_values(const float* weights, const float* values, int64_t first, int64_t last, float* weighted, int64_t width) {
    Floats sums[lines][size];
    UNROLLED for (int line = 0; line < lines; ++line)
        UNROLLED for (int i = 0; i < size; ++i) sums[line][i] = load_floats(weighted + line * width + i * LANES);
    for (int64_t key = first; key < last; ++key) {
        Floats value[size];
        UNROLLED for (int i = 0; i < size; ++i) value[i] = load_floats(values + (i * LANES + key) * LANES);
        UNROLLED for (int line = 0; line < lines; ++line) {
            const Floats weight = broadcast(weights[line * SEGMENT + key]);
            UNROLLED for (int i = 0; i < size; ++i) sums[line][i] = fma(weight, value[i], sums[line][i]);
        }
    }
    UNROLLED for (int line = 0; line < lines; ++line)
        UNROLLED for (int i = 0; i < size; ++i) store_floats(weighted + line * width + i * LANES, sums[line][i]);
}

template <int lines>
inline void add_values(const Task& task, const float* weights, int64_t first, int64_t last, float* weighted) {
    const int64_t width = task.value_lanes;
    const float* values = task.values;
    for (int64_t begin = 0; begin < width; begin += CHUNK<lines>, values += CHUNK<lines> * LANES, weighted += CHUNK<lines>) {
        switch (std::min(CHUNK<lines>, width - begin) / LANES) {
            case 1: add_values<lines, 1>(weights, values, first, last, weighted, width); break;
            case 2: add_values<lines, 2>(weights, values, first, last, weighted, width); break;
            case 3: add_values<lines, 3>(weights, values, first, last, weighted, width); break;
            default: add_values<lines, 4>(weights, values, first, last, weighted, width);
        }
    }
}

// The same for few lines, straight from the pages: widening for so few costs more in stores than it saves. `rows`: of the 16
// keys, any row for one that is not seen. Widths are whole registers.
template <PageType type, int lines>
inline void few_products(const Task& task, const int64_t* rows, int64_t line, Floats* found) {
    using T = typename Numbers<type>::T;
    constexpr int64_t EACH = Numbers<type>::EACH;
    const T* keys = static_cast<const T*>(task.pages.keys);
    const float* queries = task.queries + line * task.key_lanes;
    Floats halves[lines][2];
    for (int half = 0; half < 2; ++half) {
        const T* key[8];
        for (int i = 0; i < 8; ++i) key[i] = keys + rows[8 * half + i] * task.pages.key_width / EACH;
        Floats sums[lines][8], query[lines];
#ifdef BESSEMER_NEON
        UNROLLED for (int pair = 0; pair < 8; pair += 2) {  // of keys, whose sums of two lines fill half of the registers
            UNROLLED for (int l = 0; l < lines; ++l) query[l] = load_floats(queries + l * task.key_lanes);
            UNROLLED for (int i = pair; i < pair + 2; ++i) {
                const Floats wide = Numbers<type>::load(key[i]);
                UNROLLED for (int l = 0; l < lines; ++l) sums[l][i] = query[l] * wide;
            }
            for (int64_t channel = LANES; channel < task.key_lanes; channel += LANES) {
                UNROLLED for (int l = 0; l < lines; ++l) query[l] = load_floats(queries + l * task.key_lanes + channel);
                UNROLLED for (int i = pair; i < pair + 2; ++i) {
                    const Floats wide = Numbers<type>::load(key[i] + channel / EACH);
                    UNROLLED for (int l = 0; l < lines; ++l) sums[l][i] = fma(query[l], wide, sums[l][i]);
                }
            }
        }
#else
        for (int l = 0; l < lines; ++l) query[l] = load_floats(queries + l * task.key_lanes);
        for (int i = 0; i < 8; ++i) {
            const Floats wide = Numbers<type>::load(key[i]);
            for (int l = 0; l < lines; ++l) sums[l][i] = query[l] * wide;
        }
        for (int64_t channel = LANES; channel < task.key_lanes; channel += LANES) {
            for (int l = 0; l < lines; ++l) query[l] = load_floats(queries + l * task.key_lanes + channel);
            for (int i = 0; i < 8; ++i) {
                const Floats wide = Numbers<type>::load(key[i] + channel / EACH);
                for (int l = 0; l < lines; ++l) sums[l][i] = fma(query[l], wide, sums[l][i]);
            }
        }
#endif
        UNROLLED for (int l = 0; l < lines; ++l) halves[l][half] = half_sums_of_eight(sums[l]);
    }
    UNROLLED for (int l = 0; l < lines; ++l) found[l] = joined(halves[l][0], halves[l][1]);
}

template <PageType type, int lines, int size>
inline void add_few_values(const Task& task, const int64_t* rows, const float* weights, int64_t first, int64_t last, int64_t begin,
                           float* weighted) {
    using T = typename Numbers<type>::T;
    constexpr int64_t EACH = Numbers<type>::EACH;
    const T* values = static_cast<const T*>(task.pages.values) + begin / EACH;
    const int64_t width = task.value_lanes;
    Floats sums[lines][size];
    UNROLLED for (int l = 0; l < lines; ++l)
        UNROLLED for (int i = 0; i < size; ++i) sums[l][i] = load_floats(weighted + l * width + begin + i * LANES);
    for (int64_t key = first; key < last; ++key) {
        const T* place = values + rows[key] * task.pages.value_stride / EACH;
        Floats value[size];
        UNROLLED for (int i = 0; i < size; ++i) value[i] = Numbers<type>::load(place + i * LANES / EACH);
        UNROLLED for (int l = 0; l < lines; ++l) {
            const Floats weight = broadcast(weights[l * SEGMENT + key]);
            UNROLLED for (int i = 0; i < size; ++i) sums[l][i] = fma(weight, value[i], sums[l][i]);
        }
    }
    UNROLLED for (int l = 0; l < lines; ++l)
        UNROLLED for (int i = 0; i < size; ++i) store_floats(weighted + l * width + begin + i * LANES, sums[l][i]);
}

template <PageType type, int lines>
inline void add_few_values(const Task& task, const int64_t* rows, const float* weights, int64_t first, int64_t last,
                           float* weighted) {
    for (int64_t begin = 0; begin < task.value_lanes; begin += CHUNK<lines>) {
        switch (std::min(CHUNK<lines>, task.value_lanes - begin) / LANES) {
            case 1: add_few_values<type, lines, 1>(task, rows, weights, first, last, begin, weighted); break;
            case 2: add_few_values<type, lines, 2>(task, rows, weights, first, last, begin, weighted); break;
            case 3: add_few_values<type, lines, 3>(task, rows, weights, first, last, begin, weighted); break;
            default: add_few_values<type, lines, 4>(task, rows, weights, first, last, begin, weighted);
        }
    }
}

}  // namespace bessemer

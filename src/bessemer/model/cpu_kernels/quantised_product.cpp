// Products of codes of 4 and 8 bits with activations of 8 bits, in parts of 32 neighbours along k. For every output
//   part    = activation scale * (sum of code * activation - zero * sum of activations), the sums in integers: exact
//   output  = sum over the parts of part * weight scale                  where a row has several scales
//   output  = (sum over the parts of part) * weight scale                where it has one
// and, where groups have offsets in place of zeros,
//   output  = sum over the parts of part * weight scale + (activation scale * sum of activations) * offset
// with the parts in their order, whatever the rows beside it, and every multiplication that an addition follows fused with it.
#include <algorithm>

#include "products.h"
#include "registers.h"

namespace bessemer {
namespace {

using namespace registers;

constexpr int64_t PART_BYTES = WIDTH * GROUP;  // codes of a part for a block of 16 outputs, one to a byte
#ifdef BESSEMER_AVX2
constexpr int64_t MOST_ROWS = 4, MOST_ROWS_OF_TWO = 1, FETCHING_ROWS = 2;
constexpr bool SIGNED_BYTES = true;            // codes of 8 bits lose the 128 that was added to them before they are multiplied
#else
constexpr int64_t MOST_ROWS = 6;               // multiplied together: their sums stay in registers
constexpr int64_t MOST_ROWS_OF_TWO = 6;        // so many of them with two blocks of outputs, more with one
constexpr int64_t FETCHING_ROWS = 4;           // more rows than that wait for sums, not for memory
constexpr bool SIGNED_BYTES = false;
#endif
constexpr int64_t AHEAD = 4096;                 // bytes between the codes that are multiplied and those that are fetched
constexpr int64_t NEAR_BYTES = 1 << 18;         // codes that stay in the second cache while all rows meet them

enum Codes { BYTES, NIBBLES };             // one to a byte, or packed as in a Q4 matrix
enum Scaling { WHOLE_ROW, EACH_PART };     // where the weight's scale comes in
enum Zeros { ONE_FOR_ALL, EACH_GROUP, OFFSETS };

// A block of outputs, or two: pointers to what belongs to some part of the first, and how far the second's lie.
struct Blocks {
    const uint8_t* codes;
    int64_t codes_stride;
    const uint16_t* scales;  // of the first part in the row
    const uint8_t* zeros;
    const uint16_t* offsets;
    int64_t groups_stride;
    int32_t parts_of_group;
    const Matrix* matrix;
};

// products[r][b] += codes * activations, over one part.
#ifdef BESSEMER_AVX2
template <Codes form, int R, int B>
inline void multiply_part(const uint8_t* codes, int64_t codes_stride, const int8_t* activations, int64_t k, Ints (&products)[R][B]) {
    if constexpr (form == NIBBLES) {
        Pairs sums[R][B];
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) sums[r][b] = zero_pairs();
        for (int j = 0; j < 8; j += 2)
            for (int b = 0; b < B; ++b) {
                const uint8_t* place = codes + b * codes_stride + 32 * j;
                if constexpr (R <= FETCHING_ROWS) __builtin_prefetch(place + AHEAD);
                const Bytes loaded = load_bytes(place), low = low_nibbles(loaded), high = high_nibbles(loaded);
                for (int r = 0; r < R; ++r) {
                    sums[r][b] = dot(sums[r][b], low, broadcast_four(activations + r * k + 4 * j));
                    sums[r][b] = dot(sums[r][b], high, broadcast_four(activations + r * k + 4 * j + 4));
                }
            }
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) products[r][b] = add(products[r][b], sums[r][b]);
    } else {
        for (int j = 0; j < 8; ++j)
            for (int b = 0; b < B; ++b) {
                const uint8_t* place = codes + b * codes_stride + 64 * j;
                if constexpr (R <= FETCHING_ROWS) __builtin_prefetch(place + AHEAD);
                const ByteWeights weights = byte_weights(load_bytes(place));
                for (int r = 0; r < R; ++r) products[r][b] = dot(products[r][b], weights, broadcast_four(activations + r * k + 4 * j));
            }
    }
}
#else
template <Codes form, int R, int B>
inline void multiply_part(const uint8_t* codes, int64_t codes_stride, const int8_t* activations, int64_t k, Ints (&products)[R][B]) {
    constexpr int PER_LOAD = form == NIBBLES ? 2 : 1;
    for (int j = 0; j < 8; j += PER_LOAD) {
        Bytes weights[PER_LOAD][B];
        for (int b = 0; b < B; ++b) {
            const uint8_t* place = codes + b * codes_stride + 64 / PER_LOAD * j;
            if constexpr (R <= FETCHING_ROWS) __builtin_prefetch(place + AHEAD);
            const Bytes loaded = load_bytes(place);
            if constexpr (form == NIBBLES) {
                weights[0][b] = low_nibbles(loaded);
                weights[1][b] = high_nibbles(loaded);
            } else {
                weights[0][b] = loaded;
            }
        }
        for (int half = 0; half < PER_LOAD; ++half)
            for (int r = 0; r < R; ++r) {
                const Fours four = broadcast_four(activations + r * k + 4 * (j + half));
                for (int b = 0; b < B; ++b) products[r][b] = dot(products[r][b], weights[half][b], four);
            }
    }
}
#endif

// Adds parts first … last - 1 of the rows to total[r][b].
template <Codes form, Scaling scaling, Zeros zeros, int R, int B>
inline void add_parts(const Blocks& blocks, const Rows& rows, int64_t first, int64_t last, Floats (&total)[R][B]) {
    const int64_t k = padded(rows.k), parts = k / GROUP;
    const int32_t* corrections = zeros == EACH_GROUP ? rows.sums : blocks.matrix->kind == Q4 ? rows.sums_of_8 : rows.sums_of_128;
    const uint8_t* codes = blocks.codes;
    for (int64_t part = first; part < last; ++part, codes += form == NIBBLES ? PART_BYTES / 2 : PART_BYTES) {
        const int64_t group = scaling == WHOLE_ROW ? 0 : part / blocks.parts_of_group * WIDTH;
        Ints products[R][B];
        for (int r = 0; r < R; ++r) {
            const Ints correction = broadcast(zeros == OFFSETS || (form == BYTES && SIGNED_BYTES) ? 0 : corrections[r * parts + part]);
            for (int b = 0; b < B; ++b)
                products[r][b] = zeros == EACH_GROUP ? times_zeros(blocks.zeros + b * blocks.groups_stride + group, correction) : correction;
        }
        multiply_part<form>(codes, blocks.codes_stride, rows.codes + part * GROUP, k, products);
        Floats weight_scale[B];
        if constexpr (scaling == EACH_PART)
            for (int b = 0; b < B; ++b) weight_scale[b] = load_halves(blocks.scales + b * blocks.groups_stride + group);
        Floats offset[B];
        if constexpr (zeros == OFFSETS)
            for (int b = 0; b < B; ++b) offset[b] = load_halves(blocks.offsets + b * blocks.groups_stride + group);
        for (int r = 0; r < R; ++r) {
            const Floats scale = broadcast(rows.scales[r * parts + part]);
            for (int b = 0; b < B; ++b) {
                if constexpr (scaling == WHOLE_ROW) total[r][b] = fma(to_floats(products[r][b]), scale, total[r][b]);
                else total[r][b] = fma(times(to_floats(products[r][b]), scale), weight_scale[b], total[r][b]);
            }
            if constexpr (zeros == OFFSETS) {
                const Floats sum = broadcast(rows.scales[r * parts + part] * float(-rows.sums[r * parts + part]));
                for (int b = 0; b < B; ++b) total[r][b] = fma(sum, offset[b], total[r][b]);
            }
        }
    }
}

// Scales what has one scale for the whole row, adds the bias, and stores the blocks before `last`.
template <Scaling scaling, int R, int B>
inline void finish(const Blocks& blocks, float* out, int64_t stride, int64_t block, int64_t last, const Floats (&total)[R][B]) {
    const Matrix& matrix = *blocks.matrix;
    for (int b = 0; b < B && block + b < last; ++b) {
        const int64_t n = (block + b) * WIDTH, count = std::min(WIDTH, matrix.n - n);
        if (count <= 0) break;
        for (int r = 0; r < R; ++r) {
            Floats value = total[r][b];
            if constexpr (scaling == WHOLE_ROW) value = times(value, load_halves(blocks.scales + b * blocks.groups_stride));
            if (matrix.bias) value = add(value, load_floats(matrix.bias + n, count));
            store_floats(out + r * stride + n, value, count);
        }
    }
}

// Block `block` and the one after it, its codes from part `part` on. Where there is no other, the same one again: `finish` does not
// store it.
inline Blocks blocks_at(const Matrix& matrix, int64_t block, int64_t part) {
    const int64_t parts = padded(matrix.k) / GROUP, groups = padded(matrix.k) / matrix.group, second = block + 1 < blocks(matrix.n);
    const int64_t step = matrix.kind == Q4 ? PART_BYTES / 2 : PART_BYTES, place = block * groups * WIDTH;
    return {static_cast<const uint8_t*>(matrix.codes) + (block * parts + part) * step,
            second * parts * step,
            matrix.scales + place,
            matrix.zeros + (matrix.zeros ? place : 0),
            matrix.offsets + (matrix.offsets ? place : 0),
            second * groups * WIDTH,
            matrix.group / int32_t(GROUP),
            &matrix};
}

// Up to MOST_ROWS rows: codes are unpacked where they are multiplied.
template <Codes form, Scaling scaling, Zeros zeros, int R>
void few_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    constexpr int B = R <= MOST_ROWS_OF_TWO ? 2 : 1;  // each activation is used twice, and memory is read in two places
    for (int64_t block = first; block < last; block += B) {
        const Blocks at = blocks_at(matrix, block, 0);
        Floats total[R][B];
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) total[r][b] = zero_floats();
        add_parts<form, scaling, zeros>(at, rows, 0, padded(matrix.k) / GROUP, total);
        finish<scaling>(at, out, stride, block, last, total);
    }
}

// The rows of a tile, at most R.
template <Codes form, Scaling scaling, Zeros zeros, int R>
void few_rows_of(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    if constexpr (R > 1) {
        if (rows.m < R) return few_rows_of<form, scaling, zeros, R - 1>(matrix, rows, out, stride, first, last);
    }
    few_rows<form, scaling, zeros, R>(matrix, rows, out, stride, first, last);
}

template <Codes form, Scaling scaling, Zeros zeros>
void any_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first_block, int64_t last_block) {
    const int64_t tiles = (rows.m + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t bytes = padded(matrix.k) * WIDTH / (form == NIBBLES ? 2 : 1), most = std::max<int64_t>(NEAR_BYTES / bytes / 2 * 2, 2);
    for (int64_t first = first_block; first < last_block; first += most) {
        const int64_t last = std::min(first + most, last_block);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = rows.m * tile / tiles, end = rows.m * (tile + 1) / tiles;
            const Rows some = some_rows(rows, row, end);
            float* place = out + row * stride;
            few_rows_of<form, scaling, zeros, MOST_ROWS>(matrix, some, place, stride, first, last);
        }
    }
}

template <Codes form, Zeros zeros>
void any_scaling(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    const bool whole = matrix.group == padded(matrix.k);
    (whole ? any_rows<form, WHOLE_ROW, zeros> : any_rows<form, EACH_PART, zeros>)(matrix, rows, out, stride, first, last);
}

}  // namespace

void quantised_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    if (matrix.kind == Q8) any_scaling<BYTES, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.offsets) any_rows<NIBBLES, EACH_PART, OFFSETS>(matrix, rows, out, stride, first, last);
    else if (matrix.zeros) any_scaling<NIBBLES, EACH_GROUP>(matrix, rows, out, stride, first, last);
    else any_scaling<NIBBLES, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
}

}  // namespace bessemer

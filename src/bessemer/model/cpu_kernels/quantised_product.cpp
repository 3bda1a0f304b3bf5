// Products of codes of 4, 5, 6 and 8 bits with activations of 8 bits, in parts of 32 neighbours along k. For every output
//   part    = activation scale * (sum of code * activation - zero * sum of activations), the sums in integers: exact
//   output  = sum over the parts of part * weight scale                  where a row has several scales
//   output  = (sum over the parts of part) * weight scale                where it has one
// and, where groups have offsets in place of zeros,
//   output  = sum over the parts of part * weight scale + (activation scale * sum of activations) * offset
// where scale and offset of a part may themselves be a group's number times the part's own; in codes of 6 bits each half of a part has
// a scale, and is a part of its own in the sums above;
// with the parts in their order, whatever the rows beside it, and every multiplication that an addition follows fused with it. Of
// activations of 16 bits both rows of codes have such an output, and theirs is the sum of the two. Below, a row is a row of codes.
#include <algorithm>
#include <type_traits>

#include "products.h"
#include "registers.h"

namespace bessemer {
namespace {

using namespace registers;

#if defined(BESSEMER_AVX2) || defined(BESSEMER_NEON)
#if defined(BESSEMER_NEON) && defined(BESSEMER_PAIRS)
constexpr int64_t MOST_ROWS = 2;
#else
constexpr int64_t MOST_ROWS = 4;
#endif
constexpr int64_t MOST_ROWS_OF_TWO = 1, FETCHING_ROWS = 2;
constexpr int NEAR_TO_TWO = 3;                 // the cache that two blocks are fetched to, 3 the first
#ifdef BESSEMER_NEON
constexpr int HALVES_TOGETHER = 1;
#else
constexpr int HALVES_TOGETHER = 2;             // of a part whose halves have scales of their own, before their sums become floats
#endif
#if defined(BESSEMER_AVX_VNNI) || defined(BESSEMER_I8MM)
constexpr bool SIGNED_BYTES = false;
#else
constexpr bool SIGNED_BYTES = true;            // codes of 8 bits lose the 128 that was added to them before they are multiplied
#endif
#else
constexpr int64_t MOST_ROWS = 6;               // multiplied together: their sums stay in registers
constexpr int64_t MOST_ROWS_OF_TWO = 6;        // so many of them with two blocks of outputs, more with one
constexpr int64_t FETCHING_ROWS = 4;           // more rows than that wait for sums, not for memory
constexpr int NEAR_TO_TWO = 2;
constexpr int HALVES_TOGETHER = 1;
constexpr bool SIGNED_BYTES = false;
#endif
constexpr int64_t MOST_ROWS_OF_SIXES = 4;      // unpacking takes registers of its own
constexpr int64_t AHEAD = 4096;                 // bytes between the codes that are multiplied and those that are fetched
// A fetched line brings its neighbour along, but where two places are read in turn.
constexpr int lines(int blocks) { return blocks == 1 ? 2 : 1; }
constexpr int64_t NEAR_BYTES = 1 << 18;         // codes that stay in the second cache while all rows meet them

enum Codes { BYTES, NIBBLES, FIVES, SIXES, FLOATS, PLACES };  // as in a Q8, Q4, Q5, Q6, MX4 or IQ4 matrix
// Where the weight's scale comes in. OF_CODES: a part's scale and offset are numbers of `parts` times its group's; of each half of it;
// with a sign, and no offset. A power of two has its exponent in `zeros`.
enum Scaling { WHOLE_ROW, EACH_PART, EACH_PART_OF_CODES, EACH_HALF_OF_CODES, EACH_PART_OF_SIGNED_CODES, POWERS_OF_TWO };
enum Zeros { ONE_FOR_ALL, EACH_GROUP, OFFSETS };

constexpr int UPPER_BITS[] = {0, 0, 1, 2, 0, 0};  // of codes of a form, those above the four that lie in nibbles
// Codes of a part for a block of 16 outputs, in bytes.
constexpr int64_t part_bytes(Codes form) { return form == BYTES ? WIDTH * GROUP : (4 + UPPER_BITS[form]) * 4 * WIDTH; }

// A block of outputs, or two: pointers to what belongs to some part of the first, and how far the second's lie.
struct Blocks {
    const uint8_t* codes;
    int64_t codes_stride;
    const uint16_t* scales;  // of the first part in the row
    const uint8_t* zeros;
    const uint16_t* offsets;
    int64_t groups_stride;
    const uint8_t* parts;
    int64_t parts_stride;
    int32_t parts_of_group;
    const Matrix* matrix;
};

// Asks for what is read soon. The second cache takes more requests at a time than the first.
template <int B>
inline void fetch(const void* place) {
    __builtin_prefetch(place, 0, B > 1 ? NEAR_TO_TWO : 2);
}

// Codes of the fours 2 j and 2 j + 1 of a part at `codes`, j < 4, of a form of four bits and more. `upper` goes from call to call.
template <Codes form>
INLINED void load_pair(const uint8_t* codes, int j, Bytes& upper, Bytes& first, Bytes& second) {
    constexpr int BITS = UPPER_BITS[form];
    const Bytes loaded = load_bytes(codes + 64 * j);
    first = low_nibbles(loaded);
    second = high_nibbles(loaded);
    if constexpr (BITS > 0) {
        const int bit = 2 * j * BITS;  // that the first four's lie at in a byte, in order of use: from the middle up, then the lower half
        if (bit % 4 == 0) upper = load_bytes(codes + 64 * (4 + bit / 8));
        if (bit % 8 == 4) upper = up_four(upper);
        first = joined<BITS>(first, upper);
        upper = down<BITS>(upper);
        second = joined<BITS>(second, upper);
        upper = down<BITS>(upper);
    }
    if constexpr (form == FLOATS || form == PLACES) {
        const uint8_t* table = form == FLOATS ? MX4_TABLE : IQ4_TABLE;
        first = looked_up(first, table);
        second = looked_up(second, table);
    }
}

// products[t][r][b] += codes * activations, over piece first + t of the H equal ones of a part.
#ifdef BESSEMER_PAIRS
// of fours, whose products stay within 16 bits: registers_avx2.h, and registers_neon.h, where a sum is of half as many
#ifdef BESSEMER_NEON
constexpr int PAIRS_TOGETHER[] = {0, 4, 4, 2, 4, 1};
#else
constexpr int PAIRS_TOGETHER[] = {0, 4, 2, 1, 2, 1};
#endif

template <Codes form, int H, int first, int T, int R, int B>
INLINED void multiply_part(const uint8_t* codes, int64_t codes_stride, int64_t ahead, const int8_t* activations, int64_t k,
                           Ints (&products)[T][R][B]) {
    if constexpr (form == BYTES) {
        for (int j = 8 / H * first; j < 8 / H * (first + T); ++j)
            for (int b = 0; b < B; ++b) {
                const uint8_t* place = codes + b * codes_stride + 64 * j;
                if (R <= FETCHING_ROWS && j % lines(B) == 0) fetch<B>(place + ahead);
                const ByteWeights weights = byte_weights(load_bytes(place));
                Ints(&sums)[R][B] = products[j * H / 8 - first];
                for (int r = 0; r < R; ++r) sums[r][b] = dot(sums[r][b], weights, broadcast_four(activations + r * k + 4 * j));
            }
    } else if constexpr (form == PLACES) {
        Bytes upper[B];
        for (int j = 4 / H * first; j < 4 / H * (first + T); ++j)
            for (int b = 0; b < B; ++b) {
                const uint8_t* place = codes + b * codes_stride;
                if (R <= FETCHING_ROWS && j % lines(B) == 0) fetch<B>(place + 64 * j + ahead);
                Bytes four, next;
                load_pair<form>(place, j, upper[b], four, next);
                const ByteWeights weights[2] = {byte_weights(four), byte_weights(next)};
                for (int half = 0; half < 2; ++half)
                    for (int r = 0; r < R; ++r) {
                        Ints& sum = products[j * H / 4 - first][r][b];
                        sum = dot(sum, weights[half], broadcast_four(activations + r * k + 8 * j + 4 * half));
                    }
            }
    } else {
        Bytes upper[B];
        Pairs sums[R][B];
        for (int j = 4 / H * first; j < 4 / H * (first + T); ++j) {
            if (j % PAIRS_TOGETHER[form] == 0)
                for (int r = 0; r < R; ++r)
                    for (int b = 0; b < B; ++b) sums[r][b] = zero_pairs();
            for (int b = 0; b < B; ++b) {
                const uint8_t* place = codes + b * codes_stride;
                if (R <= FETCHING_ROWS && j % lines(B) == 0) fetch<B>(place + 64 * j + ahead);
                Bytes four, next;
                load_pair<form>(place, j, upper[b], four, next);
                for (int r = 0; r < R; ++r) {
                    sums[r][b] = dot(sums[r][b], four, broadcast_four(activations + r * k + 8 * j));
                    sums[r][b] = dot(sums[r][b], next, broadcast_four(activations + r * k + 8 * j + 4));
                }
            }
            if ((j + 1) % PAIRS_TOGETHER[form] == 0)
                for (int r = 0; r < R; ++r)
                    for (int b = 0; b < B; ++b) {
                        Ints& sum = products[j * H / 4 - first][r][b];
                        sum = add(sum, sums[r][b]);
                    }
        }
    }
}
#elif defined(BESSEMER_DOTPROD)
// Fours 2 j and 2 j + 1 of a part, whose activations lie in half of what is loaded of them.
template <Codes form, int j, int R, int B>
INLINED void multiply_pair(const uint8_t* codes, int64_t codes_stride, int64_t ahead, const Sixteen (&activations)[R], Bytes (&upper)[B],
                           Ints (&sums)[R][B]) {
    for (int b = 0; b < B; ++b) {
        const uint8_t* place = codes + b * codes_stride;
        Bytes four, next;
        if constexpr (form == BYTES) {
            if (R <= FETCHING_ROWS) fetch<B>(place + 128 * j + ahead);
            if (R <= FETCHING_ROWS && B > 1) fetch<B>(place + 128 * j + 64 + ahead);
            four = load_bytes(place + 128 * j);
            next = load_bytes(place + 128 * j + 64);
        } else {
            if (R <= FETCHING_ROWS && j % lines(B) == 0) fetch<B>(place + 64 * j + ahead);
            load_pair<form>(place, j, upper[b], four, next);
        }
        auto add_both = [&](auto some, auto others) {
            for (int r = 0; r < R; ++r)
                sums[r][b] = dot<2 * j % 4 + 1>(dot<2 * j % 4>(sums[r][b], some, activations[r]), others, activations[r]);
        };
        if constexpr ((form == BYTES || form == PLACES) && SIGNED_BYTES) add_both(signed_bytes(four), signed_bytes(next));
        else add_both(four, next);
    }
}

template <Codes form, int H, int first, int T, int R, int B>
INLINED void multiply_part(const uint8_t* codes, int64_t codes_stride, int64_t ahead, const int8_t* activations, int64_t k,
                           Ints (&products)[T][R][B]) {
    static_assert(H <= 2);
    Bytes upper[B];
    Sixteen sixteen[R];
    if constexpr (first == 0) {
        for (int r = 0; r < R; ++r) sixteen[r] = load_sixteen(activations + r * k);
        multiply_pair<form, 0>(codes, codes_stride, ahead, sixteen, upper, products[0]);
        multiply_pair<form, 1>(codes, codes_stride, ahead, sixteen, upper, products[0]);
    }
    if constexpr (first + T == H) {
        for (int r = 0; r < R; ++r) sixteen[r] = load_sixteen(activations + r * k + 16);
        multiply_pair<form, 2>(codes, codes_stride, ahead, sixteen, upper, products[T - 1]);
        multiply_pair<form, 3>(codes, codes_stride, ahead, sixteen, upper, products[T - 1]);
    }
}
#else
template <Codes form, int H, int first, int T, int R, int B>
inline void multiply_part(const uint8_t* codes, int64_t codes_stride, int64_t ahead, const int8_t* activations, int64_t k,
                          Ints (&products)[T][R][B]) {
    constexpr int PER_LOAD = form == BYTES ? 1 : 2;
    Bytes upper[B];
    for (int j = 8 / H * first; j < 8 / H * (first + T); j += PER_LOAD) {
        Bytes weights[PER_LOAD][B];
        for (int b = 0; b < B; ++b) {
            const uint8_t* place = codes + b * codes_stride;
            if (R <= FETCHING_ROWS && j / PER_LOAD % lines(B) == 0) fetch<B>(place + 64 / PER_LOAD * j + ahead);
            if constexpr (form == BYTES) weights[0][b] = load_bytes(place + 64 * j);
            else load_pair<form>(place, j / 2, upper[b], weights[0][b], weights[PER_LOAD - 1][b]);
        }
        for (int half = 0; half < PER_LOAD; ++half)
            for (int r = 0; r < R; ++r) {
                const Fours four = broadcast_four(activations + r * k + 4 * (j + half));
                for (int b = 0; b < B; ++b) {
                    Ints& sum = products[j * H / 8 - first][r][b];
                    sum = dot(sum, weights[half][b], four);
                }
            }
    }
}
#endif

// Adds parts first … last - 1 of the rows to total[r][b].
template <Codes form, Scaling scaling, Zeros zeros, int R, int B>
INLINED void add_parts(const Blocks& blocks, const Rows& rows, int64_t first, int64_t last, Floats (&total)[R][B]) {
    constexpr int H = scaling == EACH_HALF_OF_CODES ? 2 : 1, T = std::min(H, HALVES_TOGETHER);
    constexpr bool FROM_ZERO = zeros == OFFSETS || ((form == BYTES || form == PLACES) && SIGNED_BYTES);  // the sums of products
    constexpr int32_t ZERO = form == SIXES ? 32 : form == FIVES ? 16 : form == FLOATS ? ZERO_OF_MX4 : 1;
    const int64_t k = padded(rows.k), parts = k / GROUP;
    const int32_t* corrections =
        zeros == EACH_GROUP || ZERO > 1 ? rows.sums : blocks.matrix->kind == Q4 ? rows.sums_of_8 : rows.sums_of_128;
    const uint8_t* codes = blocks.codes;
    constexpr bool OF_CODES = scaling == EACH_PART_OF_CODES || scaling == EACH_HALF_OF_CODES || scaling == EACH_PART_OF_SIGNED_CODES;
    constexpr int64_t PARTS_AHEAD = AHEAD / part_bytes(form);
    // parts of a group are eight where they have scales of their own, else another power of two, or all of the row
    const int shift = OF_CODES ? 3 : blocks.parts_of_group >= parts ? 62 : __builtin_ctz(uint32_t(blocks.parts_of_group));
    Floats group_scale[B], group_offset[B];
    for (int64_t part = first; part < last; ++part, codes += part_bytes(form)) {
        const int64_t group = scaling == WHOLE_ROW ? 0 : (part >> shift) * WIDTH;
        // behind a block's last part the other block lies, which is read beside it
        const int64_t fetched = part + PARTS_AHEAD + (B == 1 || part + PARTS_AHEAD < parts ? 0 : parts);
        if (R <= FETCHING_ROWS && part % lines(B) == 0)  // of numbers of 32 bytes to a part, the next part's lie in the same line
            for (int b = 0; b < B; ++b) {
                const int64_t place = b * blocks.groups_stride + (fetched >> shift) * WIDTH;
                if constexpr (OF_CODES) fetch<B>(blocks.parts + fetched * 2 * WIDTH + b * blocks.parts_stride);
                if constexpr (scaling == EACH_PART) fetch<B>(blocks.scales + place);
                if constexpr (scaling == EACH_PART && zeros == OFFSETS) fetch<B>(blocks.offsets + place);
                if constexpr (scaling == POWERS_OF_TWO || zeros == EACH_GROUP) fetch<B>(blocks.zeros + place);
            }
        if constexpr (OF_CODES) {
            if (part == first || part % 8 == 0)
                for (int b = 0; b < B; ++b) {
                    const int64_t place = b * blocks.groups_stride;
                    group_scale[b] = load_halves(blocks.scales + place + group);
                    if constexpr (zeros == OFFSETS) group_offset[b] = load_halves(blocks.offsets + place + group);
                    if (R > FETCHING_ROWS) continue;
                    fetch<B>(blocks.scales + place + (fetched >> 3) * WIDTH);
                    if constexpr (zeros == OFFSETS) fetch<B>(blocks.offsets + place + (fetched >> 3) * WIDTH);
                }
        }
        const int64_t ahead = (fetched - part) * part_bytes(form);
        Floats offset[B];
        const auto add_halves = [&](auto number) __attribute__((always_inline)) {
            constexpr int half = number;
            Ints products[T][R][B];
            for (int r = 0; r < R; ++r) {
                const int64_t at = r * parts + part;
                for (int t = 0; t < T; ++t) {
                    const int32_t half_sum = H == 1 ? 0 : half + t ? rows.sums[at] - rows.half_sums[at] : rows.half_sums[at];
                    const Ints correction = broadcast(FROM_ZERO ? 0 : ZERO * (H == 1 ? corrections[at] : half_sum));
                    for (int b = 0; b < B; ++b)
                        products[t][r][b] =
                            zeros == EACH_GROUP ? times_zeros(blocks.zeros + b * blocks.groups_stride + group, correction) : correction;
                }
            }
            multiply_part<form, H, half>(codes, blocks.codes_stride, ahead, rows.codes + part * GROUP, k, products);
            Floats weight_scale[T][B];
            for (int t = 0; t < T; ++t)
                for (int b = 0; b < B; ++b) {
                    Floats& scale = weight_scale[t][b];
                    if constexpr (scaling == POWERS_OF_TWO) scale = powers_of_two(blocks.zeros + b * blocks.groups_stride + group);
                    else if constexpr (OF_CODES) scale = group_scale[b];
                    else if constexpr (scaling != WHOLE_ROW) scale = load_halves(blocks.scales + b * blocks.groups_stride + group);
                    if constexpr (zeros == OFFSETS)
                        offset[b] = OF_CODES ? group_offset[b] : load_halves(blocks.offsets + b * blocks.groups_stride + group);
                    const uint8_t* of_part = blocks.parts + (2 * part + half + t) * WIDTH + b * blocks.parts_stride;
                    if constexpr (scaling == EACH_HALF_OF_CODES || scaling == EACH_PART_OF_SIGNED_CODES)
                        scale = times(scale, to_floats(widened(reinterpret_cast<const int8_t*>(of_part))));
                    if constexpr (scaling == EACH_PART_OF_CODES) {
                        scale = times(scale, to_floats(widened(of_part)));
                        offset[b] = times(offset[b], to_floats(widened(of_part + WIDTH)));
                    }
                }
            for (int r = 0; r < R; ++r) {
                const Floats scale = broadcast(rows.scales[r * parts + part]);
                for (int b = 0; b < B; ++b)
                    for (int t = 0; t < T; ++t) {
                        const Floats sum = to_floats(products[t][r][b]);
                        if constexpr (scaling == WHOLE_ROW) total[r][b] = fma(sum, scale, total[r][b]);
                        else total[r][b] = fma(times(sum, scale), weight_scale[t][b], total[r][b]);
                    }
            }
        };
        add_halves(std::integral_constant<int, 0>());
        if constexpr (T < H) add_halves(std::integral_constant<int, T>());
        if constexpr (zeros == OFFSETS)
            for (int r = 0; r < R; ++r) {
                const Floats sum = broadcast(rows.scales[r * parts + part] * float(-rows.sums[r * parts + part]));
                for (int b = 0; b < B; ++b) total[r][b] = fma(sum, offset[b], total[r][b]);
            }
    }
}

// Adds what each C rows of codes of a row gave, scales what has one scale for the whole row, adds the bias, and stores the blocks before
// `last`.
template <Scaling scaling, int C, int R, int B>
INLINED void finish(const Blocks& blocks, float* out, int64_t stride, int64_t block, int64_t last, const Floats (&total)[R][B]) {
    const Matrix& matrix = *blocks.matrix;
    for (int b = 0; b < B && block + b < last; ++b) {
        const int64_t n = (block + b) * WIDTH, count = std::min(WIDTH, matrix.n - n);
        if (count <= 0) break;
        for (int r = 0; r < R / C; ++r) {
            Floats value = total[C * r][b];
            if constexpr (C == 2) value = add(value, total[C * r + 1][b]);
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
    const int64_t step = WIDTH * GROUP * bits_of(matrix.kind) / 8, place = block * groups * WIDTH;
    return {static_cast<const uint8_t*>(matrix.codes) + (block * parts + part) * step,
            second * parts * step,
            matrix.scales + (matrix.scales ? place : 0),
            matrix.zeros + (matrix.zeros ? place : 0),
            matrix.offsets + (matrix.offsets ? place : 0),
            second * groups * WIDTH,
            matrix.parts + (matrix.parts ? block * parts * 2 * WIDTH : 0),
            second * parts * 2 * WIDTH,
            matrix.group / int32_t(GROUP),
            &matrix};
}

// Blocks that are multiplied together: with two each activation is used twice. One row waits for memory, which gives most where it is
// read in one place, unless much is to be computed of a code.
constexpr int blocks_of(Codes form, int rows) { return rows > MOST_ROWS_OF_TWO || (rows == 1 && form != SIXES) ? 1 : 2; }

// Up to MOST_ROWS rows: codes are unpacked where they are multiplied.
template <Codes form, Scaling scaling, Zeros zeros, int R>
void few_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    constexpr int B = blocks_of(form, R);
    for (int64_t block = first; block < last; block += B) {
        const Blocks at = blocks_at(matrix, block, 0);
        Floats total[R][B];
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) total[r][b] = zero_floats();
        add_parts<form, scaling, zeros>(at, rows, 0, padded(matrix.k) / GROUP, total);
        if constexpr (R % 2 == 0) {
            if (rows.codes_each == 2) {
                finish<scaling, 2>(at, out, stride, block, last, total);
                continue;
            }
        }
        finish<scaling, 1>(at, out, stride, block, last, total);
    }
}

// The rows of a tile, at most R.
template <Codes form, Scaling scaling, Zeros zeros, int R>
void few_rows_of(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    if constexpr (R > 1) {
        if (rows.m * rows.codes_each < R) return few_rows_of<form, scaling, zeros, R - 1>(matrix, rows, out, stride, first, last);
    }
    few_rows<form, scaling, zeros, R>(matrix, rows, out, stride, first, last);
}

template <Codes form, Scaling scaling, Zeros zeros>
void any_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first_block, int64_t last_block) {
    constexpr int64_t MOST = form == SIXES ? std::min(MOST_ROWS, MOST_ROWS_OF_SIXES) : MOST_ROWS;
    const int64_t most_rows = MOST / rows.codes_each, tiles = (rows.m + most_rows - 1) / most_rows;
    const int64_t bytes = padded(matrix.k) / GROUP * part_bytes(form), most = std::max<int64_t>(NEAR_BYTES / bytes / 2 * 2, 2);
    for (int64_t first = first_block; first < last_block; first += most) {
        const int64_t last = std::min(first + most, last_block);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = rows.m * tile / tiles, end = rows.m * (tile + 1) / tiles;
            const Rows some = some_rows(rows, row, end);
            float* place = out + row * stride;
            few_rows_of<form, scaling, zeros, MOST>(matrix, some, place, stride, first, last);
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
    else if (matrix.kind == MX4) any_rows<FLOATS, POWERS_OF_TWO, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == IQ4 && matrix.parts) any_rows<PLACES, EACH_PART_OF_SIGNED_CODES, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == IQ4) any_rows<PLACES, EACH_PART, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == Q6) any_rows<SIXES, EACH_HALF_OF_CODES, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == Q5 && matrix.parts) any_rows<FIVES, EACH_PART_OF_CODES, OFFSETS>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == Q5 && matrix.offsets) any_rows<FIVES, EACH_PART, OFFSETS>(matrix, rows, out, stride, first, last);
    else if (matrix.kind == Q5) any_rows<FIVES, EACH_PART, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
    else if (matrix.parts) any_rows<NIBBLES, EACH_PART_OF_CODES, OFFSETS>(matrix, rows, out, stride, first, last);
    else if (matrix.offsets) any_rows<NIBBLES, EACH_PART, OFFSETS>(matrix, rows, out, stride, first, last);
    else if (matrix.zeros) any_scaling<NIBBLES, EACH_GROUP>(matrix, rows, out, stride, first, last);
    else any_scaling<NIBBLES, ONE_FOR_ALL>(matrix, rows, out, stride, first, last);
}

}  // namespace bessemer

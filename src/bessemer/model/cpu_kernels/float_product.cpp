// Products of weights in float32, float16, bfloat16 and e4m3 with activations in float32: for every output one chain of fused
// multiplications and additions, from the first input to the last; in e4m3 one for each group, whose sums are scaled and added.
#include <algorithm>
#include <type_traits>

#include "products.h"
#include "registers.h"

namespace bessemer {
namespace {

using namespace registers;

constexpr int MOST_ROWS = 6, SIDE_BY_SIDE = 4;  // rows and blocks whose sums stay in registers: 24 chains hide each other's latency
#if defined(BESSEMER_AVX2) || defined(BESSEMER_NEON)
// a block takes two of sixteen registers, or four of 32
constexpr int blocks_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int blocks_of(int) { return SIDE_BY_SIDE; }
#endif
// With two chains for each, and four inputs' weights.
constexpr int blocks_of(Kind kind, int rows) { return kind != F8 ? blocks_of(rows) : rows == 1 ? 2 : 1; }

// Adds one input's products to total[r][b].
template <int R, int B>
INLINED void add_input(const Floats (&weights)[B], const float* values, int64_t stride, Floats (&total)[R][B]) {
    UNROLLED for (int r = 0; r < R; ++r) {
        const Floats value = broadcast(values[r * stride]);
        UNROLLED for (int b = 0; b < B; ++b) total[r][b] = fma(weights[b], value, total[r][b]);
    }
}

inline Floats load_numbers(const float* p) { return load_floats(p); }
inline Floats load_numbers(const uint16_t* p) { return load_halves(p); }

template <Kind kind, int R, int B>
void block_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t block) {
    const int64_t k = matrix.k;
    Floats total[R][B];
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int b = 0; b < B; ++b) total[r][b] = zero_floats();
    if constexpr (kind == F32 || kind == F16) {
        using Number = std::conditional_t<kind == F32, float, uint16_t>;
        const Number* codes = static_cast<const Number*>(matrix.codes) + block * k * WIDTH;
        for (int64_t i = 0; i < k; ++i) {
            Floats weights[B];
            UNROLLED for (int b = 0; b < B; ++b) weights[b] = load_numbers(codes + (b * k + i) * WIDTH);
            add_input<R, B>(weights, rows.values + i, rows.stride, total);
        }
    }
    if constexpr (kind == BF16) {
        const int64_t K = padded(k);
        const uint16_t* codes = static_cast<const uint16_t*>(matrix.codes) + block * K * WIDTH;
        for (int64_t i = 0; i < k; i += 2) {
            Floats even[B], odd[B];
            UNROLLED for (int b = 0; b < B; ++b) load_bfloat_pairs(codes + (b * K + i) * WIDTH, even[b], odd[b]);
            add_input<R, B>(even, rows.values + i, rows.stride, total);
            if (i + 1 < k) add_input<R, B>(odd, rows.values + i + 1, rows.stride, total);
        }
    }
    if constexpr (kind == F8) {
        const int64_t K = padded(k), groups = (k + matrix.group - 1) / matrix.group;
        const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + block * K * WIDTH;
        const float* scales = reinterpret_cast<const float*>(matrix.scales) + block * groups * WIDTH;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t end = std::min(k, (group + 1) * matrix.group);
            Floats part[R][B];
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int b = 0; b < B; ++b) part[r][b] = zero_floats();
            for (int64_t i = group * matrix.group; i < end; i += 4) {
                Floats four[4][B];
                UNROLLED for (int b = 0; b < B; ++b) {
                    Floats weights[4];
                    load_e4m3(codes + (b * K + i) * WIDTH, weights);
                    UNROLLED for (int j = 0; j < 4; ++j) four[j][b] = weights[j];
                }
                UNROLLED for (int j = 0; j < 4 && i + j < end; ++j) add_input<R, B>(four[j], rows.values + i + j, rows.stride, part);
            }
            UNROLLED for (int b = 0; b < B; ++b) {
                const Floats scale = load_floats(scales + (b * groups + group) * WIDTH);
                UNROLLED for (int r = 0; r < R; ++r) total[r][b] = fma(part[r][b], scale, total[r][b]);
            }
        }
    }
    UNROLLED for (int b = 0; b < B; ++b) {
        const int64_t n = (block + b) * WIDTH, count = std::min(WIDTH, matrix.n - n);
        UNROLLED for (int r = 0; r < R; ++r) {
            if (matrix.bias) total[r][b] = add(total[r][b], load_floats(matrix.bias + n, count));
            store_floats(out + r * stride + n, total[r][b], count);
        }
    }
}

template <Kind kind, int R>
void some_blocks(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    constexpr int B = blocks_of(kind, R);
    int64_t block = first;
    for (; block + B <= last; block += B) block_product<kind, R, B>(matrix, rows, out, stride, block);
    for (; block < last; ++block) block_product<kind, R, 1>(matrix, rows, out, stride, block);
}

template <Kind kind>
void any_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first_block, int64_t last_block) {
    const int64_t tiles = (rows.m + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t first = first_block; first < last_block; first += SIDE_BY_SIDE)  // these weights stay near for all rows
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = rows.m * tile / tiles, end = rows.m * (tile + 1) / tiles;
            const int64_t last = tiles == 1 ? last_block : std::min(first + SIDE_BY_SIDE, last_block);
            const Rows some = some_rows(rows, row, end);
            float* place = out + row * stride;
            switch (end - row) {
                case 1: some_blocks<kind, 1>(matrix, some, place, stride, first, last); break;
                case 2: some_blocks<kind, 2>(matrix, some, place, stride, first, last); break;
                case 3: some_blocks<kind, 3>(matrix, some, place, stride, first, last); break;
                case 4: some_blocks<kind, 4>(matrix, some, place, stride, first, last); break;
                case 5: some_blocks<kind, 5>(matrix, some, place, stride, first, last); break;
                default: some_blocks<kind, 6>(matrix, some, place, stride, first, last);
            }
            if (tiles == 1) return;
        }
}

}  // namespace

void float_product(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    switch (matrix.kind) {
        case F32: any_rows<F32>(matrix, rows, out, stride, first, last); break;
        case F16: any_rows<F16>(matrix, rows, out, stride, first, last); break;
        case BF16: any_rows<BF16>(matrix, rows, out, stride, first, last); break;
        default: any_rows<F8>(matrix, rows, out, stride, first, last);
    }
}

}  // namespace bessemer

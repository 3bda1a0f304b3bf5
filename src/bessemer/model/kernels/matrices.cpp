#include "matrices.h"

#include <algorithm>

#include "registers.h"
#include "parts.h"

namespace bessemer {
namespace {

using namespace registers;

constexpr int MOST_ROWS = 8;  // rows that are multiplied together: their sums stay in registers

// The weights of 32 neighbours along k, for 16 outputs: 8 registers of codes.
template <Kind kind>
inline void unpack(const uint8_t* codes, Bytes weights[8]) {
    if constexpr (kind == Q8) {
        for (int j = 0; j < 8; ++j) weights[j] = load_bytes(codes + 64 * j);
    } else {
        for (int j = 0; j < 4; ++j) {
            const Bytes both = load_bytes(codes + 64 * j);
            weights[2 * j] = low_nibbles(both);
            weights[2 * j + 1] = high_nibbles(both);
        }
    }
}

// One block of 16 outputs and R rows of activations in groups of 32:
//   sum over weight groups of weight scale * (sum over groups of 32 of activation scale * integer sum)
template <Kind kind, int R, bool zeros>
void quantised_block(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t block) {
    const int64_t k = padded(matrix.k), parts = k / GROUP, parts_of_group = matrix.group / GROUP;
    const int64_t groups = parts / parts_of_group, step = kind == Q8 ? 512 : 256;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + block * parts * step;
    const uint16_t* scales = matrix.scales + block * groups * WIDTH;
    const uint8_t* points = zeros ? matrix.zeros + block * groups * WIDTH : nullptr;
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zero_floats();
    for (int64_t group = 0, part = 0; group < groups; ++group) {
        Floats sum[R];
        for (int r = 0; r < R; ++r) sum[r] = zero_floats();
        for (int64_t last = part + parts_of_group; part < last; ++part, codes += step) {
            Bytes weights[8];
            unpack<kind>(codes, weights);
            for (int r = 0; r < R; ++r) {
                const int8_t* activations = rows.codes + r * k + part * GROUP;
                const int32_t activation_sum = rows.sums[r * parts + part];
                Ints products = zeros ? less_zeros(zero_ints(), points + group * WIDTH, activation_sum)
                                      : broadcast(int32_t(kind == Q8 ? -128 : -8) * activation_sum);
                for (int j = 0; j < 8; ++j) products = dot(products, weights[j], activations + 4 * j);
                sum[r] = fma(to_floats(products), broadcast(rows.scales[r * parts + part]), sum[r]);
            }
        }
        const Floats scale = load_halves(scales + group * WIDTH);
        for (int r = 0; r < R; ++r) total[r] = fma(sum[r], scale, total[r]);
    }
    const int64_t n = block * WIDTH, count = std::min(WIDTH, matrix.n - n);
    for (int r = 0; r < R; ++r) {
        if (matrix.bias) total[r] = add(total[r], load_floats(matrix.bias + n, count));
        store_floats(out + r * stride + n, total[r], count);
    }
}

template <int R>
void bfloat_block(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t block) {
    const int64_t k = padded(matrix.k);
    const uint16_t* codes = static_cast<const uint16_t*>(matrix.codes) + block * k * WIDTH;
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zero_floats();
    for (int64_t i = 0; i < k; i += 2, codes += 2 * WIDTH) {
        Floats even, odd;
        float lanes[2][WIDTH];
        for (int lane = 0; lane < WIDTH; ++lane) {
            lanes[0][lane] = bfloat_to_float(codes[2 * lane]);
            lanes[1][lane] = bfloat_to_float(codes[2 * lane + 1]);
        }
        even = load_floats(lanes[0]);
        odd = load_floats(lanes[1]);
        for (int r = 0; r < R; ++r) {
            total[r] = fma(odd, broadcast(bfloat_to_float(rows.halves[r * k + i + 1])), total[r]);
            total[r] = fma(even, broadcast(bfloat_to_float(rows.halves[r * k + i])), total[r]);
        }
    }
    const int64_t n = block * WIDTH, count = std::min(WIDTH, matrix.n - n);
    for (int r = 0; r < R; ++r) {
        if (matrix.bias) total[r] = add(total[r], load_floats(matrix.bias + n, count));
        store_floats(out + r * stride + n, total[r], count);
    }
}

template <int R>
void float_block(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t block) {
    const float* codes = static_cast<const float*>(matrix.codes) + block * matrix.k * WIDTH;
    Floats total[R];
    for (int r = 0; r < R; ++r) total[r] = zero_floats();
    for (int64_t i = 0; i < matrix.k; ++i) {
        const Floats weights = load_floats(codes + i * WIDTH);
        for (int r = 0; r < R; ++r) total[r] = fma(weights, broadcast(rows.values[r * rows.stride + i]), total[r]);
    }
    const int64_t n = block * WIDTH, count = std::min(WIDTH, matrix.n - n);
    for (int r = 0; r < R; ++r) {
        if (matrix.bias) total[r] = add(total[r], load_floats(matrix.bias + n, count));
        store_floats(out + r * stride + n, total[r], count);
    }
}

template <int R>
void few_rows(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        switch (matrix.kind) {
            case F32: float_block<R>(matrix, rows, out, stride, block); break;
            case BF16: bfloat_block<R>(matrix, rows, out, stride, block); break;
            case Q8: quantised_block<Q8, R, false>(matrix, rows, out, stride, block); break;
            case Q4:
                if (matrix.zeros) quantised_block<Q4, R, true>(matrix, rows, out, stride, block);
                else quantised_block<Q4, R, false>(matrix, rows, out, stride, block);
        }
    }
}

// One group of 32 activations. Returns the sum of its codes.
int32_t quantise(const float* values, int64_t count, int8_t* codes, float* scale) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    float most;
    std::memcpy(&most, &largest, 4);
    std::memset(codes, 0, GROUP);
    *scale = most / 127.0f;
    if (!(most >= 0x1p-100f && most < INFINITY)) {  // all but zero; or not finite, which the product must show
        *scale = most < 1.0f ? 0.0f : NAN;
        return 0;
    }
    const float inverse = 127.0f / most;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = int8_t(std::nearbyint(values[i] * inverse));
        sum += codes[i];
    }
    return sum;
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t rows_bytes(Kind kind, int64_t m, int64_t k) {
    const int64_t K = padded(k);
    if (kind == F32) return 0;
    if (kind == BF16) return aligned(2 * m * K);
    return aligned(m * K) + 2 * aligned(m * K / GROUP * 4);
}

Rows rows_in(Kind kind, int64_t m, int64_t k, const float* values, int64_t stride, void* memory) {
    const int64_t K = padded(k);
    Rows rows{m, k, values, stride, nullptr, nullptr, nullptr, nullptr};
    char* place = static_cast<char*>(memory);
    if (kind == BF16) rows.halves = reinterpret_cast<uint16_t*>(place);
    if (kind == Q8 || kind == Q4) {
        rows.codes = reinterpret_cast<int8_t*>(place);
        rows.scales = reinterpret_cast<float*>(place += aligned(m * K));
        rows.sums = reinterpret_cast<int32_t*>(place + aligned(m * K / GROUP * 4));
    }
    return rows;
}

Rows some_rows(const Rows& rows, int64_t first, int64_t last) {
    const int64_t K = padded(rows.k);
    Rows some = rows;
    some.m = last - first;
    some.values += first * rows.stride;
    if (some.codes) {
        some.codes += first * K;
        some.scales += first * K / GROUP;
        some.sums += first * K / GROUP;
    }
    if (some.halves) some.halves += first * K;
    return some;
}

void prepare_rows(const Matrix& matrix, Rows& rows, int64_t first, int64_t last) {
    const int64_t k = rows.k, K = padded(k);
    for (int64_t r = first; r < last; ++r) {
        const float* values = rows.values + r * rows.stride;
        if (matrix.kind == BF16) {
            uint16_t* halves = rows.halves + r * K;
            for (int64_t i = 0; i < k; ++i) halves[i] = float_to_bfloat(values[i]);
            std::fill(halves + k, halves + K, 0);
        } else if (matrix.kind != F32) {
            for (int64_t part = 0; part < K / GROUP; ++part) {
                const int64_t index = r * K / GROUP + part, begin = part * GROUP;
                rows.sums[index] = quantise(values + begin, std::min(GROUP, k - begin), rows.codes + r * K + begin, rows.scales + index);
            }
        }
    }
}

void multiply(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t n_first, int64_t n_last) {
    const int64_t first = n_first / WIDTH, last = blocks(n_last);
    for (int64_t row = 0; row < rows.m; row += MOST_ROWS) {
        const Rows some = some_rows(rows, row, std::min(row + MOST_ROWS, rows.m));
        float* place = out + row * stride;
        switch (some.m) {
            case 1: few_rows<1>(matrix, some, place, stride, first, last); break;
            case 2: few_rows<2>(matrix, some, place, stride, first, last); break;
            case 3: few_rows<3>(matrix, some, place, stride, first, last); break;
            case 4: few_rows<4>(matrix, some, place, stride, first, last); break;
            case 5: few_rows<5>(matrix, some, place, stride, first, last); break;
            case 6: few_rows<6>(matrix, some, place, stride, first, last); break;
            case 7: few_rows<7>(matrix, some, place, stride, first, last); break;
            default: few_rows<8>(matrix, some, place, stride, first, last);
        }
    }
}

void read_row(const Matrix& matrix, int64_t output, float* out) {
    const int64_t k = matrix.k, K = padded(k), block = output / WIDTH, lane = output % WIDTH;
    if (matrix.kind == F32) {
        const float* codes = static_cast<const float*>(matrix.codes) + block * k * WIDTH + lane;
        for (int64_t i = 0; i < k; ++i) out[i] = codes[i * WIDTH];
        return;
    }
    if (matrix.kind == BF16) {
        const uint16_t* codes = static_cast<const uint16_t*>(matrix.codes) + block * K * WIDTH + 2 * lane;
        for (int64_t i = 0; i < k; ++i) out[i] = bfloat_to_float(codes[i / 2 * 2 * WIDTH + i % 2]);
        return;
    }
    const bool bytes = matrix.kind == Q8;
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + block * WIDTH * (bytes ? K : K / 2) + 4 * lane;
    const int64_t groups = K / matrix.group;
    for (int64_t i = 0; i < k; ++i) {
        const int64_t group = (block * groups + i / matrix.group) * WIDTH + lane;
        const int zero = matrix.zeros ? matrix.zeros[group] : bytes ? 128 : 8;
        const int code = bytes ? codes[i / 4 * 64 + i % 4] : codes[i / 8 * 64 + i % 4] >> (i % 8 / 4 * 4) & 15;
        out[i] = half_to_float(matrix.scales[group]) * float(code - zero);
    }
}

}  // namespace bessemer

using namespace bessemer;

int64_t bessemer_matrix_size() { return sizeof(Matrix); }

const char* bessemer_arithmetic() {
#ifdef BESSEMER_VNNI
    return "avx512";
#else
    return "portable";
#endif
}

int64_t bessemer_rows_bytes(int32_t kind, int64_t m, int64_t k) { return rows_bytes(Kind(kind), m, k); }

void bessemer_read_row(const Matrix* matrix, int64_t output, float* out) { read_row(*matrix, output, out); }

void bessemer_multiply(const Matrix* matrix, const float* values, int64_t m, int64_t values_stride, float* out,
                       int64_t out_stride, void* memory, int32_t threads) {
    Rows rows = rows_in(matrix->kind, m, matrix->k, values, values_stride, memory);
    const int64_t row_parts = m < 16 ? 1 : std::min<int64_t>(m / 8, 4 * threads);
    run_parts(m < 16 ? 1 : threads, row_parts, [&](int64_t part) {
        prepare_rows(*matrix, rows, m * part / row_parts, m * (part + 1) / row_parts);
    });
    const int64_t all = blocks(matrix->n), parts = std::min<int64_t>((all + 1) / 2, 8 * threads);
    run_parts(threads, parts, [&](int64_t part) {  // an even number of blocks to each part but the last
        const int64_t first = (all + 1) / 2 * part / parts * 2, last = (all + 1) / 2 * (part + 1) / parts * 2;
        multiply(*matrix, rows, out, out_stride, first * WIDTH, std::min(last * WIDTH, matrix->n));
    });
}

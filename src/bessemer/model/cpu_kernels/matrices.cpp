#include "matrices.h"

#include <algorithm>

#include "guards.h"
#include "registers.h"
#include "parts.h"
#include "products.h"

namespace bessemer {
namespace {

using namespace registers;

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t rows_bytes(Kind kind, int64_t m, int64_t k) {
    const int64_t K = padded(k);
    if (kind == F32 || kind == BF16) return 0;
    return aligned(m * K) + 4 * aligned(m * K / GROUP * 4);
}

Rows rows_in(Kind kind, int64_t m, int64_t k, const float* values, int64_t stride, void* memory) {
    const int64_t K = padded(k);
    Rows rows{m, k, values, stride, nullptr, nullptr, nullptr, nullptr, nullptr};
    char* place = static_cast<char*>(memory);
    if (kind == Q8 || kind == Q4) {
        const int64_t step = aligned(m * K / GROUP * 4);
        rows.codes = reinterpret_cast<int8_t*>(place);
        rows.scales = reinterpret_cast<float*>(place += aligned(m * K));
        rows.sums = reinterpret_cast<int32_t*>(place += step);
        rows.sums_of_8 = reinterpret_cast<int32_t*>(place += step);
        rows.sums_of_128 = reinterpret_cast<int32_t*>(place += step);
    }
    return rows;
}

Rows some_rows(const Rows& rows, int64_t first, int64_t last) {
    const int64_t K = padded(rows.k);
    Rows some = rows;
    some.m = last - first;
    some.values += first * rows.stride;
    if (some.codes) {
        const int64_t parts = first * K / GROUP;
        some.codes += first * K;
        some.scales += parts;
        some.sums += parts;
        some.sums_of_8 += parts;
        some.sums_of_128 += parts;
    }
    return some;
}

void prepare_rows(const Matrix& matrix, Rows& rows, int64_t first, int64_t last) {
    if (matrix.kind == F32 || matrix.kind == BF16) return;
    const int64_t k = rows.k, K = padded(k), parts = K / GROUP;
    for (int64_t r = first; r < last; ++r)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t at = r * parts + part, begin = part * GROUP;
            const float* values = rows.values + r * rows.stride + begin;
            float last[GROUP] = {};
            if (k - begin < GROUP) {
                std::copy(values, values + (k - begin), last);
                values = last;
            }
            const int32_t sum = quantise_group(values, rows.codes + at * GROUP, rows.scales + at);
            rows.sums[at] = -sum;
            rows.sums_of_8[at] = -8 * sum;
            rows.sums_of_128[at] = -128 * sum;
        }
}

void multiply(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t n_first, int64_t n_last) {
    const bool codes = matrix.kind == Q8 || matrix.kind == Q4;
    (codes ? quantised_product : float_product)(matrix, rows, out, stride, n_first / WIDTH, blocks(n_last));
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
        const int zero = matrix.zeros ? matrix.zeros[group] : matrix.offsets ? 0 : bytes ? 128 : 8;
        const int code = bytes ? codes[i / 4 * 64 + i % 4] : codes[i / 8 * 64 + i % 4] >> (i % 8 / 4 * 4) & 15;
        out[i] = half_to_float(matrix.scales[group]) * float(code - zero);
        if (matrix.offsets) out[i] += half_to_float(matrix.offsets[group]);
    }
}

}  // namespace bessemer

using namespace bessemer;

int64_t bessemer_matrix_size() { return sizeof(Matrix); }

const char* bessemer_arithmetic() {
#ifdef BESSEMER_VNNI
    return "avx512";
#elif defined(BESSEMER_AVX2)
    return "avx2";
#else
    return "portable";
#endif
}

void bessemer_read_row(const Matrix* matrix, int64_t output, float* out) { read_row(*matrix, output, out); }

const char* bessemer_multiply(const Matrix* matrix, const float* values, int64_t m, int64_t values_stride, float* out,
                              int64_t out_stride, void* memory, int32_t threads) {
    return guarded([&]() -> const char* {
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
        return nullptr;
    });
}

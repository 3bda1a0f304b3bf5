#include "matrices.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "guards.h"
#include "registers.h"
#include "parts.h"
#include "products.h"

namespace bessemer {
namespace {

using namespace registers;

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The code of input i of an output, whose lane of the first four neighbours begins at `codes`.
inline int code_at(Kind kind, const uint8_t* codes, int64_t i) {
    const int64_t part = i / 32, four = i % 32 / 4, upper = bits_of(kind) - 4;
    if (kind == Q8) return codes[i / 4 * 64 + i % 4];
    codes += part * (4 + upper) * 64 + i % 4;
    const int low = codes[four / 2 * 64] >> (four % 2 * 4) & 15;
    if (!upper) return low;
    const int64_t bit = four * upper;
    return low | (codes[(4 + bit / 8) * 64] >> ((bit + 4) % 8) & ((1 << upper) - 1)) << 4;
}

}  // namespace

int64_t rows_bytes(Kind kind, int64_t m, int64_t k, int64_t codes_each) {
    if (!is_coded(kind)) return 0;
    const int64_t codes = m * codes_each * padded(k);
    return aligned(codes) + 5 * aligned(codes / GROUP * 4);
}

Rows rows_in(Kind kind, int64_t m, int64_t k, int64_t codes_each, const float* values, int64_t stride, void* memory) {
    Rows rows{m, k, values, stride, codes_each, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    char* place = static_cast<char*>(memory);
    if (is_coded(kind)) {
        const int64_t codes = m * codes_each * padded(k), step = aligned(codes / GROUP * 4);
        rows.codes = reinterpret_cast<int8_t*>(place);
        rows.scales = reinterpret_cast<float*>(place += aligned(codes));
        rows.sums = reinterpret_cast<int32_t*>(place += step);
        rows.sums_of_8 = reinterpret_cast<int32_t*>(place += step);
        rows.sums_of_128 = reinterpret_cast<int32_t*>(place += step);
        rows.half_sums = reinterpret_cast<int32_t*>(place += step);
    }
    return rows;
}

Rows some_rows(const Rows& rows, int64_t first, int64_t last) {
    Rows some = rows;
    some.m = last - first;
    some.values += first * rows.stride;
    if (some.codes) {
        const int64_t codes = first * rows.codes_each * padded(rows.k), parts = codes / GROUP;
        some.codes += codes;
        some.scales += parts;
        some.sums += parts;
        some.sums_of_8 += parts;
        some.sums_of_128 += parts;
        some.half_sums += parts;
    }
    return some;
}

void prepare_rows(const Matrix& matrix, Rows& rows, int64_t first, int64_t last) {
    if (!is_coded(matrix.kind)) return;
    const int64_t k = rows.k, parts = padded(k) / GROUP, each = rows.codes_each;
    for (int64_t r = first; r < last; ++r)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part * GROUP;
            const float* values = rows.values + r * rows.stride + begin;
            float padded_values[GROUP] = {}, rest[GROUP];
            if (k - begin < GROUP) {
                std::copy(values, values + (k - begin), padded_values);
                values = padded_values;
            }
            for (int64_t c = 0; c < each; ++c) {
                const int64_t at = (r * each + c) * parts + part;
                int8_t* codes = rows.codes + at * GROUP;
                const int32_t sum = quantise_group(values, codes, rows.scales + at);
                rows.sums[at] = -sum;
                rows.sums_of_8[at] = -8 * sum;
                rows.sums_of_128[at] = -128 * sum;
                rows.half_sums[at] = -std::accumulate(codes, codes + GROUP / 2, 0);
                if (c + 1 == each) break;
                // products take a code for this scale times it, so this is what they leave of the value, rounded once
                const float scale = rows.scales[at];
                for (int i = 0; i < GROUP; ++i) rest[i] = fused(-float(codes[i]), scale, values[i]);
                values = rest;
            }
        }
}

void multiply(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t n_first, int64_t n_last) {
    (is_coded(matrix.kind) ? quantised_product : float_product)(matrix, rows, out, stride, n_first / WIDTH, blocks(n_last));
}

void read_row(const Matrix& matrix, int64_t output, float* out) {
    const int64_t k = matrix.k, K = padded(k), block = output / WIDTH, lane = output % WIDTH;
    if (matrix.kind == F32) {
        const float* codes = static_cast<const float*>(matrix.codes) + block * k * WIDTH + lane;
        for (int64_t i = 0; i < k; ++i) out[i] = codes[i * WIDTH];
        return;
    }
    if (matrix.kind == F16) {
        const uint16_t* codes = static_cast<const uint16_t*>(matrix.codes) + block * k * WIDTH + lane;
        for (int64_t i = 0; i < k; ++i) out[i] = half_to_float(codes[i * WIDTH]);
        return;
    }
    if (matrix.kind == BF16) {
        const uint16_t* codes = static_cast<const uint16_t*>(matrix.codes) + block * K * WIDTH + 2 * lane;
        for (int64_t i = 0; i < k; ++i) out[i] = bfloat_to_float(codes[i / 2 * 2 * WIDTH + i % 2]);
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(matrix.codes) + block * WIDTH * K * bits_of(matrix.kind) / 8 + 4 * lane;
    if (matrix.kind == F8) {
        const int64_t groups = (k + matrix.group - 1) / matrix.group;
        const float* scales = reinterpret_cast<const float*>(matrix.scales) + block * groups * WIDTH + lane;
        for (int64_t i = 0; i < k; ++i) out[i] = e4m3_to_float(codes[i / 4 * 64 + i % 4]) * scales[i / matrix.group * WIDTH];
        return;
    }
    const uint8_t* parts = matrix.parts ? matrix.parts + block * K + lane : nullptr;
    const int64_t groups = K / matrix.group;
    for (int64_t i = 0; i < k; ++i) {
        const int64_t group = (block * groups + i / matrix.group) * WIDTH + lane;
        if (matrix.kind == MX4) {
            out[i] = exponent_to_float(matrix.zeros[group]) * float(MX4_TABLE[code_at(MX4, codes, i)] - ZERO_OF_MX4);
            continue;
        }
        if (matrix.kind == IQ4) {
            const float step = half_to_float(matrix.scales[group]) * (parts ? float(int8_t(parts[i / 32 * 32])) : 1.0f);
            out[i] = step * float(IQ4_TABLE[code_at(IQ4, codes, i)] - ZERO_OF_IQ4);
            continue;
        }
        const int zero = matrix.zeros ? matrix.zeros[group] : matrix.offsets ? 0 : 1 << (bits_of(matrix.kind) - 1);
        float scale = half_to_float(matrix.scales[group]), offset = matrix.offsets ? half_to_float(matrix.offsets[group]) : 0.0f;
        if (parts && matrix.kind == Q6) {
            scale *= float(int8_t(parts[i / 16 * WIDTH]));
        } else if (parts) {
            scale *= float(parts[i / 32 * 32]);
            offset *= float(parts[i / 32 * 32 + WIDTH]);
        }
        out[i] = scale * float(code_at(matrix.kind, codes, i) - zero);
        if (matrix.offsets) out[i] += offset;
    }
}

}  // namespace bessemer

using namespace bessemer;

int64_t bessemer_matrix_size() { return sizeof(Matrix); }

const char* bessemer_arithmetic() {
#ifdef BESSEMER_VNNI
    return "avx512";
#elif defined(BESSEMER_AVX_VNNI)
    return "avx_vnni";
#elif defined(BESSEMER_AVX2)
    return "avx2";
#elif defined(BESSEMER_I8MM)
    return "neon_i8mm";
#elif defined(BESSEMER_DOTPROD)
    return "neon_dotprod";
#elif defined(BESSEMER_NEON)
    return "neon";
#else
    return "portable";
#endif
}

void bessemer_read_row(const Matrix* matrix, int64_t output, float* out) { read_row(*matrix, output, out); }

const char* bessemer_multiply(const Matrix* matrix, const float* values, int64_t m, int64_t values_stride, int64_t codes_each,
                              float* out, int64_t out_stride, void* memory, int32_t threads) {
    return guarded([&]() -> const char* {
        Rows rows = rows_in(matrix->kind, m, matrix->k, codes_each, values, values_stride, memory);
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

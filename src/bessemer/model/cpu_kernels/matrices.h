// Packed matrices of linear layers, and their product with a few or many rows. See docs/kernels.md.
//
// The caller splits outputs (and rows) between its threads; nothing here starts one, but for `bessemer_multiply`, which
// operators.cpp calls. The order in which an output is summed depends on k and the matrix alone: never on how many rows there
// are, which of them are computed together, or how the outputs are split.
#pragma once
#include <cstdint>

namespace bessemer {

enum Kind : int32_t { F32 = 0, BF16 = 1, Q8 = 2, Q4 = 3, Q5 = 4, Q6 = 5, F8 = 6, MX4 = 7, IQ4 = 8, F16 = 9 };

constexpr int64_t WIDTH = 16;  // outputs side by side: one block of outputs
constexpr int64_t GROUP = 32;  // neighbours along k that share a scale of the activations; k is padded to a multiple of it

inline int64_t padded(int64_t k) { return (k + GROUP - 1) / GROUP * GROUP; }
inline int64_t blocks(int64_t n) { return (n + WIDTH - 1) / WIDTH; }
// Whether weights are whole numbers times scales, which meet activations of 8 bits.
inline bool is_coded(Kind kind) { return kind >= Q8 && kind != F8 && kind != F16; }
// Bits of a code.
inline int64_t bits_of(Kind kind) { return kind == Q8 || kind == F8 ? 8 : kind == Q5 ? 5 : kind == Q6 ? 6 : 4; }

// A linear layer's weight (n outputs, k inputs), packed by PackedMatrix in packed.py, which mirrors this struct.
// For every block of 16 outputs, and K = padded(k):
//   F32   float    [k][16]
//   F16   float16  [k][16]
//   BF16  uint16   [K / 2][16][2]             2 neighbours of k in a lane
//   Q8    uint8    [K / 4][16][4]             code + 128, 4 neighbours of k in a lane
//   Q4    uint8    [K / 8][16][4]             low nibbles k … k + 3, high nibbles k + 4 … k + 7
//   Q5    uint8    [K / 32][4 + 1][16][4]     low four bits as in Q4; bit (f + 4) % 8 of a byte behind them is the fifth bit of the
//                                             neighbours 4 f … 4 f + 3 of the 32
//   Q6    uint8    [K / 32][4 + 2][16][4]     the same with two bits a code, (2 f + 4) % 8 the lower one, f < 4 in the first 16 lanes
//   F8    uint8    [K / 4][16][4]             numbers of the type e4m3, none of them NaN; scales float [groups][16]
//   MX4   as Q4, codes of floats of 4 bits (e2m1); a scale is a power of two, of which zeros has the exponent + 127, and no scales
//   IQ4   as Q4, places in a table of whole numbers (table_of)
//   scales float16 [groups][16], zeros uint8 [groups][16] (null: 128 for Q8, 8 for Q4, 16 for Q5, 32 for Q6)
//   offsets float16 [groups][16], Q4 and Q5 alone: a weight is scale * code + offset, and there are no zeros
//   parts uint8    [K / 32][2][16], groups of 256: each 32 neighbours have a scale and an offset of their own, scale * the first
//                                             number and offset * the second; in Q6 each 16 have a scale, and the numbers are int8,
//                                             as is the first in IQ4, which has no second
struct Matrix {
    int64_t n, k;
    Kind kind;
    int32_t group;          // neighbours along k that share a scale: 32, 64, 128, or padded(k); 256 where there are parts
    const void* codes;      // aligned to 64 bytes, as are scales, zeros, offsets and parts
    const uint16_t* scales;
    const uint8_t* zeros;
    const uint16_t* offsets;
    const uint8_t* parts;
    const float* bias;      // n, or null
};

// m rows of k activations, and their codes for matrices of codes (F32, F16, BF16 and F8 read the values). The caller owns all of it.
// Rows prepared for a matrix of codes serve every other of the same k.
//
// A row is C rows of codes of 8 bits. With one, the activations are rounded to 8 bits. With two, the second is of what the first leaves,
// x - scale * code, so that both together are x in 16 bits; a product is linear, and the two rows of codes are two rows for it, whose
// results are added.
struct Rows {
    int64_t m, k;
    const float* values;    // row r begins at values + r * stride
    int64_t stride;
    int64_t codes_each;     // C, 1 or 2
    int8_t* codes;          // [m][C][K], rounded to nearest even
    float* scales;          // [m][C][K / 32], largest magnitude of the group / 127
    int32_t *sums, *sums_of_8, *sums_of_128;  // [m][C][K / 32], -1, -8 and -128 times the sum of the group's codes
    int32_t* half_sums;     // [m][C][K / 32], -1 times the sum of the group's first 16 codes
};

// Bytes that m rows of k need beside their values, for a matrix of this kind. codes_each: 1 or 2.
int64_t rows_bytes(Kind kind, int64_t m, int64_t k, int64_t codes_each);
// m rows whose other forms lie in `memory` (rows_bytes of it, aligned to 64 bytes); not yet prepared.
Rows rows_in(Kind kind, int64_t m, int64_t k, int64_t codes_each, const float* values, int64_t stride, void* memory);
// Rows first … last - 1 of `rows`, prepared or not, as rows of their own; nothing is copied.
Rows some_rows(const Rows& rows, int64_t first, int64_t last);

// Quantises rows first … last - 1 where the matrix's kind needs it. A row with an infinity or a NaN gives NaN.
void prepare_rows(const Matrix& matrix, Rows& rows, int64_t first, int64_t last);

// out[r * stride + n] = sum over k of x[r, k] W[n, k], plus the bias, for all rows and n_first <= n < n_last.
// n_first is a multiple of 16; n_last is one too, or n.
void multiply(const Matrix& matrix, const Rows& rows, float* out, int64_t stride, int64_t n_first, int64_t n_last);

// The k weights of one output: what an embedding that shares the head's matrix reads.
void read_row(const Matrix& matrix, int64_t output, float* out);

}  // namespace bessemer

extern "C" {
// Size of Matrix, to check that Python's mirror is the same.
int64_t bessemer_matrix_size();
// "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "neon" or "portable".
const char* bessemer_arithmetic();
// Prepares and multiplies m rows with `threads` threads. `memory`: rows_bytes of it, aligned to 64 bytes. Returns a failure as
// guards.h says.
const char* bessemer_multiply(const bessemer::Matrix* matrix, const float* values, int64_t m, int64_t values_stride, int64_t codes_each,
                              float* out, int64_t out_stride, void* memory, int32_t threads);
void bessemer_read_row(const bessemer::Matrix* matrix, int64_t output, float* out);
}

// The kernels as PyTorch's operators, `torch.ops.bessemer.*`; __init__.py has their schemas. The only file that knows PyTorch,
// by its stable interface: what is built against one version runs with later ones.
#define TORCH_TARGET_VERSION 0x020b000000000000  // 2.11, the oldest that we install
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "batch_invariant.h"
#include "cross_entropy.h"
#include "guards.h"
#include "matrices.h"

namespace bessemer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Python is given a ValueError or a MemoryError.
void raise(const char* line) {
    if (line == OUT_OF_MEMORY) throw std::bad_alloc();
    if (line) throw std::invalid_argument(line);
}

void require(bool holds, const char* line) {
    if (!holds) throw std::invalid_argument(line);
}

Tensor contiguous(const Tensor& given, ScalarType type) {
    const Tensor typed = given.scalar_type() == type ? given : torch::stable::to(given, type);
    return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

template <class T>
const T* read(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* read(const MaybeTensor& tensor) {
    return tensor ? read<T>(*tensor) : nullptr;
}

// Pages are written by another operator than the one that reads them.
template <class T>
T* pages_at(const Tensor& tensor) {
    return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

Matrix matrix_of(const Tensor& codes, const MaybeTensor& scales, const MaybeTensor& zeros, const MaybeTensor& offsets,
                 const MaybeTensor& parts, const MaybeTensor& bias, int64_t kind, int64_t outputs, int64_t inputs, int64_t group) {
    require(kind >= F32 && kind <= F16 && outputs > 0 && inputs > 0, "a packed matrix has a kind, outputs and inputs");
    const int64_t lanes = blocks(outputs) * WIDTH, whole = padded(inputs);
    const int64_t bytes[] = {4 * inputs,      2 * whole, whole,     whole / 2, whole * 5 / 8,
                             whole * 6 / 8, whole,     whole / 2, whole / 2, 2 * inputs};
    require(codes.numel() * int64_t(codes.element_size()) == lanes * bytes[kind], "the codes are not those of the matrix");
    if (kind == F8) {
        require(group == 32 || group == 64 || group == 128, "e4m3 weights have groups of 32, 64 or 128");
        require(scales && scales->scalar_type() == ScalarType::Float && scales->numel() == lanes * ((inputs + group - 1) / group),
                "e4m3 weights have scales in float32, one for each group of a row");
    }
    if (kind == MX4) {
        require(group == 32 && !scales && !offsets && !parts && zeros && zeros->numel() == lanes * (whole / 32),
                "floats of 4 bits have an exponent for each 32 weights");
    } else if (is_coded(Kind(kind))) {
        require(parts ? group == 256 : group == whole || group == 32 || group == 64 || group == 128,
                "the kernels know groups of 32, 64, 128 and a row, and of 256 with parts");
        require(!parts || (parts->scalar_type() == ScalarType::Byte && parts->numel() == lanes * whole / 16 && !zeros),
                "two numbers of each 32 weights belong to a group of parts, in bytes, and no zeros");
        require(kind <= Q4 || (!zeros && (parts || group == 32)), "codes of GGUF have groups of 32 without zeros, or parts");
        require(!parts || (kind != Q8 && (kind == Q6 || kind == IQ4) == !offsets), "parts have offsets, but for those of 6 bits and IQ4");
        require(kind != Q6 || parts, "codes of 6 bits have parts");
        require(whole % group == 0 && scales && scales->scalar_type() == ScalarType::Half, "quantised weights have scales in float16");
        require(scales->numel() == lanes * (whole / group), "the scales are not those of the matrix");
        require(!zeros || zeros->numel() == scales->numel(), "the zeros are not those of the matrix");
        require(!offsets || ((kind == Q4 || kind == Q5) && !zeros && offsets->scalar_type() == ScalarType::Half && offsets->numel() == scales->numel()),
                "offsets are of codes of 4 and 5 bits without zeros, in float16, one to a scale");
    }
    require(!bias || bias->numel() == outputs, "the bias is not that of the matrix");
    return {outputs, inputs, Kind(kind), int32_t(group), codes.const_data_ptr(), read<uint16_t>(scales), read<uint8_t>(zeros),
            read<uint16_t>(offsets), read<uint8_t>(parts), read<float>(bias)};
}

Tensor packed_linear(const Tensor& x, const Tensor& codes, const MaybeTensor& scales, const MaybeTensor& zeros,
                     const MaybeTensor& offsets, const MaybeTensor& parts, const MaybeTensor& bias, int64_t kind, int64_t outputs,
                     int64_t inputs, int64_t group, int64_t threads, int64_t activation_bits) {
    constexpr int64_t MOST_DIMENSIONS = 16;
    require(activation_bits == 8 || activation_bits == 16, "activations that meet codes have 8 or 16 bits");
    const int64_t dimensions = x.dim();
    require(dimensions > 0 && dimensions <= MOST_DIMENSIONS && x.size(dimensions - 1) == inputs, "the rows do not fit the matrix");
    const Matrix matrix = matrix_of(codes, scales, zeros, offsets, parts, bias, kind, outputs, inputs, group);
    const Tensor values = contiguous(x, ScalarType::Float);
    int64_t shape[MOST_DIMENSIONS], rows = 1;
    for (int64_t i = 0; i + 1 < dimensions; ++i) rows *= shape[i] = x.size(i);
    shape[dimensions - 1] = outputs;
    const Tensor out = torch::stable::empty({shape, size_t(dimensions)}, ScalarType::Float);
    thread_local Scratch scratch;
    const int64_t codes_each = activation_bits / 8;
    void* memory = scratch.room<uint8_t>(rows_bytes(matrix.kind, rows, inputs, codes_each));
    raise(bessemer_multiply(&matrix, read<float>(values), rows, inputs, codes_each, static_cast<float*>(out.mutable_data_ptr()), outputs,
                            memory, int32_t(threads)));
    return x.scalar_type() == ScalarType::Float ? out : torch::stable::to(out, x.scalar_type());
}

PageType page_type(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return PAGE_F32;
        case ScalarType::Half: return PAGE_F16;
        case ScalarType::BFloat16: return PAGE_BF16;
        case ScalarType::Char: return PAGE_I8;
        case ScalarType::Byte: return PAGE_I4;
        default: throw std::invalid_argument("pages are in float32, float16, bfloat16, int8 or, two codes to a byte, int4");
    }
}

Pages pages_of(const Tensor& keys, const Tensor& values, const MaybeTensor& key_scales, const MaybeTensor& value_scales) {
    require(keys.dim() == 4 && values.dim() == 4 && keys.is_contiguous() && values.stride(3) == 1, "pages lie in order");
    const PageType type = page_type(keys.scalar_type());
    require(!has_scales(type) || (key_scales && value_scales), "pages in int8 and int4 have scales");
    const int64_t each = type == PAGE_I4 ? 2 : 1;
    return {pages_at<void>(keys), pages_at<void>(values), key_scales ? pages_at<float>(*key_scales) : nullptr,
            value_scales ? pages_at<float>(*value_scales) : nullptr, keys.size(1), keys.size(2), keys.size(3) * each,
            values.size(3) * each, values.stride(2) * each, keys.size(0), type};
}

Ragged ragged_of(const Tensor& starts, const Tensor& positions, const Tensor& tables, int64_t rows) {
    require(starts.scalar_type() == ScalarType::Long && positions.scalar_type() == ScalarType::Int &&
                tables.scalar_type() == ScalarType::Int && tables.dim() == 2 && starts.numel() == tables.size(0) + 1,
            "sequences have starts in int64, positions and tables in int32");
    const int64_t* first = read<int64_t>(starts);
    bool rising = first[0] == 0 && first[tables.size(0)] == rows && positions.numel() == rows;
    for (int64_t sequence = 0; sequence < tables.size(0); ++sequence) rising &= first[sequence] <= first[sequence + 1];
    require(rising, failure("the sequences' starts do not fit %lld rows", (long long)rows));
    return {tables.size(0), first, read<int32_t>(positions), read<int32_t>(tables), tables.size(1)};
}

Tensor paged_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const MaybeTensor& key_scales,
                       const MaybeTensor& value_scales, const Tensor& starts, const Tensor& positions, const Tensor& tables,
                       const MaybeTensor& sinks, double scale, double softcap, int64_t window, int64_t threads) {
    const Pages pages = pages_of(keys, values, key_scales, value_scales);
    require(query.dim() == 3, "queries are (rows, heads, channels)");
    const int64_t rows = query.size(0), heads = query.size(1);
    require(rows == positions.numel() && query.size(2) == pages.key_width && heads % pages.kv_heads == 0,
            failure("queries (%lld, %lld, %lld) do not fit %lld rows over pages of %lld heads, %lld wide", (long long)rows,
                    (long long)heads, (long long)query.size(2), (long long)positions.numel(), (long long)pages.kv_heads,
                    (long long)pages.key_width));
    require(!sinks || (sinks->numel() == heads && sinks->scalar_type() == ScalarType::Float), "a sink for each head, in float32");
    const Ragged batch = ragged_of(starts, positions, tables, rows);
    const Scores scores{float(scale), float(softcap), window, read<float>(sinks)};
    const Tensor asked = contiguous(query, ScalarType::Float);
    const int64_t shape[] = {rows, heads, pages.value_width};
    const Tensor attended = torch::stable::empty({shape, 3}, ScalarType::Float);
    raise(bessemer_paged_attention(&pages, &scores, &batch, heads, read<float>(asked),
                                   static_cast<float*>(attended.mutable_data_ptr()), int32_t(threads)));
    return attended;
}

void write_pages(const Tensor& keys, const MaybeTensor& values, const MaybeTensor& key_scales, const MaybeTensor& value_scales,
                 const Tensor& starts, const Tensor& positions, const Tensor& tables, const Tensor& key, const MaybeTensor& value) {
    require(values.has_value() == value.has_value(), "values go into pages of values");
    const Pages pages = pages_of(keys, values ? *values : keys, key_scales, values ? value_scales : key_scales);
    const int64_t rows = positions.numel();
    require(key.numel() == rows * pages.kv_heads * pages.key_width, "the keys do not fit the pages");
    require(!value || value->numel() == rows * pages.kv_heads * pages.value_width, "the values do not fit the pages");
    const Ragged batch = ragged_of(starts, positions, tables, rows);
    const Tensor wide_key = contiguous(key, ScalarType::Float);
    const MaybeTensor wide_value = value ? MaybeTensor(contiguous(*value, ScalarType::Float)) : std::nullopt;
    raise(bessemer_write_pages(&pages, &batch, read<float>(wide_key), read<float>(wide_value)));
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets, double z_loss, bool wants_gradient,
                                         int64_t threads) {
    require(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::BFloat16,
            "logits are (tokens, vocabulary) in bfloat16, in order");
    const int64_t rows = logits.size(0);
    require(targets.numel() == rows, "a target for each token");
    const Tensor ids = contiguous(targets, ScalarType::Long);
    const Tensor log_sums = torch::stable::empty({&rows, 1}, ScalarType::Float);
    const Tensor log_odds = torch::stable::empty({&rows, 1}, ScalarType::Float);
    const CrossEntropy given{static_cast<uint16_t*>(logits.mutable_data_ptr()), read<int64_t>(ids),
                             static_cast<float*>(log_sums.mutable_data_ptr()), static_cast<float*>(log_odds.mutable_data_ptr()),
                             rows, logits.size(1), float(z_loss), wants_gradient};
    raise(bessemer_cross_entropy(&given, int32_t(threads)));
    return {log_sums, log_odds};
}

// An uninitialised float32 tensor of the same shape.
Tensor like(const Tensor& given) {
    constexpr int64_t MOST_DIMENSIONS = 16;
    require(given.dim() <= MOST_DIMENSIONS, "tensors have at most 16 dimensions");
    int64_t shape[MOST_DIMENSIONS];
    for (int64_t i = 0; i < given.dim(); ++i) shape[i] = given.size(i);
    return torch::stable::empty({shape, size_t(given.dim())}, ScalarType::Float);
}

Tensor normed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double eps, bool centres, int64_t threads) {
    const int64_t width = weight.numel();
    require(x.dim() > 0 && x.size(x.dim() - 1) == width && width > 0, "the rows are not as wide as the norm's weight");
    require(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float, "rows and weight are in float32");
    require(!bias || (bias->numel() == width && bias->scalar_type() == ScalarType::Float), "the bias is not that of the norm");
    const Tensor values = contiguous(x, ScalarType::Float), scale = contiguous(weight, ScalarType::Float), out = like(values);
    const Norm norm{read<float>(scale), read<float>(bias), float(eps), centres ? LAYER_NORM : RMS_NORM};
    norm_rows(norm, read<float>(values), values.numel() / width, width, static_cast<float*>(out.mutable_data_ptr()), int(threads));
    return out;
}

// heads (rows, heads, channels) are turned in place.
void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& signed_sines, bool interleaved, int64_t threads) {
    require(heads.dim() == 3 && heads.is_contiguous() && heads.scalar_type() == ScalarType::Float, "heads are (rows, heads, channels)");
    require(cosines.dim() == 2 && cosines.is_contiguous() && signed_sines.is_contiguous() &&
                cosines.scalar_type() == ScalarType::Float && signed_sines.scalar_type() == ScalarType::Float,
            "cosines and sines are (rows, channels) in float32, in order");
    const int64_t rows = heads.size(0), width = cosines.size(1);
    require(cosines.size(0) == rows && signed_sines.size(0) == rows && signed_sines.size(1) == width && width % 2 == 0 &&
                width <= heads.size(2),
            "the rotations do not fit the heads");
    const Rotation rotation{read<float>(cosines), read<float>(signed_sines), width, rows, interleaved};
    rotate_rows(rotation, rows, heads.size(1), heads.size(2), static_cast<float*>(heads.mutable_data_ptr()), int(threads));
}

Tensor pointwise(const Tensor& x, int64_t function, int64_t threads) {
    require(function >= SILU && function <= SIGMOID && x.scalar_type() == ScalarType::Float, "a known function of float32 numbers");
    const Tensor values = contiguous(x, ScalarType::Float), out = like(values);
    apply_pointwise(int32_t(function), read<float>(values), values.numel(), static_cast<float*>(out.mutable_data_ptr()), int(threads));
    return out;
}

Tensor log_probs(const Tensor& logits, const Tensor& targets, double temperature, int64_t threads) {
    require(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && targets.numel() == logits.size(0) && temperature > 0,
            "logits are (rows, vocabulary) in float32, with a target for each row and a positive temperature");
    const Tensor values = contiguous(logits, ScalarType::Float), ids = contiguous(targets, ScalarType::Long);
    const int64_t rows = logits.size(0), vocabulary = logits.size(1);
    for (int64_t row = 0; row < rows; ++row)
        require(read<int64_t>(ids)[row] >= 0 && read<int64_t>(ids)[row] < vocabulary, "a target is none of the vocabulary");
    const Tensor out = torch::stable::empty({&rows, 1}, ScalarType::Float);
    target_log_probs(read<float>(values), rows, vocabulary, float(temperature), read<int64_t>(ids),
                     static_cast<float*>(out.mutable_data_ptr()), int(threads));
    return out;
}

std::unique_ptr<torch::stable::detail::StableLibrary> operators;

}  // namespace
}  // namespace bessemer

// Whether this library computes the operators; one library at a time does.
extern "C" void bessemer_operators(int32_t computes) {
    using namespace bessemer;
    operators.reset();
    if (!computes) return;
    using Library = torch::stable::detail::StableLibrary;
    operators = std::make_unique<Library>(Library::Kind::IMPL, "bessemer", "CPU", __FILE__, __LINE__);
    operators->impl("packed_linear", TORCH_BOX(&packed_linear));
    operators->impl("paged_attention", TORCH_BOX(&paged_attention));
    operators->impl("write_pages", TORCH_BOX(&write_pages));
    operators->impl("cross_entropy_", TORCH_BOX(&cross_entropy));
    operators->impl("norm_rows", TORCH_BOX(&normed));
    operators->impl("rotate_rows_", TORCH_BOX(&rotate));
    operators->impl("pointwise", TORCH_BOX(&pointwise));
    operators->impl("target_log_probs", TORCH_BOX(&log_probs));
}

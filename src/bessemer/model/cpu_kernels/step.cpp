#include "step.h"

#include <algorithm>
#include <numeric>

#include "draw.h"
#include "guards.h"
#include "parts.h"
#include "row_operations.h"

namespace bessemer {
namespace {

constexpr int64_t SOME_ROWS = 32;            // rows that one thread takes through a whole layer
constexpr int64_t SMALL = 4096;              // numbers that one thread goes over sooner than two have agreed to share them
constexpr int64_t PART_BYTES = 131072;       // weights that a thread takes at once: what it fetched beyond them is for nothing
constexpr int64_t LEAST_PARTS = 4, MOST_PARTS = 64;  // of a matrix, for each thread

int64_t bytes(const Matrix& matrix) {
    const int64_t bits = matrix.kind == F32 ? 32 : matrix.kind == BF16 || matrix.kind == F16 ? 16 : bits_of(matrix.kind);
    return matrix.n * matrix.k * bits / 8;
}

std::vector<Slice> sliced(const Projection& projection, int threads) {
    std::vector<Slice> slices;
    int64_t all = 0, offset = 0;
    for (int64_t i = 0; i < projection.count; ++i) all += bytes(*projection.matrices[i]);
    const int64_t parts = std::min(std::max(all / PART_BYTES, LEAST_PARTS * threads), MOST_PARTS * threads);
    for (int64_t i = 0; i < projection.count; ++i) {
        const Matrix& matrix = *projection.matrices[i];
        // products take two blocks of outputs at a time, and may write the second one too
        const int64_t pairs = (blocks(matrix.n) + 1) / 2, most = parts * bytes(matrix) / std::max<int64_t>(all, 1);
        const int64_t own = std::max<int64_t>(1, std::min(pairs, most));
        for (int64_t part = 0; part < own; ++part)
            slices.push_back({&matrix, pairs * part / own * 2 * WIDTH, std::min(pairs * (part + 1) / own * 2 * WIDTH, matrix.n), offset});
        offset += matrix.n;
    }
    return slices;
}

void multiply_all(const Projection& projection, const Inputs& inputs, float* out, int64_t stride) {
    for (int64_t i = 0, offset = 0; i < projection.count; offset += projection.matrices[i++]->n) {
        const Matrix& matrix = *projection.matrices[i];
        multiply(matrix, inputs.of(matrix), out + offset, stride, 0, matrix.n);
    }
}

}  // namespace

void Inputs::begin(const Projection& projection, int64_t rows, int64_t codes_each, const float* values, int64_t stride) {
    for (int64_t i = 0; i < projection.count; ++i) {
        const Matrix& matrix = *projection.matrices[i];
        char* memory = memory_[form(matrix)].room<char>(rows_bytes(matrix.kind, rows, matrix.k, codes_each));
        rows_[form(matrix)] = rows_in(matrix.kind, rows, matrix.k, codes_each, values, stride, memory);
    }
}

void Inputs::prepare(const Projection& projection, int64_t first, int64_t last) {
    bool done[3] = {};
    for (int64_t i = 0; i < projection.count; ++i) {
        const Matrix& matrix = *projection.matrices[i];
        if (!done[form(matrix)]) prepare_rows(matrix, rows_[form(matrix)], first, last);
        done[form(matrix)] = true;
    }
}

Step::Step(const Model& model, int threads)
    : model_(model), threads_(threads), query_width_(model.heads * model.head_width),
      key_width_(model.kv_heads * model.head_width), row_width_(query_width_ + 2 * key_width_) {
    for (int64_t index = 0; index < model.layers; ++index) {
        const Layer& layer = model.layer[index];
        if (layer.rotation.cosines) positions_ = std::min(positions_, layer.rotation.positions);
        slices_.push_back({sliced(layer.query_key_value, threads), sliced(layer.output, threads),
                           sliced(layer.inner.only(0), threads), sliced(layer.down, threads)});
    }
    head_slices_ = sliced(model.head, threads);
}

// Calls work(first, last) for all rows of the batch; on several threads where that pays.
template <class Work>
void Step::each_row(int64_t width, Work&& work) {
    const int64_t rows = batch_.rows, parts = rows * width < SMALL ? 1 : std::min<int64_t>(rows, 4 * threads_);
    run_parts(threads_, parts, [&](int64_t part) { work(rows * part / parts, rows * (part + 1) / parts); });
}

Ragged Step::ragged(const Layer& layer, const Batch& batch) {
    return {batch.sequences, batch.starts, batch.positions, batch.tables[layer.group], batch.table_widths[layer.group]};
}

const char* Step::refusal(const Batch& batch) const {
    for (int64_t row = 0; row < batch.rows; ++row)
        if (batch.tokens[row] < 0 || batch.tokens[row] >= model_.vocabulary)
            return failure("token %d is none of the model's %lld", int(batch.tokens[row]), (long long)model_.vocabulary);
    for (int64_t i = 0; i < batch.wanted; ++i)
        if (batch.wanted_rows[i] < 0 || batch.wanted_rows[i] >= batch.rows)
            return failure("row %lld is none of %lld", (long long)batch.wanted_rows[i], (long long)batch.rows);
    if (batch.kept_begins)
        for (int64_t i = 0; i < batch.kept_begins[model_.layers + 1]; ++i)
            if (batch.kept_rows[i] < 0 || batch.kept_rows[i] >= batch.rows)
                return failure("row %lld is none of %lld", (long long)batch.kept_rows[i], (long long)batch.rows);
    for (int64_t row = 0; row < batch.rows; ++row)
        if (batch.positions[row] >= positions_)
            return failure("position %d exceeds the model's %lld", int(batch.positions[row]), (long long)positions_);
    uint64_t checked = 0;  // groups of layers, each once
    for (int64_t index = 0; index < model_.layers; ++index) {
        const Layer& layer = model_.layer[index];
        if (checked >> layer.group & 1) continue;
        checked |= uint64_t(1) << layer.group;
        if (const char* wrong = misplaced(ragged(layer, batch), layer.pages, layer.scores.window)) return wrong;
    }
    return nullptr;
}

void Step::run(const Batch& batch) {
    batch_ = batch;
    hidden_.room<float>(batch.rows * model_.hidden);
    queries_.room<float>(batch.rows * row_width_);
    sequence_of_.resize(batch.rows);
    for (int64_t sequence = 0; sequence < batch.sequences; ++sequence)
        std::fill(sequence_of_.begin() + batch.starts[sequence], sequence_of_.begin() + batch.starts[sequence + 1], sequence);
    each_row(model_.hidden, [&](int64_t first, int64_t last) { embed(first, last); });
    if (batch.rows >= SOME_ROWS * threads_) by_rows();
    else by_outputs();
    if (batch.wanted) head();
}

const char* Step::generate(Batch batch, const Generation& generation) {
    if (batch.rows != batch.sequences)
        return failure("%lld rows are not one of each of %lld sequences", (long long)batch.rows, (long long)batch.sequences);
    const int64_t rows = batch.rows, vocabulary = model_.vocabulary, parts = std::min<int64_t>(rows, 4 * threads_);
    std::vector<int32_t> tokens(batch.tokens, batch.tokens + rows), positions(batch.positions, batch.positions + rows);
    std::vector<int64_t> wanted(rows);
    std::iota(wanted.begin(), wanted.end(), 0);
    float* logits = logits_.room<float>(rows * vocabulary);
    batch.tokens = tokens.data();
    batch.positions = positions.data();
    batch.wanted = rows;
    batch.wanted_rows = wanted.data();
    batch.logits = logits;
    batch.kept_begins = nullptr;
    for (int64_t step = 0; step < generation.steps; ++step) {
        if (const char* wrong = refusal(batch)) return wrong;
        run(batch);
        run_parts(threads_, parts, [&](int64_t part) {
            thread_local Scratch scratch;
            for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
                const int64_t place = row * generation.steps + step;
                const Drawn drawn = draw_row(logits + row * vocabulary, vocabulary, generation.temperatures[row],
                                             generation.uniforms[place], scratch);
                generation.tokens[place] = drawn.token;
                generation.log_probs[place] = drawn.log_prob;
                tokens[row] = std::max(0, drawn.token);
                ++positions[row];
            }
        });
    }
    return nullptr;
}

void Step::embed(int64_t first, int64_t last) {
    const int64_t width = model_.hidden;
    const Embedding& embedding = model_.embedding;
    for (int64_t row = first; row < last; ++row) {
        const int64_t token = batch_.tokens[row], start = token * width;
        float* hidden = hidden_.held<float>() + row * width;
        if (batch_.given && batch_.given[row]) {
            std::copy_n(batch_.given[row], width, hidden);
            continue;
        }
        switch (embedding.type) {
            case TABLE_PACKED: read_row(*static_cast<const Matrix*>(embedding.table), token, hidden); break;
            case TABLE_F32: std::copy_n(static_cast<const float*>(embedding.table) + start, width, hidden); break;
            case TABLE_F16:
                for (int64_t i = 0; i < width; ++i) hidden[i] = half_to_float(static_cast<const uint16_t*>(embedding.table)[start + i]);
                break;
            case TABLE_BF16:
                for (int64_t i = 0; i < width; ++i) hidden[i] = bfloat_to_float(static_cast<const uint16_t*>(embedding.table)[start + i]);
        }
        if (embedding.multiplier != 1.0f)
            for (int64_t i = 0; i < width; ++i) hidden[i] *= embedding.multiplier;
    }
}

// Norms queries and keys, turns them, and puts keys and values into the pages.
void Step::turn_and_store(const Layer& layer, int64_t first, int64_t last) {
    const int64_t width = model_.head_width;
    const Ragged batch = ragged(layer);
    for (int64_t row = first; row < last; ++row) {
        float* query = queries_.held<float>() + row * row_width_;
        float *key = query + query_width_, *value = key + key_width_;
        const int64_t position = batch.positions[row];
        if (model_.norm_whole_width) {
            norm_row(layer.query, query, query_width_, query);
            norm_row(layer.key, key, key_width_, key);
        }
        for (int64_t head = 0; head < model_.heads + model_.kv_heads; ++head) {
            float* place = query + head * width;  // keys follow the queries
            if (!model_.norm_whole_width) norm_row(head < model_.heads ? layer.query : layer.key, place, width, place);
            if (layer.rotation.cosines) rotate_head(layer.rotation, position, place);
        }
        const int32_t* table = batch.tables + sequence_of_[row] * batch.table_width;
        for (int64_t head = 0; head < model_.kv_heads; ++head)
            write_head(layer.pages, table, position, head, key + head * width, value + head * width);
    }
}

// Copies what the batch wants to keep of the rows first … last - 1 before a layer.
void Step::keep(int64_t layer, int64_t first, int64_t last) {
    if (!batch_.kept_begins) return;
    const int64_t width = model_.hidden;
    for (int64_t i = batch_.kept_begins[layer]; i < batch_.kept_begins[layer + 1]; ++i) {
        const int64_t row = batch_.kept_rows[i];
        if (row >= first && row < last) std::copy_n(hidden_.held<float>() + row * width, width, batch_.kept_states + i * width);
    }
}

void Step::by_rows() {
    const int64_t rows = batch_.rows, parts = (rows + SOME_ROWS * threads_ - 1) / (SOME_ROWS * threads_) * threads_;
    auto each = [&](auto&& work) {
        run_parts(threads_, parts, [&](int64_t part) {
            thread_local Room room;
            work(rows * part / parts, rows * (part + 1) / parts, room);
        });
    };
    each([&](int64_t first, int64_t last, Room& room) { rows_to_queries(0, first, last, room); });
    for (int64_t index = 0; index + 1 < model_.layers; ++index) {
        each([&](int64_t first, int64_t last, Room& room) {
            rows_from_queries(model_.layer[index], first, last, room);
            rows_to_queries(index + 1, first, last, room);
        });
    }
    each([&](int64_t first, int64_t last, Room& room) {  // what nobody asks for ends with its keys and values
        int64_t wanted_first = last, wanted_last = first;
        auto want = [&](int64_t row) {
            if (row < first || row >= last) return;
            wanted_first = std::min(wanted_first, row);
            wanted_last = std::max(wanted_last, row + 1);
        };
        const int64_t layers = model_.layers;
        for (int64_t i = 0; i < batch_.wanted; ++i) want(batch_.wanted_rows[i]);
        if (batch_.kept_begins)
            for (int64_t i = batch_.kept_begins[layers]; i < batch_.kept_begins[layers + 1]; ++i) want(batch_.kept_rows[i]);
        if (wanted_first >= wanted_last) return;
        rows_from_queries(model_.layer[layers - 1], wanted_first, wanted_last, room);
        keep(layers, wanted_first, wanted_last);
    });
}

void Step::rows_to_queries(int64_t index, int64_t first, int64_t last, Room& room) {
    keep(index, first, last);
    const Layer& layer = model_.layer[index];
    const int64_t width = model_.hidden, count = last - first;
    const float* hidden = hidden_.held<float>() + first * width;
    float* normed = room.normed.room<float>(count * width);
    for (int64_t row = 0; row < count; ++row) norm_row(layer.before_attention, hidden + row * width, width, normed + row * width);
    room.inputs.begin(layer.query_key_value, count, model_.codes_each, normed, width);
    room.inputs.prepare(layer.query_key_value, 0, count);
    multiply_all(layer.query_key_value, room.inputs, queries_.held<float>() + first * row_width_, row_width_);
    turn_and_store(layer, first, last);
}

void Step::rows_from_queries(const Layer& layer, int64_t first, int64_t last, Room& room) {
    const int64_t width = model_.hidden, inner = model_.inner, count = last - first;
    float* hidden = hidden_.held<float>() + first * width;
    float* attended = room.attended.room<float>(count * query_width_);
    room.tiles.clear();
    add_tiles(ragged(layer), first, last, model_.heads, layer.pages, layer.scores, room.tiles);
    for (const Tile& tile : room.tiles)
        attend(layer.pages, layer.scores, ragged(layer), tile, queries_.held<float>(), row_width_,
               attended - first * query_width_, query_width_, room.tile);

    auto prepare = [&](const Projection& projection, const float* values, int64_t values_width) {
        room.inputs.begin(projection, count, model_.codes_each, values, values_width);
        room.inputs.prepare(projection, 0, count);
    };
    float* projected = room.projected.room<float>(count * width);
    auto add = [&](const Norm& norm) {
        for (int64_t row = 0; row < count; ++row) {
            norm_row(norm, projected + row * width, width, projected + row * width);
            add_row(hidden + row * width, projected + row * width, width, model_.residual_multiplier);
        }
    };
    prepare(layer.output, attended, query_width_);
    multiply_all(layer.output, room.inputs, projected, width);
    add(layer.after_attention);

    float* normed = room.normed.room<float>(count * width);
    for (int64_t row = 0; row < count; ++row) norm_row(layer.before_feed_forward, hidden + row * width, width, normed + row * width);
    float* up = room.up.room<float>(count * inner);
    float* gate = layer.inner.count > 1 ? room.gate.room<float>(count * inner) : nullptr;
    prepare(layer.inner, normed, width);
    multiply_all(layer.inner.only(0), room.inputs, up, inner);
    if (gate) multiply_all(layer.inner.only(1), room.inputs, gate, inner);
    for (int64_t row = 0; row < count; ++row)
        activate_row(model_.activation, gate ? gate + row * inner : nullptr, up + row * inner, inner);
    prepare(layer.down, gate ? gate : up, inner);
    multiply_all(layer.down, room.inputs, projected, width);
    add(layer.after_feed_forward);
}

void Step::multiply_slices(const std::vector<Slice>& slices, float* out, int64_t stride) {
    run_parts(threads_, int64_t(slices.size()), [&](int64_t part) {
        const Slice& slice = slices[part];
        multiply(*slice.matrix, room_.inputs.of(*slice.matrix), out + slice.offset, stride, slice.first, slice.last);
    });
}

// Adds what the last matrix gave to the residual stream, and prepares the rows for the next.
void Step::enter(const Norm& after, const Norm& before, const Projection& next) {
    const int64_t width = model_.hidden;
    float *hidden = hidden_.held<float>(), *projected = room_.projected.room<float>(batch_.rows * width);
    float* normed = room_.normed.room<float>(batch_.rows * width);
    room_.inputs.begin(next, batch_.rows, model_.codes_each, normed, width);
    each_row(width, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            norm_row(after, projected + row * width, width, projected + row * width);
            add_row(hidden + row * width, projected + row * width, width, model_.residual_multiplier);
            norm_row(before, hidden + row * width, width, normed + row * width);
        }
        room_.inputs.prepare(next, first, last);
    });
}

void Step::by_outputs() {
    const int64_t rows = batch_.rows, width = model_.hidden, inner = model_.inner;
    float *queries = queries_.held<float>(), *attended = room_.attended.room<float>(rows * query_width_);
    float *projected = room_.projected.room<float>(rows * width), *up = room_.up.room<float>(rows * inner);
    std::fill(projected, projected + rows * width, 0.0f);  // nothing lies before the first layer
    tiles_.clear();
    const Norm none{nullptr, nullptr, 0.0f, NO_NORM};
    auto prepare = [&](const Projection& projection, const float* values, int64_t values_width) {
        room_.inputs.begin(projection, rows, model_.codes_each, values, values_width);
        each_row(values_width, [&](int64_t first, int64_t last) { room_.inputs.prepare(projection, first, last); });
    };
    for (int64_t index = 0; index < model_.layers; ++index) {
        const Layer& layer = model_.layer[index];
        const Slices& slices = slices_[index];
        enter(index ? model_.layer[index - 1].after_feed_forward : none, layer.before_attention, layer.query_key_value);
        keep(index, 0, rows);
        multiply_slices(slices.query_key_value, queries, row_width_);
        each_row(row_width_, [&](int64_t first, int64_t last) { turn_and_store(layer, first, last); });
        if (int64_t(tiles_.size()) <= layer.group) tiles_.resize(layer.group + 1);
        std::vector<Tile>& tiles = tiles_[layer.group];
        if (tiles.empty()) add_tiles(ragged(layer), 0, rows, model_.heads, layer.pages, layer.scores, tiles);
        attention_.run(layer.pages, layer.scores, ragged(layer), tiles, queries, row_width_, attended, query_width_, threads_);
        prepare(layer.output, attended, query_width_);
        multiply_slices(slices.output, projected, width);
        enter(layer.after_attention, layer.before_feed_forward, layer.inner);
        float* gate = layer.inner.count > 1 ? room_.gate.room<float>(rows * inner) : nullptr;
        run_parts(threads_, int64_t(slices.inner.size()), [&](int64_t part) {
            const Slice& slice = slices.inner[part];
            multiply(*slice.matrix, room_.inputs.of(*slice.matrix), up, inner, slice.first, slice.last);
            if (gate) {
                const Matrix& matrix = *layer.inner.matrices[1];
                multiply(matrix, room_.inputs.of(matrix), gate, inner, slice.first, slice.last);
            }
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t start = row * inner + slice.first;
                activate_row(model_.activation, gate ? gate + start : nullptr, up + start, slice.last - slice.first);
            }
        });
        prepare(layer.down, gate ? gate : up, inner);
        multiply_slices(slices.down, projected, width);
    }
    const Norm& after = model_.layer[model_.layers - 1].after_feed_forward;
    float* hidden = hidden_.held<float>();
    each_row(width, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            norm_row(after, projected + row * width, width, projected + row * width);
            add_row(hidden + row * width, projected + row * width, width, model_.residual_multiplier);
        }
    });
    keep(model_.layers, 0, rows);
}

void Step::head() {
    const int64_t width = model_.hidden, vocabulary = model_.vocabulary, count = batch_.wanted;
    float* normed = room_.normed.room<float>(count * width);
    for (int64_t row = 0; row < count; ++row)
        norm_row(model_.last, hidden_.held<float>() + batch_.wanted_rows[row] * width, width, normed + row * width);
    room_.inputs.begin(model_.head, count, model_.codes_each, normed, width);
    room_.inputs.prepare(model_.head, 0, count);
    run_parts(threads_, int64_t(head_slices_.size()), [&](int64_t part) {
        const Slice& slice = head_slices_[part];
        float* out = batch_.logits + slice.offset;
        multiply(*slice.matrix, room_.inputs.of(*slice.matrix), out, vocabulary, slice.first, slice.last);
        if (model_.logit_softcap == 0.0f) return;
        const Floats cap = broadcast(model_.logit_softcap);
        for (int64_t row = 0; row < count; ++row)
            each_lanes(slice.last - slice.first, [&](int64_t channel, int64_t lanes) {
                float* place = out + row * vocabulary + slice.first + channel;
                store_floats(place, cap * hyperbolic_tangent(load_floats(place, lanes) / cap), lanes);
            });
    });
}

}  // namespace bessemer

using namespace bessemer;

Step* bessemer_step_new(const Model* model, int32_t threads) { return new Step(*model, threads); }

void bessemer_step_free(Step* step) { delete step; }

const char* bessemer_step_run(Step* step, const Batch* batch) {
    return guarded([&]() -> const char* {
        if (const char* wrong = step->refusal(*batch)) return wrong;
        step->run(*batch);
        return nullptr;
    });
}

const char* bessemer_step_generate(Step* step, const Batch* batch, const Generation* generation) {
    return guarded([&]() -> const char* { return step->generate(*batch, *generation); });
}

void bessemer_step_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Model);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Batch);
    sizes[3] = sizeof(Generation);
}

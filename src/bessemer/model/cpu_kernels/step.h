// One step of the engine: new tokens of several sequences through a whole decoder. See docs/step.md.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "matrices.h"

namespace bessemer {

// The structs of this file are filled in by plain_decoder.py, which mirrors them.

enum NormKind : int32_t { NO_NORM = 0, RMS_NORM = 1, LAYER_NORM = 2 };
struct Norm {
    const float* weight;  // an offset already added
    const float* bias;    // of a LayerNorm
    float eps;
    NormKind kind;
};

// Matrices of one input whose outputs lie one after the other.
struct Projection {
    const Matrix* matrices[3];
    int64_t count;

    Projection only(int64_t index) const { return {{matrices[index]}, 1}; }
    int64_t outputs() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += matrices[i]->n;
        return sum;
    }
};

enum TableType : int32_t { TABLE_F32 = 0, TABLE_F16 = 1, TABLE_BF16 = 2, TABLE_PACKED = 3 };
struct Embedding {
    const void* table;  // [vocabulary][hidden]; or a Matrix that the head shares
    TableType type;
    float multiplier;
};

// How positions turn queries and keys: rows of a table for each position, its width the channels that are turned.
struct Rotation {
    const float *cosines, *signed_sines;  // null: none
    int64_t width, positions;
    int64_t interleaved;  // a pair is channels 2i and 2i + 1; else i and i + width / 2
};

struct Layer {
    Norm before_attention, after_attention, before_feed_forward, after_feed_forward, query, key;
    Projection query_key_value, output, inner, down;  // inner: up, and gate where there is one; of as many outputs
    Rotation rotation;
    Scores scores;
    Pages pages;
    int64_t group;  // of the block tables
};

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_width, inner, vocabulary;
    const Layer* layer;
    Embedding embedding;
    Norm last;
    Projection head;
    float residual_multiplier;  // on what attention and feed-forward add to the residual stream
    float logit_softcap;  // 0: none
    Activation activation;
    int32_t norm_whole_width;  // norms of queries and keys are over all heads, not over each
    int32_t codes_each;        // of an activation that meets codes: 1, or 2 for 16 bits (Rows)
};

struct Batch {
    int64_t rows, sequences;
    const int32_t *tokens, *positions;
    const int64_t* starts;
    const int32_t* const* tables;  // of each group of layers
    const int64_t* table_widths;
    int64_t wanted;
    const int64_t* wanted_rows;
    float* logits;  // [wanted][vocabulary]
    // Copies of the residual stream before layer i (i = layers: after the last) of the rows kept_rows[kept_begins[i] …
    // kept_begins[i + 1] - 1], one below the other; null: none.
    const int64_t *kept_begins, *kept_rows;
    float* kept_states;  // [kept][hidden]
    // Of each row, the vector that takes the place of its token's embedding (a picture's), or null; null: of none.
    const float* const* given;
};

// Several tokens of every row of a batch, each drawn from the logits after the one before. See draw.h.
struct Generation {
    int64_t steps;
    const float* temperatures;  // [rows]
    const double* uniforms;     // [rows][steps]
    int32_t* tokens;            // [rows][steps]; behind a -1 they mean nothing
    float* log_probs;           // [rows][steps]
};

// Rows of one input, in every form that the matrices which read it need.
class Inputs {
public:
    void begin(const Projection& projection, int64_t rows, int64_t codes_each, const float* values, int64_t stride);
    void prepare(const Projection& projection, int64_t first, int64_t last);
    const Rows& of(const Matrix& matrix) const { return rows_[form(matrix)]; }

private:
    static int form(const Matrix& matrix) { return matrix.kind == F32 ? 0 : is_coded(matrix.kind) ? 2 : 1; }
    Rows rows_[3];
    Scratch memory_[3];
};

// Outputs of one matrix of a projection that one thread computes: first … last - 1, `offset` among the projection's.
struct Slice {
    const Matrix* matrix;
    int64_t first, last, offset;
};

class Step {
public:
    Step(const Model& model, int threads);
    void run(const Batch& batch);
    // Why a batch cannot be computed, null when it can: a token, a position or a page that is not there.
    const char* refusal(const Batch& batch) const;
    // A batch of one token of each sequence, as far as its pages reach; what it wants is not looked at. As refusal where it cannot.
    const char* generate(Batch batch, const Generation& generation);

private:
    // Memory for some rows between the matrices.
    struct Room {
        Scratch normed, attended, projected, gate, up;
        Inputs inputs;
        TileMemory tile;
        std::vector<Tile> tiles;
    };
    struct Slices {
        std::vector<Slice> query_key_value, output, inner, down;
    };

    // Many rows: each thread takes some of them through everything between two attentions.
    void by_rows();
    void rows_to_queries(int64_t index, int64_t first, int64_t last, Room& room);
    void rows_from_queries(const Layer& layer, int64_t first, int64_t last, Room& room);
    // Few rows: each thread takes some outputs of every matrix.
    void by_outputs();
    void enter(const Norm& after, const Norm& before, const Projection& next);
    void multiply_slices(const std::vector<Slice>& slices, float* out, int64_t stride);
    void head();

    void embed(int64_t first, int64_t last);
    void keep(int64_t layer, int64_t first, int64_t last);
    void turn_and_store(const Layer& layer, int64_t first, int64_t last);
    template <class Work>
    void each_row(int64_t width, Work&& work);
    Ragged ragged(const Layer& layer) const { return ragged(layer, batch_); }
    static Ragged ragged(const Layer& layer, const Batch& batch);

    const Model model_;
    const int threads_;
    const int64_t query_width_, key_width_, row_width_;  // of all query heads, of all key heads, of both and the values
    int64_t positions_ = INT64_MAX;  // that every table of rotations has
    std::vector<Slices> slices_;
    std::vector<Slice> head_slices_;
    Batch batch_;
    std::vector<int32_t> sequence_of_;  // each row's
    std::vector<std::vector<Tile>> tiles_;  // of each group of layers
    Scratch hidden_, queries_, logits_;
    Room room_;
    Attention attention_;
};

}  // namespace bessemer

extern "C" {
bessemer::Step* bessemer_step_new(const bessemer::Model* model, int32_t threads);
void bessemer_step_free(bessemer::Step* step);
// Returns a failure as guards.h says.
const char* bessemer_step_run(bessemer::Step* step, const bessemer::Batch* batch);
const char* bessemer_step_generate(bessemer::Step* step, const bessemer::Batch* batch, const bessemer::Generation* generation);
// Sizes of Model, Layer, Batch and Generation, to check that Python's mirrors are the same.
void bessemer_step_sizes(int64_t* sizes);
}

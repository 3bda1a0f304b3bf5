// Attention over keys and values that lie in pages. See docs/step.md.
//
// A query's keys are taken in tiles of 16 and segments of 256 positions, counted from the beginning of its sequence. A segment
// has a softmax of its own, and segments are joined in their order. So what a query gets does not depend on the size of the
// blocks, on the queries computed beside it, or on who computes which segment.
#pragma once
#include <cstdint>
#include <vector>

#include "floats.h"

namespace bessemer {

// I4: two codes to a byte, the even channel low, of heads whose channels are mixed (mix_channels), so that no channel is much
// larger than the others.
enum PageType : int32_t { PAGE_F32 = 0, PAGE_F16 = 1, PAGE_BF16 = 2, PAGE_I8 = 3, PAGE_I4 = 4 };
constexpr bool has_scales(PageType type) { return type == PAGE_I8 || type == PAGE_I4; }

// One layer's keys and values, each [blocks][kv_heads][block_size][width]; mirrored by PagesFields in attention.py.
struct Pages {
    void* keys;
    void* values;  // latent attention: the keys again, whose first value_width channels are the value
    float* key_scales;  // I8 and I4: [blocks][kv_heads][block_size], as the values'
    float* value_scales;
    int64_t kv_heads, block_size, key_width, value_width;
    int64_t value_stride;  // from one token's value to the next one's, in numbers
    int64_t blocks;
    PageType type;
};

// What is done to scores before the softmax.
struct Scores {
    float scale;
    float softcap;       // 0: none
    int64_t window;      // tokens that a query sees, its own included; 0: all
    const float* sinks;  // a score for each head that takes part in the softmax's sum; null: none
};

// New tokens of several sequences, one sequence after the other.
struct Ragged {
    int64_t sequences;
    const int64_t* starts;     // sequences + 1: rows of sequence s are starts[s] … starts[s + 1] - 1
    const int32_t* positions;  // of each row, counted from the beginning of its sequence
    const int32_t* tables;     // block numbers of sequence s begin at tables + s * table_width
    int64_t table_width;
};


// A key and value head of one token into the page at its position; value null where it is part of the key.
void write_head(const Pages& pages, const int32_t* table, int64_t position, int64_t head, const float* key, const float* value);

// Some rows of one sequence and some heads that share a key and value head: what is computed at once.
struct Tile {
    int64_t sequence, row_first, row_last, kv_head, head_first, head_last;
    int64_t segment_first, segment_last;  // that some row sees

    int64_t heads() const { return head_last - head_first; }
    int64_t lines() const { return (row_last - row_first) * heads(); }
};

// Tiles of all rows and heads, rows row_first … row_last - 1 of the batch only.
void add_tiles(const Ragged& batch, int64_t row_first, int64_t row_last, int64_t heads, const Pages& pages, const Scores& scores,
               std::vector<Tile>& tiles);

// Memory of one thread.
struct TileMemory {
    Scratch queries, positions, keys, values, scores, sums;
};

// queries: row r's at queries + r * query_stride, [heads][key_width]; the result at out + r * out_stride, [heads][value_width].
void attend(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, const float* queries,
            int64_t query_stride, float* out, int64_t out_stride, TileMemory& memory);

// The same in two parts: segments first … last - 1 of a tile, each a softmax of its own of segment_floats numbers; and all
// segments of the tile, one after the other in `partials`, to its result.
int64_t segment_floats(const Pages& pages, const Tile& tile);
void attend_segments(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, int64_t first, int64_t last,
                     const float* queries, int64_t query_stride, float* partials, TileMemory& memory);
void join_segments(const Pages& pages, const Scores& scores, const Tile& tile, float* partials, float* out, int64_t out_stride,
                   TileMemory& memory);

// Attention of all tiles on several threads, with long ones cut where that keeps the threads equally busy.
class Attention {
public:
    void run(const Pages& pages, const Scores& scores, const Ragged& batch, const std::vector<Tile>& tiles, const float* queries,
             int64_t query_stride, float* out, int64_t out_stride, int threads);

private:
    struct Piece {
        int64_t tile, first, last, place;  // of its first segment in the partial sums; -1: the whole tile
    };
    std::vector<Piece> pieces_;
    std::vector<int64_t> cut_, places_;  // tiles in pieces, and where their partial sums lie
    Scratch partials_;
};

}  // namespace bessemer

extern "C" {
// Both return a failure as guards.h says. queries (rows, heads, key_width), out (rows, heads, value_width).
const char* bessemer_paged_attention(const bessemer::Pages* pages, const bessemer::Scores* scores, const bessemer::Ragged* batch,
                                     int64_t heads, const float* queries, float* out, int32_t threads);
// keys (rows, kv_heads, key_width), values (rows, kv_heads, value_width) or null.
const char* bessemer_write_pages(const bessemer::Pages* pages, const bessemer::Ragged* batch, const float* keys, const float* values);
}

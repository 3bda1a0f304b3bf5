// Attention on several threads, and as an operation of its own.
#include <algorithm>

#include "attention.h"
#include "guards.h"
#include "parts.h"

namespace bessemer {

void Attention::run(const Pages& pages, const Scores& scores, const Ragged& batch, const std::vector<Tile>& tiles,
                    const float* queries, int64_t query_stride, float* out, int64_t out_stride, int threads) {
    int64_t work = 0, room = 0;
    for (const Tile& tile : tiles) work += tile.lines() * (tile.segment_last - tile.segment_first);
    const int64_t most = threads == 1 ? work : std::max<int64_t>(1, work / (4 * threads));
    pieces_.clear();
    cut_.clear();
    places_.clear();

    for (int64_t index = 0; index < int64_t(tiles.size()); ++index) {
        const Tile& tile = tiles[index];
        const int64_t segments = tile.segment_last - tile.segment_first, step = std::max<int64_t>(1, most / tile.lines());
        if (segments <= step) {
            pieces_.push_back({index, tile.segment_first, tile.segment_last, -1});
            continue;
        }
        cut_.push_back(index);
        places_.push_back(room);
        for (int64_t first = tile.segment_first; first < tile.segment_last; first += step) {
            const int64_t last = std::min(first + step, tile.segment_last);
            pieces_.push_back({index, first, last, room});
            room += (last - first) * segment_floats(pages, tile);
        }
    }
    float* partials = partials_.room<float>(room);
    run_parts(threads, int64_t(pieces_.size()), [&](int64_t part) {
        thread_local TileMemory memory;
        const Piece& piece = pieces_[part];
        const Tile& tile = tiles[piece.tile];
        if (piece.place < 0) attend(pages, scores, batch, tile, queries, query_stride, out, out_stride, memory);
        else attend_segments(pages, scores, batch, tile, piece.first, piece.last, queries, query_stride, partials + piece.place, memory);
    });
    run_parts(threads, int64_t(cut_.size()), [&](int64_t part) {
        thread_local TileMemory memory;
        join_segments(pages, scores, tiles[cut_[part]], partials + places_[part], out, out_stride, memory);
    });
}

}  // namespace bessemer

using namespace bessemer;

const char* bessemer_paged_attention(const Pages* pages, const Scores* scores, const Ragged* batch, int64_t heads,
                                     const float* queries, float* out, int32_t threads) {
    return guarded([&]() -> const char* {
        if (const char* wrong = misplaced(*batch, *pages, scores->window)) return wrong;
        std::vector<Tile> tiles;
        add_tiles(*batch, 0, batch->starts[batch->sequences], heads, *pages, *scores, tiles);
        thread_local Attention attention;
        attention.run(*pages, *scores, *batch, tiles, queries, heads * pages->key_width, out, heads * pages->value_width, threads);
        return nullptr;
    });
}

const char* bessemer_write_pages(const Pages* pages, const Ragged* batch, const float* keys, const float* values) {
    return guarded([&]() -> const char* {
        if (const char* wrong = misplaced(*batch, *pages, 1)) return wrong;  // a row is written where it lies alone
        for (int64_t sequence = 0; sequence < batch->sequences; ++sequence) {
            const int32_t* table = batch->tables + sequence * batch->table_width;
            for (int64_t row = batch->starts[sequence]; row < batch->starts[sequence + 1]; ++row)
                for (int64_t head = 0; head < pages->kv_heads; ++head) {
                    const int64_t place = row * pages->kv_heads + head;
                    write_head(*pages, table, batch->positions[row], head, keys + place * pages->key_width,
                               values ? values + place * pages->value_width : nullptr);
                }
        }
        return nullptr;
    });
}

#include "attention.h"

#include <algorithm>
#include <cmath>

namespace bessemer {
namespace {

constexpr int64_t SEGMENT = 128;    // keys with a softmax of their own
constexpr int64_t MOST_LINES = 48;  // queries of rows and heads that share the keys once they are widened
constexpr int64_t CHUNK = 64;       // channels whose sums stay in registers, of 4 lines

// What has been seen so far of a softmax: the largest score m, the sum of exp(score - m), and the sum of exp(score - m) · value.
struct Sums {
    float *largest, *total, *weighted;
    int64_t width;

    static int64_t floats(int64_t lines, int64_t width) { return lines * (width + 2); }
    Sums(float* memory, int64_t lines, int64_t width)
        : largest(memory + lines * width), total(memory + lines * (width + 1)), weighted(memory), width(width) {}
    float* line(int64_t line) const { return weighted + line * width; }
};

// Fields of a tile that every segment of it needs.
struct Task {
    const Pages& pages;
    const Scores& scores;
    const int32_t* table;
    int64_t kv_head, lines, heads;
    int64_t key_lanes, value_lanes;  // widths in memory, whole registers
    const int32_t* positions;        // of the rows
    const float* queries;            // [lines][key_lanes], scaled
    float *keys, *values, *weights;  // 16 keys and values, [lines][SEGMENT]

    int64_t place(int64_t line) const { return positions[line / heads]; }
    int64_t lowest(int64_t line) const { return scores.window ? std::max<int64_t>(0, place(line) - scores.window + 1) : 0; }
    int64_t slot(int64_t position) const {
        const int64_t block = table[position / pages.block_size];
        return (block * pages.kv_heads + kv_head) * pages.block_size + position % pages.block_size;
    }
};

template <PageType type>
struct Numbers;
template <>
struct Numbers<PAGE_F32> {
    using T = float;
    static Floats load(const T* p) { return load_floats(p); }
    static void store(T* p, Floats a) { store_floats(p, a); }
};
template <>
struct Numbers<PAGE_F16> {
    using T = uint16_t;
    static Floats load(const T* p) { return load_halves(p); }
    static void store(T* p, Floats a) { store_halves(p, a); }
};
template <>
struct Numbers<PAGE_BF16> {
    using T = uint16_t;
    static Floats load(const T* p) { return load_bfloats(p); }
    static void store(T* p, Floats a) { store_bfloats(p, a); }
};
template <>
struct Numbers<PAGE_I8> {
    using T = int8_t;
    static Floats load(const T* p) { return load_signed_bytes(p); }
    static void store(T* p, Floats a) { store_signed_bytes(p, a); }
};

// One row of a page as float32, filled up with zeros to whole registers.
template <PageType type>
inline void widen(const void* pages, int64_t offset, int64_t width, float* out) {
    using N = Numbers<type>;
    const typename N::T* from = static_cast<const typename N::T*>(pages) + offset;
    int64_t channel = 0;
    for (; channel + LANES <= width; channel += LANES) store_floats(out + channel, N::load(from + channel));
    if (channel < width) {
        typename N::T rest[LANES] = {};
        std::copy(from + channel, from + width, rest);
        store_floats(out + channel, N::load(rest));
    }
}

template <PageType type>
inline void narrow(const float* from, int64_t width, float factor, void* pages, int64_t offset) {
    using N = Numbers<type>;
    typename N::T* to = static_cast<typename N::T*>(pages) + offset;
    const Floats factors = broadcast(factor);
    int64_t channel = 0;
    for (; channel + LANES <= width; channel += LANES) N::store(to + channel, load_floats(from + channel) * factors);
    if (channel < width) {
        typename N::T rest[LANES];
        N::store(rest, load_floats(from + channel, width - channel) * factors);
        std::copy(rest, rest + width - channel, to + channel);
    }
}

// The 16 scores of one line with the keys of a tile. The order of each sum depends on the width alone.
inline Floats products(const float* query, const float* keys, int64_t width) {
    Floats sums[LANES];
    for (int key = 0; key < LANES; ++key) sums[key] = zero_floats();
    for (int64_t channel = 0; channel < width; channel += LANES) {
        const Floats some = load_floats(query + channel);
        for (int key = 0; key < LANES; ++key) sums[key] = fma(some, load_floats(keys + key * width + channel), sums[key]);
    }
    return sums_of_sixteen(sums);
}

// Adds the values of keys first … last - 1 of a tile to the sums of `lines` lines, key after key.
template <int lines>
inline void add_values(const Task& task, const float* weights, int64_t first, int64_t last, float* weighted) {
    const int64_t width = task.value_lanes;
    for (int64_t begin = 0; begin < width; begin += CHUNK) {
        const int count = int(std::min(CHUNK, width - begin) / LANES);
        auto add = [&](auto registers) {
            constexpr int size = decltype(registers)::value;
            Floats sums[lines][size];
            for (int line = 0; line < lines; ++line)
                for (int i = 0; i < size; ++i) sums[line][i] = load_floats(weighted + line * width + begin + i * LANES);
            for (int64_t key = first; key < last; ++key) {
                const float* value = task.values + key * width + begin;
                for (int line = 0; line < lines; ++line) {
                    const Floats weight = broadcast(weights[line * SEGMENT + key]);
                    for (int i = 0; i < size; ++i) sums[line][i] = fma(weight, load_floats(value + i * LANES), sums[line][i]);
                }
            }
            for (int line = 0; line < lines; ++line)
                for (int i = 0; i < size; ++i) store_floats(weighted + line * width + begin + i * LANES, sums[line][i]);
        };
        switch (count) {
            case 1: add(std::integral_constant<int, 1>()); break;
            case 2: add(std::integral_constant<int, 2>()); break;
            case 3: add(std::integral_constant<int, 3>()); break;
            default: add(std::integral_constant<int, 4>());
        }
    }
}

// The softmax of one segment, alone.
template <PageType type>
void segment_sums(const Task& task, int64_t segment, const Sums& sums) {
    const Pages& pages = task.pages;
    const int64_t begin = segment * SEGMENT;
    const int64_t first = std::max(begin, task.lowest(0)), last = std::min(begin + SEGMENT, task.place(task.lines - 1) + 1);
    const int64_t tile_first = (first - begin) / LANES, tile_last = (last - begin + LANES - 1) / LANES;
    const Floats nothing = broadcast(-INFINITY);
    float scales[LANES] = {};
    for (int64_t tile = tile_first; tile < tile_last; ++tile) {
        const int64_t base = begin + tile * LANES, from = std::max(base, first), to = std::min(base + LANES, last);
        for (int64_t key = from; key < to; ++key) {
            const int64_t slot = task.slot(key);
            widen<type>(pages.keys, slot * pages.key_width, pages.key_width, task.keys + (key - base) * task.key_lanes);
            if (type == PAGE_I8) scales[key - base] = pages.key_scales[slot];
        }
        for (int64_t line = 0; line < task.lines; ++line) {
            float* place = task.weights + line * SEGMENT + tile * LANES;
            const int64_t lowest = task.lowest(line) - base, end = task.place(line) + 1 - base;
            if (end <= 0 || lowest >= LANES) {
                store_floats(place, nothing);
                continue;
            }
            Floats found = products(task.queries + line * task.key_lanes, task.keys, task.key_lanes);
            if (type == PAGE_I8) found = found * load_floats(scales);
            if (task.scores.softcap != 0) {
                const Floats cap = broadcast(task.scores.softcap);
                found = cap * hyperbolic_tangent(found / cap);
            }
            if (lowest > 0 || end < LANES) found = between(std::max<int64_t>(lowest, 0), std::min(end, LANES), found, nothing);
            store_floats(place, found);
        }
    }
    for (int64_t line = 0; line < task.lines; ++line) {
        float* weights = task.weights + line * SEGMENT;
        Floats most = nothing, total = zero_floats();
        for (int64_t tile = tile_first; tile < tile_last; ++tile) most = larger(most, load_floats(weights + tile * LANES));
        const float largest = largest_of(most), reference = largest == -INFINITY ? 0.0f : largest;
        for (int64_t tile = tile_first; tile < tile_last; ++tile) {
            const Floats weight = exponential(load_floats(weights + tile * LANES) - broadcast(reference));
            store_floats(weights + tile * LANES, weight);
            total = total + weight;
        }
        sums.largest[line] = largest;
        sums.total[line] = sum_of(total);
    }
    std::fill(sums.weighted, sums.weighted + task.lines * task.value_lanes, 0.0f);
    for (int64_t tile = tile_first; tile < tile_last; ++tile) {
        const int64_t base = begin + tile * LANES, from = std::max(base, first), to = std::min(base + LANES, last);
        for (int64_t key = from; key < to; ++key) {
            const int64_t slot = task.slot(key);
            widen<type>(pages.values, slot * pages.value_stride, pages.value_width, task.values + (key - base) * task.value_lanes);
            if (type == PAGE_I8) scales[key - base] = pages.value_scales[slot];
        }
        float* weights = task.weights + tile * LANES;
        if (type == PAGE_I8)
            for (int64_t line = 0; line < task.lines; ++line)
                store_floats(weights + line * SEGMENT, load_floats(weights + line * SEGMENT) * load_floats(scales));
        int64_t line = 0;
        for (; line + 4 <= task.lines; line += 4) add_values<4>(task, weights + line * SEGMENT, from - base, to - base, sums.line(line));
        switch (task.lines - line) {
            case 3: add_values<3>(task, weights + line * SEGMENT, from - base, to - base, sums.line(line)); break;
            case 2: add_values<2>(task, weights + line * SEGMENT, from - base, to - base, sums.line(line)); break;
            case 1: add_values<1>(task, weights + line * SEGMENT, from - base, to - base, sums.line(line)); break;
            default: break;
        }
    }
}

void segment_sums(const Task& task, int64_t segment, const Sums& sums) {
    switch (task.pages.type) {
        case PAGE_F32: segment_sums<PAGE_F32>(task, segment, sums); break;
        case PAGE_F16: segment_sums<PAGE_F16>(task, segment, sums); break;
        case PAGE_BF16: segment_sums<PAGE_BF16>(task, segment, sums); break;
        case PAGE_I8: segment_sums<PAGE_I8>(task, segment, sums); break;
    }
}

// Before any key: a sink is a key without a value.
void begin_sums(const Sums& all, const Scores& scores, const Tile& tile) {
    const int64_t heads = tile.heads(), lines = tile.lines();
    for (int64_t line = 0; line < lines; ++line) {
        all.largest[line] = scores.sinks ? scores.sinks[tile.head_first + line % heads] : -INFINITY;
        all.total[line] = scores.sinks ? 1.0f : 0.0f;
    }
    std::fill(all.weighted, all.weighted + lines * all.width, 0.0f);
}

// Milakov and Gimelshein 2018: both are brought to the larger of their largest scores.
void join(const Sums& all, const Sums& part, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) {
        const float largest = std::max(all.largest[line], part.largest[line]);
        if (part.largest[line] == -INFINITY) continue;
        const float before = first_of(exponential(broadcast(all.largest[line] - largest)));
        const float now = first_of(exponential(broadcast(part.largest[line] - largest)));
        all.largest[line] = largest;
        all.total[line] = std::fma(all.total[line], before, part.total[line] * now);
        for (int64_t channel = 0; channel < all.width; channel += LANES) {
            float* place = all.line(line) + channel;
            store_floats(place, fma(load_floats(place), broadcast(before), load_floats(part.line(line) + channel) * broadcast(now)));
        }
    }
}

void write_out(const Sums& all, const Pages& pages, const Tile& tile, float* out, int64_t out_stride) {
    const int64_t heads = tile.heads(), lines = tile.lines();
    for (int64_t line = 0; line < lines; ++line) {
        float* place = out + (tile.row_first + line / heads) * out_stride + (tile.head_first + line % heads) * pages.value_width;
        const Floats total = broadcast(all.total[line]);
        for (int64_t channel = 0; channel < pages.value_width; channel += LANES)
            store_floats(place + channel, load_floats(all.line(line) + channel) / total, std::min(LANES, pages.value_width - channel));
    }
}

Task prepare(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, const float* queries, int64_t stride,
             TileMemory& memory) {
    const int64_t heads = tile.heads(), lines = tile.lines();
    const int64_t key_lanes = whole_lanes(pages.key_width), value_lanes = whole_lanes(pages.value_width);
    float* scaled = memory.queries.room<float>(lines * key_lanes);
    const Floats scale = broadcast(scores.scale);
    for (int64_t line = 0; line < lines; ++line) {
        const float* query = queries + (tile.row_first + line / heads) * stride + (tile.head_first + line % heads) * pages.key_width;
        for (int64_t channel = 0; channel < pages.key_width; channel += LANES)
            store_floats(scaled + line * key_lanes + channel,
                         load_floats(query + channel, std::min(LANES, pages.key_width - channel)) * scale);
    }
    return {pages,     scores,      batch.tables + tile.sequence * batch.table_width,
            tile.kv_head, lines,    heads,
            key_lanes, value_lanes, batch.positions + tile.row_first,
            scaled,    memory.keys.room<float>(LANES * key_lanes), memory.values.room<float>(LANES * value_lanes),
            memory.scores.room<float>(lines * SEGMENT)};
}

}  // namespace

void write_head(const Pages& pages, const int32_t* table, int64_t position, int64_t head, const float* key, const float* value) {
    const int64_t slot = (table[position / pages.block_size] * pages.kv_heads + head) * pages.block_size + position % pages.block_size;
    auto write = [&](const float* from, int64_t width, void* to, int64_t stride, float* scales) {
        float factor = 1.0f;
        if (pages.type == PAGE_I8) {
            Floats most = zero_floats();
            for (int64_t channel = 0; channel < width; channel += LANES)
                most = larger(absolute(load_floats(from + channel, std::min(LANES, width - channel))), most);
            const float largest = largest_of(most);
            scales[slot] = largest / 127.0f;
            factor = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
        }
        switch (pages.type) {
            case PAGE_F32: narrow<PAGE_F32>(from, width, factor, to, slot * stride); break;
            case PAGE_F16: narrow<PAGE_F16>(from, width, factor, to, slot * stride); break;
            case PAGE_BF16: narrow<PAGE_BF16>(from, width, factor, to, slot * stride); break;
            case PAGE_I8: narrow<PAGE_I8>(from, width, factor, to, slot * stride); break;
        }
    };
    write(key, pages.key_width, pages.keys, pages.key_width, pages.key_scales);
    if (value) write(value, pages.value_width, pages.values, pages.value_stride, pages.value_scales);
}

void add_tiles(const Ragged& batch, int64_t row_first, int64_t row_last, int64_t heads, const Pages& pages, const Scores& scores,
               std::vector<Tile>& tiles) {
    const int64_t shared = heads / pages.kv_heads, some = std::min(shared, MOST_LINES), rows = std::max<int64_t>(1, MOST_LINES / shared);
    for (int64_t sequence = 0; sequence < batch.sequences; ++sequence) {
        const int64_t end = std::min(batch.starts[sequence + 1], row_last);
        for (int64_t first = std::max(batch.starts[sequence], row_first); first < end; first += rows) {
            const int64_t last = std::min(first + rows, end);
            const int64_t lowest = scores.window ? std::max<int64_t>(0, batch.positions[first] - scores.window + 1) : 0;
            const int64_t segments = batch.positions[last - 1] / SEGMENT + 1;
            for (int64_t kv_head = 0; kv_head < pages.kv_heads; ++kv_head)
                for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; head += some)
                    tiles.push_back({sequence, first, last, kv_head, head, std::min(head + some, (kv_head + 1) * shared),
                                     lowest / SEGMENT, segments});
        }
    }
}

void attend(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, const float* queries,
            int64_t query_stride, float* out, int64_t out_stride, TileMemory& memory) {
    const Task task = prepare(pages, scores, batch, tile, queries, query_stride, memory);
    const int64_t size = Sums::floats(task.lines, task.value_lanes);
    float* room = memory.sums.room<float>(2 * size);
    const Sums all(room, task.lines, task.value_lanes), part(room + size, task.lines, task.value_lanes);
    begin_sums(all, scores, tile);
    for (int64_t segment = tile.segment_first; segment < tile.segment_last; ++segment) {
        segment_sums(task, segment, part);
        join(all, part, task.lines);
    }
    write_out(all, pages, tile, out, out_stride);
}

int64_t segment_floats(const Pages& pages, const Tile& tile) { return Sums::floats(tile.lines(), whole_lanes(pages.value_width)); }

void attend_segments(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, int64_t first, int64_t last,
                     const float* queries, int64_t query_stride, float* partials, TileMemory& memory) {
    const Task task = prepare(pages, scores, batch, tile, queries, query_stride, memory);
    for (int64_t segment = first; segment < last; ++segment, partials += segment_floats(pages, tile))
        segment_sums(task, segment, Sums(partials, task.lines, task.value_lanes));
}

void join_segments(const Pages& pages, const Scores& scores, const Tile& tile, float* partials, float* out, int64_t out_stride,
                   TileMemory& memory) {
    const int64_t lines = tile.lines(), width = whole_lanes(pages.value_width), size = segment_floats(pages, tile);
    const Sums all(memory.sums.room<float>(size), lines, width);
    begin_sums(all, scores, tile);
    for (int64_t segment = tile.segment_first; segment < tile.segment_last; ++segment, partials += size)
        join(all, Sums(partials, lines, width), lines);
    write_out(all, pages, tile, out, out_stride);
}

}  // namespace bessemer

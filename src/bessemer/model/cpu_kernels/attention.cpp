#include "attention.h"

#include <algorithm>
#include <cmath>

#include "attention_tile.h"

namespace bessemer {
namespace {

constexpr int64_t MOST_LINES = 48;  // queries of rows and heads that share the keys once they are widened
constexpr int64_t FEW_LINES = 6;    // so few read the pages themselves
constexpr int64_t AHEAD = 48;       // keys and values that are asked for before their turn, because pages lie far apart

// What has been seen so far of a softmax: the largest score m, the sum of exp(score - m), and the sum of exp(score - m) · value.
struct Sums {
    float *largest, *total, *weighted;
    int64_t width;

    static int64_t floats(int64_t lines, int64_t width) { return lines * (width + 2); }
    Sums(float* memory, int64_t lines, int64_t width)
        : largest(memory + lines * width), total(memory + lines * (width + 1)), weighted(memory), width(width) {}
    float* line(int64_t line) const { return weighted + line * width; }
};

template <PageType type>
inline void narrow(const float* from, int64_t width, float factor, void* pages, int64_t offset) {
    using N = Numbers<type>;
    typename N::T* to = static_cast<typename N::T*>(pages) + offset / N::EACH;
    const Floats factors = broadcast(factor);
    int64_t channel = 0;
    for (; channel + LANES <= width; channel += LANES) N::store(to + channel / N::EACH, load_floats(from + channel) * factors);
    if (channel < width) {
        typename N::T rest[LANES];
        N::store(rest, load_floats(from + channel, width - channel) * factors);
        std::copy(rest, rest + (width - channel) / N::EACH, to + channel / N::EACH);
    }
}

// Asks for rows of pages that will be read soon.
template <PageType type>
inline void fetch(const void* pages, int64_t stride, int64_t width, const int64_t* rows, int64_t count) {
    using N = Numbers<type>;
    constexpr int64_t size = sizeof(typename N::T), line = 64;
    const char* bytes = static_cast<const char*>(pages);
    if (count > 0 && stride == width && rows[count - 1] - rows[0] == count - 1) {  // of one block: without a gap
        const char* place = bytes + rows[0] * stride * size / N::EACH;
        for (const char* end = place + count * width * size / N::EACH; place < end; place += line) __builtin_prefetch(place);
        return;
    }
    for (int64_t row = 0; row < count; ++row)
        for (int64_t byte = 0; byte < width * size / N::EACH; byte += line)
            __builtin_prefetch(bytes + rows[row] * stride * size / N::EACH + byte);
}

// Calls work(lines, line) for groups of at most `most` lines, the first argument a constant.
template <int most, class Work>
inline void in_groups(int64_t lines, Work&& work) {
    int64_t line = 0;
    for (; line + most <= lines; line += most) work(std::integral_constant<int, most>(), line);
    switch (lines - line) {
        case 3:
            if constexpr (most > 2) work(std::integral_constant<int, 3>(), line);
            break;
        case 2: work(std::integral_constant<int, 2>(), line); break;
        case 1: work(std::integral_constant<int, 1>(), line); break;
        default: break;
    }
}

// The softmax of one segment, alone.
template <PageType type>
class Segment {
public:
    Segment(const Task& task, int64_t segment)
        : task_(task), begin_(segment * SEGMENT), first_(std::max<int64_t>(0, task.lowest[0] - begin_)),
          last_(std::min<int64_t>(SEGMENT, task.highest[task.lines - 1] + 1 - begin_)),
          next_last_(std::min<int64_t>(AHEAD, task.highest[task.lines - 1] + 1 - begin_ - SEGMENT)),
          slots_(task, begin_ + first_, begin_ + last_, first_), next_(task, begin_ + SEGMENT, begin_ + SEGMENT + next_last_, 0),
          few_(task.lines <= FEW_LINES && task.key_lanes == task.pages.key_width && task.value_lanes == task.pages.value_width) {}

    void sums(const Sums& sums) {
        fetch_keys(slots_, first_, first_ + AHEAD, last_);
        each_tile([&](int64_t tile, int64_t from, int64_t to) {
            fetch_keys(slots_, from + AHEAD, to + AHEAD, last_);
            if (to + AHEAD > last_) fetch_values(from + AHEAD - last_ + first_, to + AHEAD - last_ + first_);
            scores(tile, from, to);
        });
        for (int64_t line = 0; line < task_.lines; ++line) weigh(line, sums);
        std::fill(sums.weighted, sums.weighted + task_.lines * task_.value_lanes, 0.0f);
        each_tile([&](int64_t tile, int64_t from, int64_t to) {
            fetch_values(from + AHEAD, to + AHEAD);
            if (to + AHEAD > last_) fetch_keys(next_, from + AHEAD - last_, to + AHEAD - last_, next_last_);
            add(tile, from, to, sums);
        });
    }

private:
    // Calls work(first key of the tile, first that is seen, last) for the tiles that some line sees; all within the segment.
    template <class Work>
    void each_tile(Work&& work) {
        for (int64_t tile = first_ / LANES * LANES; tile < last_; tile += LANES) {
            const int64_t from = std::max(tile, first_), to = std::min(tile + LANES, last_);
            work(tile, from, to);
        }
    }

    // Rows first … last - 1, those of them that there are.
    void fetch_keys(const Slots& slots, int64_t first, int64_t last, int64_t end) {
        const Pages& pages = task_.pages;
        first = std::max<int64_t>(first, 0);
        fetch<type>(pages.keys, pages.key_width, pages.key_width, slots.rows + first, std::min(last, end) - first);
    }
    void fetch_values(int64_t first, int64_t last) {
        const Pages& pages = task_.pages;
        first = std::max(first, first_);
        fetch<type>(pages.values, pages.value_stride, pages.value_width, slots_.rows + first, std::min(last, last_) - first);
    }

    void scores(int64_t tile, int64_t from, int64_t to) {
        const Pages& pages = task_.pages;
        if (has_scales(type))
            for (int64_t key = from; key < to; ++key) scales_[key - tile] = pages.key_scales[slots_.rows[key]];
        if (few_) {
            int64_t rows[LANES];
            for (int64_t key = 0; key < LANES; ++key) rows[key] = slots_.rows[std::min(std::max(tile + key, from), to - 1)];
            in_groups<LINES_OF_PAGES>(task_.lines, [&](auto lines, int64_t line) {
                Floats found[lines.value];
                few_products<type, lines.value>(task_, rows, line, found);
                for (int l = 0; l < lines.value; ++l) keep(line + l, tile, found[l]);
            });
            return;
        }
        for (int64_t key = from; key < to; ++key)
            widen<type>(pages.keys, slots_.rows[key] * pages.key_width, pages.key_width, task_.keys + (key - tile) * LANES);
        for (int64_t line = 0; line < task_.lines; ++line) {
            const int64_t begin = begin_ + tile;
            if (task_.highest[line] < begin || task_.lowest[line] >= begin + LANES) keep(line, tile, zero_floats());
            else keep(line, tile, products(task_.queries + line * task_.key_lanes, task_.keys, task_.key_lanes));
        }
    }

    // Scores of a line as its softmax takes them: -inf where it sees nothing.
    void keep(int64_t line, int64_t tile, Floats found) {
        if (has_scales(type)) found = found * load_floats(scales_);
        if (task_.scores.softcap != 0) {
            const Floats cap = broadcast(task_.scores.softcap);
            found = cap * hyperbolic_tangent(found / cap);
        }
        const int64_t lowest = task_.lowest[line] - begin_ - tile, end = task_.highest[line] + 1 - begin_ - tile;
        if (lowest > 0 || end < LANES)
            found = between(std::min(std::max<int64_t>(lowest, 0), LANES), std::min(std::max<int64_t>(end, 0), LANES), found,
                            broadcast(-INFINITY));
        store_floats(task_.weights + line * SEGMENT + tile, found);
    }

    void weigh(int64_t line, const Sums& sums) {
        float* weights = task_.weights + line * SEGMENT;
        const int64_t first = first_ / LANES * LANES;
        Floats most = broadcast(-INFINITY), total = zero_floats();
        for (int64_t tile = first; tile < last_; tile += LANES) most = larger(most, load_floats(weights + tile));
        const float largest = largest_of(most);
        const Floats reference = broadcast(largest == -INFINITY ? 0.0f : largest);
        for (int64_t tile = first; tile < last_; tile += LANES) {
            const Floats weight = exponential(load_floats(weights + tile) - reference);
            store_floats(weights + tile, weight);
            total = total + weight;
        }
        sums.largest[line] = largest;
        sums.total[line] = sum_of(total);
    }

    void add(int64_t tile, int64_t from, int64_t to, const Sums& sums) {
        const Pages& pages = task_.pages;
        if (has_scales(type)) {
            for (int64_t key = from; key < to; ++key) scales_[key - tile] = pages.value_scales[slots_.rows[key]];
            for (int64_t line = 0; line < task_.lines; ++line) {
                float* weights = task_.weights + line * SEGMENT + tile;
                store_floats(weights, load_floats(weights) * load_floats(scales_));
            }
        }
        if (few_) {
            in_groups<4>(task_.lines, [&](auto lines, int64_t line) {
                add_few_values<type, lines.value>(task_, slots_.rows, task_.weights + line * SEGMENT, from, to, sums.line(line));
            });
            return;
        }
        for (int64_t key = from; key < to; ++key)
            widen<type>(pages.values, slots_.rows[key] * pages.value_stride, pages.value_width, task_.values + (key - tile) * LANES);
        in_groups<4>(task_.lines, [&](auto lines, int64_t line) {
            add_values<lines.value>(task_, task_.weights + line * SEGMENT + tile, from - tile, to - tile, sums.line(line));
        });
    }

    const Task& task_;
    const int64_t begin_, first_, last_, next_last_;  // of the segment, and within it what is seen
    const Slots slots_, next_;
    const bool few_;
    float scales_[LANES] = {};
};

void segment_sums(const Task& task, int64_t segment, const Sums& sums) {
    switch (task.pages.type) {
        case PAGE_F32: Segment<PAGE_F32>(task, segment).sums(sums); break;
        case PAGE_F16: Segment<PAGE_F16>(task, segment).sums(sums); break;
        case PAGE_BF16: Segment<PAGE_BF16>(task, segment).sums(sums); break;
        case PAGE_I8: Segment<PAGE_I8>(task, segment).sums(sums); break;
        case PAGE_I4: Segment<PAGE_I4>(task, segment).sums(sums); break;
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
        all.total[line] = fused(all.total[line], before, part.total[line] * now);
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
        if (pages.type == PAGE_I4) mix_channels(place, pages.value_width, mixed_channels(pages));
    }
}

Task prepare(const Pages& pages, const Scores& scores, const Ragged& batch, const Tile& tile, const float* queries, int64_t stride,
             TileMemory& memory) {
    const int64_t lines = tile.lines();
    const int64_t key_lanes = whole_lanes(pages.key_width), value_lanes = whole_lanes(pages.value_width);
    float* scaled = memory.queries.room<float>(lines * key_lanes);
    int32_t *lowest = memory.positions.room<int32_t>(2 * lines), *highest = lowest + lines;
    const Floats scale = broadcast(scores.scale);
    for (int64_t row = tile.row_first, line = 0; row < tile.row_last; ++row) {
        for (int64_t head = tile.head_first; head < tile.head_last; ++head, ++line) {
            highest[line] = batch.positions[row];
            lowest[line] = scores.window ? std::max<int32_t>(0, batch.positions[row] - int32_t(scores.window) + 1) : 0;
            const float* query = queries + row * stride + head * pages.key_width;
            for (int64_t channel = 0; channel < pages.key_width; channel += LANES)
                store_floats(scaled + line * key_lanes + channel,
                             load_floats(query + channel, std::min(LANES, pages.key_width - channel)) * scale);
            if (pages.type == PAGE_I4) mix_channels(scaled + line * key_lanes, pages.key_width, mixed_channels(pages));
        }
    }
    float *keys = memory.keys.room<float>(LANES * key_lanes), *values = memory.values.room<float>(LANES * value_lanes);
    return {pages, scores, batch.tables + tile.sequence * batch.table_width, tile.kv_head, lines, key_lanes, value_lanes,
            lowest, highest, scaled, keys, values, memory.scores.room<float>(lines * SEGMENT)};
}

}  // namespace

void write_head(const Pages& pages, const int32_t* table, int64_t position, int64_t head, const float* key, const float* value) {
    const int64_t slot = (table[position / pages.block_size] * pages.kv_heads + head) * pages.block_size + position % pages.block_size;
    auto write = [&](const float* from, int64_t width, void* to, int64_t stride, float* scales) {
        float factor = 1.0f;
        if (pages.type == PAGE_I4) {
            thread_local Scratch scratch;
            float* mixed = scratch.room<float>(width);
            std::copy(from, from + width, mixed);
            mix_channels(mixed, width, mixed_channels(pages));
            from = mixed;
        }
        if (has_scales(pages.type)) {
            Floats most = zero_floats(), least = zero_floats();
            for (int64_t channel = 0; channel < width; channel += LANES) {
                const Floats some = load_floats(from + channel, std::min(LANES, width - channel));
                most = larger(some, most);
                least = larger(zero_floats() - some, least);
            }
            const float above = largest_of(most), below = largest_of(least), largest = std::max(above, below);
            // the code -8 has no opposite: it is the number of the largest magnitude, whose sign the scale has then
            const float steps = pages.type == PAGE_I8 ? 127.0f : above > below ? -8.0f : 8.0f;
            scales[slot] = largest / steps;
            factor = largest > 0x1p-100f ? steps / largest : 0.0f;
        }
        switch (pages.type) {
            case PAGE_F32: narrow<PAGE_F32>(from, width, factor, to, slot * stride); break;
            case PAGE_F16: narrow<PAGE_F16>(from, width, factor, to, slot * stride); break;
            case PAGE_BF16: narrow<PAGE_BF16>(from, width, factor, to, slot * stride); break;
            case PAGE_I8: narrow<PAGE_I8>(from, width, factor, to, slot * stride); break;
            case PAGE_I4: narrow<PAGE_I4>(from, width, factor, to, slot * stride); break;
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
    if (scores.sinks) begin_sums(all, scores, tile);
    for (int64_t segment = tile.segment_first; segment < tile.segment_last; ++segment) {
        const bool first = !scores.sinks && segment == tile.segment_first;  // joined to nothing it stays what it is
        segment_sums(task, segment, first ? all : part);
        if (!first) join(all, part, task.lines);
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

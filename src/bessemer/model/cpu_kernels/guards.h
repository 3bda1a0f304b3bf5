// What Python gives is checked before anything is read or written by it, and no exception leaves C++. A function of the plain C
// interface returns null when all is well, else one line that is good until the same thread's next call.
#pragma once
#include <cstdio>
#include <new>

#include "attention.h"

namespace bessemer {

// A line of this thread.
template <class... Numbers>
inline const char* failure(const char* format, Numbers... numbers) {
    thread_local char line[200];
    std::snprintf(line, sizeof line, format, numbers...);
    return line;
}

inline const char* const OUT_OF_MEMORY = "out of memory";

// Calls `work`, which returns null or a line.
template <class Work>
inline const char* guarded(Work&& work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    } catch (...) {
        return "the kernels failed";
    }
}

// Why the keys of some rows cannot lie where tables and pages say; null when they can.
inline const char* misplaced(const Ragged& batch, const Pages& pages, int64_t window) {
    for (int64_t sequence = 0; sequence < batch.sequences; ++sequence) {
        const int32_t* table = batch.tables + sequence * batch.table_width;
        int64_t checked = -1;  // the last block that is known to be there
        for (int64_t row = batch.starts[sequence]; row < batch.starts[sequence + 1]; ++row) {
            const int64_t position = batch.positions[row], last = position / pages.block_size;
            if (position < 0 || last >= batch.table_width)
                return failure("position %lld of row %lld is beyond the %lld pages of its table", (long long)position, (long long)row,
                               (long long)batch.table_width);
            const int64_t first = window && position >= window ? (position - window + 1) / pages.block_size : 0;
            for (int64_t block = first > checked ? first : checked + 1; block <= last; ++block)
                if (table[block] < 0 || table[block] >= pages.blocks)
                    return failure("page %d of row %lld is none of the %lld that there are", int(table[block]), (long long)row,
                                   (long long)pages.blocks);
            checked = last > checked ? last : checked;
        }
    }
    return nullptr;
}

}  // namespace bessemer

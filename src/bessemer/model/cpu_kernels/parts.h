// Teams of threads: one for each call from Python that is under way.
#pragma once
#include <cstdint>

namespace bessemer {

using Part = void (*)(void* context, int64_t part);

// Calls `work(context, part)` once for every part below `parts`, on the calling thread and at most threads - 1 others, and returns
// when all are done. A part goes to whoever comes first, so a thread that the system does not run holds nobody up. Calls side by
// side share the processors; one alone has the threads that it asks for. Throws std::bad_alloc where a part did.
void run_parts(int threads, int64_t parts, Part work, void* context);

template <class Work>
void run_parts(int threads, int64_t parts, Work&& work) {
    run_parts(threads, parts, [](void* context, int64_t part) { (*static_cast<Work*>(context))(part); }, &work);
}

}  // namespace bessemer

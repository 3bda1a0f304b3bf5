#include "parts.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bessemer {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // some ten nanoseconds; "yield" does nothing on most of these processors
#else
    std::this_thread::yield();
#endif
}

constexpr int SPINS = 1000;    // a few tens of microseconds: the next matrix of the same layer comes sooner
constexpr int YIELDS = 50;     // then others may run first, then sleep until woken
constexpr int64_t PART_BITS = 24, PART_MASK = (1 << PART_BITS) - 1;

class Team {
public:
    // Takes the parts of one job; returns when all of them are done.
    void run(int threads, int64_t parts, Part work, void* context) {
        try {
            while (int(helpers_.size()) < threads - 1) helpers_.emplace_back([this] { help(); });
        } catch (const std::system_error&) {  // the system gives no more threads: fewer do it
        }
        work_.store(work, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t job = (next_.load(std::memory_order_relaxed) >> PART_BITS) + 1;
        next_.store(job << PART_BITS, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        take(job);
        for (int spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins) {
            if (spins < SPINS) pause_briefly();
            else std::this_thread::yield();
        }
        // Closed before anything of the next job is written: whoever comes late finds nothing to take.
        next_.store(job << PART_BITS | PART_MASK, std::memory_order_seq_cst);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (failed_.exchange(false)) throw std::bad_alloc();
    }

private:
    // Takes parts of the job while there are any. The job's number lies in the counter, so a part of an ended job is never taken.
    void take(uint64_t job) {
        uint64_t next = next_.load(std::memory_order_acquire);
        while (next >> PART_BITS == job) {
            const int64_t part = int64_t(next & PART_MASK), parts = parts_.load(std::memory_order_relaxed);
            const Part work = work_.load(std::memory_order_relaxed);
            void* context = context_.load(std::memory_order_relaxed);
            if (part >= parts) return;
            if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
                try {
                    work(context, part);
                } catch (...) {  // of any thread, told by the one that called
                    failed_.store(true, std::memory_order_relaxed);
                }
                done_.fetch_add(1, std::memory_order_release);
                next = next_.load(std::memory_order_acquire);
            }
        }
    }

    void help() {
        uint64_t seen = 0;
        for (;;) {
            int spins = 0;
            while (next_.load(std::memory_order_acquire) >> PART_BITS == seen) {
                if (++spins < SPINS) pause_briefly();
                else if (spins < SPINS + YIELDS) std::this_thread::yield();
                else {
                    std::unique_lock<std::mutex> lock(mutex_);
                    sleeping_.fetch_add(1, std::memory_order_seq_cst);
                    wake_.wait(lock, [&] { return next_.load(std::memory_order_seq_cst) >> PART_BITS != seen; });
                    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                }
            }
            seen = next_.load(std::memory_order_acquire) >> PART_BITS;
            take(seen);
        }
    }

    std::atomic<uint64_t> next_{0};  // job << PART_BITS | its next part
    std::atomic<int64_t> parts_{0}, done_{0};
    std::atomic<Part> work_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> failed_{false};  // nothing but memory fails
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> helpers_;
};

std::mutex busy;
Team* team = nullptr;  // never freed: its threads may not outlive it, and end with the process
pid_t owner = 0;

}  // namespace

void run_parts(int threads, int64_t parts, Part work, void* context) {
    std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (threads <= 1 || parts <= 1 || !lock.owns_lock()) {  // another thread's job is under way: this one does its own alone
        for (int64_t part = 0; part < parts; ++part) work(context, part);
        return;
    }
    if (!team || owner != getpid()) {  // a fork inherits no threads
        team = new Team;
        owner = getpid();
    }
    team->run(threads, parts, work, context);
}

}  // namespace bessemer

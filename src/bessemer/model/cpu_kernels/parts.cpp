#include "parts.h"

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

#include <algorithm>
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

// A test has another number.
#ifndef BESSEMER_PROCESSORS
#define BESSEMER_PROCESSORS std::thread::hardware_concurrency()
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
            while (int(helpers_.size()) < threads - 1) helpers_.emplace_back([this, number = int(helpers_.size())] { help(number); });
        } catch (const std::system_error&) {  // the system gives no more threads: fewer do it
        }
        wanted_.store(threads - 1, std::memory_order_relaxed);
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

    // Of the helpers that there are, as many take part as a job wants: the first ones.
    void help(int number) {
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
            if (number < wanted_.load(std::memory_order_relaxed)) take(seen);
        }
    }

    std::atomic<uint64_t> next_{0};  // job << PART_BITS | its next part
    std::atomic<int64_t> parts_{0}, done_{0};
    std::atomic<Part> work_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> sleeping_{0}, wanted_{0};
    std::atomic<bool> failed_{false};  // nothing but memory fails
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> helpers_;
};

int process() {
#if defined(_WIN32)
    return _getpid();
#else
    return int(getpid());
#endif
}

// The teams of a process: one for each job that is under way at the same time.
class Teams {
public:
    // A team that nobody has, and how many threads of those that are asked for it may use.
    Team* take(int asked, int& threads) {
        std::lock_guard<std::mutex> lock(mutex_);
        // As many as are left, and no fewer than everybody's share: jobs side by side (of two models, say) keep threads, and
        // before long all of them together have as many as there are processors.
        threads = jobs_ ? std::min(asked, std::max({1, processors_ - used_, processors_ / (jobs_ + 1)})) : asked;
        ++jobs_;
        used_ += threads;
        if (idle_.empty()) return new Team;
        Team* team = idle_.back();
        idle_.pop_back();
        return team;
    }

    void give_back(Team* team, int threads) {
        std::lock_guard<std::mutex> lock(mutex_);
        --jobs_;
        used_ -= threads;
        idle_.push_back(team);
    }

    const int owner = process();

private:
    const int processors_ = int(BESSEMER_PROCESSORS);
    std::mutex mutex_;
    int jobs_ = 0, used_ = 0;
    std::vector<Team*> idle_;
};

// Never freed: their threads may not outlive them, and end with the process. A fork inherits no threads, and begins anew.
std::atomic<Teams*> all_teams{nullptr};

Teams& teams() {
    Teams* known = all_teams.load(std::memory_order_acquire);
    while (!known || known->owner != process()) {
        Teams* fresh = new Teams;
        if (all_teams.compare_exchange_strong(known, fresh)) return *fresh;
        delete fresh;
    }
    return *known;
}

}  // namespace

void run_parts(int threads, int64_t parts, Part work, void* context) {
    if (threads > 1 && parts > 1) {
        Teams& all = teams();
        int granted = 0;
        Team* team = all.take(threads, granted);
        struct Return {
            Teams& all;
            Team* team;
            int threads;
            ~Return() { all.give_back(team, threads); }
        } on_return{all, team, granted};
        if (granted > 1) return team->run(granted, parts, work, context);
    }
    for (int64_t part = 0; part < parts; ++part) work(context, part);
}

}  // namespace bessemer

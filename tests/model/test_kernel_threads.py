"""Threads of the compiled kernels: calls side by side, as of two models that answer at once, keep theirs."""

import os
import subprocess
from pathlib import Path

import pytest

from bessemer.core.environment import cxx_compiler
from bessemer.model import cpu_kernels

FOLDER = Path(cpu_kernels.__file__).parent

#: A case on a machine of so many processors. `Together` is a place that as many threads reach, or the program fails.
PROGRAM = """
static int processors = 1;
#define BESSEMER_PROCESSORS processors
#include "parts.cpp"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <sys/wait.h>

struct Together {
    explicit Together(int count) : missing(count) {}
    void reach() {
        --missing;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
        while (missing > 0) {
            if (std::chrono::steady_clock::now() > end) { std::puts("too few threads"); std::_Exit(1); }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    std::atomic<int> missing;
};

// Of a job that asks for `threads`, and has at least `least`: how many take part.
int threads_of(int threads, int least) {
    Together all(least);
    std::mutex mutex;
    std::set<std::thread::id> seen;
    bessemer::run_parts(threads, 200, [&](int64_t part) {
        if (part < least) all.reach();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        std::lock_guard<std::mutex> lock(mutex);
        seen.insert(std::this_thread::get_id());
    });
    return int(seen.size());
}

void side_by_side() {
    Together eight(8);
    auto job = [&] { bessemer::run_parts(4, 4, [&](int64_t) { eight.reach(); }); };
    std::thread first(job), second(job);
    first.join();
    second.join();
}

void shared() {
    // one job has all four processors, and holds them until another has come, which has its half
    Together first_runs(5), second_done(2);
    int second = 0;
    std::thread one([&] {
        bessemer::run_parts(4, 4, [&](int64_t part) {
            first_runs.reach();
            if (part == 0) second_done.reach();
        });
    });
    first_runs.reach();
    second = threads_of(4, 2);
    second_done.reach();
    one.join();
    std::printf("%d ", second);
}

void after_a_larger_job() {
    Together four(4);
    bessemer::run_parts(4, 4, [&](int64_t) { four.reach(); });
    std::printf("%d ", threads_of(2, 2));
}

void in_a_fork() {
    threads_of(2, 2);
    std::fflush(stdout);
    if (const pid_t child = fork()) {
        int status = 1;
        waitpid(child, &status, 0);
        std::printf("%d ", status);
    } else {
        Together two(2);
        bessemer::run_parts(2, 2, [&](int64_t) { two.reach(); });
        std::_Exit(0);
    }
}

int main(int, char** arguments) {
    const std::string name = arguments[1];
    processors = std::atoi(arguments[2]);
    if (name == "side by side") side_by_side();
    if (name == "shared") shared();
    if (name == "after a larger job") after_a_larger_job();
    if (name == "in a fork") in_a_fork();
    std::puts("done");
    std::_Exit((std::fflush(stdout), 0));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = cxx_compiler()
    if compiler is None or os.name != "posix":
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "threads.cpp").write_text(PROGRAM, encoding="utf-8")
    command = [compiler, "-std=c++17", "-O0", "-pthread", f"-I{FOLDER}", folder / "threads.cpp", "-o", folder / "threads"]
    subprocess.run(command, check=True)
    return folder / "threads"


@pytest.mark.parametrize(
    ("case", "processors", "said"),
    [
        ("side by side", 8, "done"),
        ("shared", 4, "2 done"),
        ("after a larger job", 4, "2 done"),
        ("in a fork", 2, "0 done"),
    ],
)
def test_calls_at_the_same_time_share_the_processors(case, processors, said, program):
    done = subprocess.run([program, case, str(processors)], capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.stdout.strip() == said, done.stderr

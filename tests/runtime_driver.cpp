// What Python cannot see of memory.cpp and parallel.cpp: whether a second thread takes part, and whether a forked child
// can ask for memory while a thread of the parent does. Exits with the number of failures.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "memory.h"
#include "parallel.h"

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace {

// Two tasks that each wait for the other to begin: on one thread the first waits in vain.
bool two_threads() {
    std::atomic<int> begun{0};
    std::atomic<bool> met{true};
    ant5m::parallel(2, 2, [&](int64_t) {
        ++begun;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
        while (begun < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        if (begun < 2) met = false;
    });
    return met;
}

// Sizes that never come again: most of the time the cache is at work, under its lock.
bool children_have_memory() {
    std::atomic<bool> stop{false};
    std::thread other([&] {
        for (int64_t i = 0; !stop; ++i) ant5m::Memory memory(ant5m::kLarge * (1 + i % 1000));
    });
    int failures = 0;
    for (int i = 0; i < 60 && failures == 0; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(5);
            ant5m::Memory memory(ant5m::kLarge);
            memory.data()[0] = 1;
            _exit(0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        failures += status != 0;
    }
    stop = true;
    other.join();
    return failures == 0;
}

int failed(const char* what, bool good) {
    if (!good) std::printf("failed: %s\n", what);
    return !good;
}

}  // namespace

int main() {
    int failures = failed("threads of its own", two_threads());
    ant5m::use_openmp(reinterpret_cast<uintptr_t>(&GOMP_parallel));
    failures += failed("threads of OpenMP", two_threads());
    return failures + failed("memory in a forked child", children_have_memory());
}

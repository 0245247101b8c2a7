#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace ant5m {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
GompParallel gomp_parallel = nullptr;

struct Work {
    void (*body)(void*, int64_t);
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
};

void run_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (int64_t task = work.next++; task < work.tasks; task = work.next++) work.body(work.context, task);
}

void run_on_own_threads(Work& work, int threads) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(run_tasks, &work);
    run_tasks(&work);
    for (std::thread& other : others) other.join();
}

}  // namespace

void parallel(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Work work{body, context, tasks};
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (threads <= 1) return run_tasks(&work);
    if (gomp_parallel) return gomp_parallel(run_tasks, &work, static_cast<unsigned>(threads), 0);
    run_on_own_threads(work, threads);
}

void use_openmp(uintptr_t address) {
    gomp_parallel = reinterpret_cast<GompParallel>(address);
#ifndef _WIN32
    // A forked child has the pool's state but not its threads: a parallel region would wait for ever.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { gomp_parallel = nullptr; });
    (void)registered;
#endif
}

}  // namespace ant5m

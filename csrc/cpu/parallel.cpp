#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
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
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
};

void run_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    try {
        for (int64_t task = work.next++; task < work.tasks; task = work.next++) work.body(work.context, task);
    } catch (...) {  // of a thread that nobody could catch it on; the first one is thrown by `parallel`
        if (!work.failed.test_and_set()) work.error = std::current_exception();
        work.next = work.tasks;
    }
}

void run_on_own_threads(Work& work, int threads) {
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(run_tasks, &work);
    } catch (const std::system_error&) {  // the system gives no more: those that are there do all of it
    }
    run_tasks(&work);
    for (std::thread& other : others) other.join();
}

}  // namespace

void parallel(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Work work{body, context, tasks};
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (threads <= 1)
        run_tasks(&work);
    else if (gomp_parallel)
        gomp_parallel(run_tasks, &work, static_cast<unsigned>(threads), 0);
    else
        run_on_own_threads(work, threads);
    if (work.error) std::rethrow_exception(work.error);
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

// Threads for the ops. Compiled once, not for each instruction set.
#pragma once
#include <cstdint>

namespace ant5m {

// Tasks that an op has at least, where it is large enough: 4 for each of 16 cores, so that all end at about the same
// time.
constexpr int64_t kTasks = 64;

// Of the threads, those that so many numbers are worth waking.
inline int threads_for(int64_t numbers, int threads) { return numbers < 1 << 15 ? 1 : threads; }

// Calls body(context, task) once for every task of [0, tasks) on up to `threads` threads. Which thread takes which
// task is not determined, so a task must write only what is its own. Rethrows the first exception of a task.
void parallel(int threads, int64_t tasks, void (*body)(void* context, int64_t task), void* context);

template <typename Body>
void parallel(int threads, int64_t tasks, const Body& body) {
    parallel(
        threads, tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
        const_cast<Body*>(&body));
}

// The same for rows, `rows_a_task` of them a task: body(task, row).
template <typename Body>
void parallel_rows(int threads, int64_t rows, int64_t rows_a_task, const Body& body) {
    parallel(threads, (rows + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
        const int64_t end = (task + 1) * rows_a_task;
        for (int64_t row = task * rows_a_task; row < (end < rows ? end : rows); ++row) body(task, row);
    });
}

// Run on this pool from now on: the address of the `GOMP_parallel` of an OpenMP runtime that the process already
// has. Without one (or in a forked child, where an OpenMP pool cannot be used) threads are started for each call.
void use_openmp(uintptr_t gomp_parallel);

}  // namespace ant5m

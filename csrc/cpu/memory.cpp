#include "memory.h"

#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace ant5m {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int64_t kPage = 64 << 10, kHugePage = 2 << 20;  // the largest page of a system, else its parts stay mapped
// More may be held than was in use at once: without a backward pass little is, and of changing sizes.
constexpr int64_t kSpare = 32 << 20;

struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
};

// What `ask` gives; if the system refuses, once more without what is kept for later.
template <typename Ask>
auto insist(const Ask& ask) {
    try {
        return ask();
    } catch (const std::bad_alloc&) {
        if (release_memory() == 0) throw;
    }
    return ask();
}

float* new_floats(int64_t floats) {
    return static_cast<float*>(::operator new[](static_cast<size_t>(floats) * sizeof(float), kAlignment));
}

float* allocate(int64_t floats) {
    return insist([=] { return new_floats(floats); });
}

#ifdef _WIN32
void* map(int64_t bytes) { return new_floats(bytes / static_cast<int64_t>(sizeof(float))); }
void unmap(void* memory, int64_t) { Free()(static_cast<float*>(memory)); }
#else
// On huge pages where the system has them; with the cache a training step is 1 to 4 % faster than with malloc.
void* map(int64_t bytes) {
    const int64_t more = bytes + kHugePage;
    void* found = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<char*>(found);
    const auto before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) % kHugePage);
    if (before > 0) munmap(begin, before);
    begin += before;
    munmap(begin + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
    madvise(begin, bytes, MADV_HUGEPAGE);
#endif
    return begin;
}

void unmap(void* memory, int64_t bytes) { munmap(memory, bytes); }
#endif

class Cache {
  public:
    void* take(int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        held.used += bytes;
        auto& same = free[bytes];
        if (!same.empty()) {
            held.kept -= bytes;
            void* memory = same.back();
            same.pop_back();
            return memory;
        }
        if (held.used > most) most = held.used;
        shrink(most + kSpare - held.used);
        try {
            return map(bytes);
        } catch (const std::bad_alloc&) {
            held.used -= bytes;
            throw;
        }
    }

    // Never throws, as it is called by a destructor.
    void give_back(void* memory, int64_t bytes) noexcept {
        const std::lock_guard<std::mutex> lock(mutex);
        held.used -= bytes;
        try {
            free[bytes].push_back(memory);
            held.kept += bytes;
        } catch (const std::bad_alloc&) {  // no room even for the note
            unmap(memory, bytes);
        }
    }

    int64_t release() {
        const std::lock_guard<std::mutex> lock(mutex);
        const int64_t kept = held.kept;
        shrink(0);
        most = held.used;
        return kept;
    }

    std::mutex mutex;
    Held held{0, 0};

  private:
    // Keeps at most so many bytes for later; the largest pieces go first.
    void shrink(int64_t bytes) {
        for (auto size = free.rbegin(); size != free.rend(); ++size)
            while (held.kept > bytes && !size->second.empty()) {
                unmap(size->second.back(), size->first);
                size->second.pop_back();
                held.kept -= size->first;
            }
    }

    std::map<int64_t, std::vector<void*>> free;  // by size
    int64_t most = 0;                            // that was in use at once
};

// Never destroyed: tensors may outlive everything else.
Cache& cache() {
    static Cache* const only = [] {
#ifndef _WIN32
        // A forked child must not find the lock taken by a thread that it does not have.
        pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
#endif
        return new Cache;
    }();
    return *only;
}

// Made when the library is loaded: a child forked while another thread makes it would wait for that thread for ever.
[[maybe_unused]] const Cache& made_at_load = cache();

int64_t large_bytes(int64_t floats) {
    const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
    return floats < kLarge ? 0 : (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

float* scratch(int64_t floats) {
    thread_local std::unique_ptr<float[], Free> memory;
    thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset();
        size = 0;
        memory.reset(allocate(floats));
        size = floats;
    }
    return memory.get();
}

Memory::Memory(int64_t floats) : floats_(floats) {
    const int64_t bytes = large_bytes(floats);
    data_ = bytes ? static_cast<float*>(insist([=] { return cache().take(bytes); })) : allocate(floats);
}

Memory::~Memory() {
    if (const int64_t bytes = large_bytes(floats_))
        cache().give_back(data_, bytes);
    else
        Free()(data_);
}

Held held() {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    return cache().held;
}

int64_t release_memory() { return cache().release(); }

}  // namespace ant5m

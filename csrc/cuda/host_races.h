// Races in a kernel that runs on the host: what compute-sanitizer's racecheck looks for in shared memory, and the same
// in global memory. With -fsanitize=thread the compiler calls a function before each access. Those functions are here,
// instead of the sanitizer's library.
//
// Threads of a block race at a byte when one of them writes it and no sync_threads is between; threads of different
// blocks whenever one writes it. Atomics do not race with each other. Nothing else orders: not that a warp runs in
// lockstep, not a shuffle, mma or ldmatrix. The order in which the host runs threads does not matter, nor what they
// write. Watched are the arrays in shared memory and the tensors among the arguments, so what the shim itself does to
// its own memory and to the stacks of threads does not count.
#pragma once

#define UNWATCHED __attribute__((no_sanitize_thread))

namespace host {

[[noreturn]] inline void fail(const std::string& why);

namespace races {

enum Kind : unsigned { kRead, kWrite, kAtomic, kKinds };

// Who used a byte in one way. Blocks run one after another, and so do the epochs between barriers: what a new access
// races with, if anything, is the first block's or one of two threads' of the last epoch.
struct Users {
  unsigned epoch;                    // the last one, 0: never used
  unsigned block;                    // the first one
  unsigned short first, one, other;  // a thread of that block; two of that epoch, or twice the only one
};

struct Byte {
  Users by[kKinds];
};

struct Memory {
  const char* array;  // its name, null: an argument
  unsigned argument;
  const unsigned char* begin;
  size_t size;
  Byte* bytes;
};

// Plain arrays, as find() may call nothing that is watched; static, as each library has its own.
static Memory memories[64];
static unsigned count = 0, epoch = 0;

inline void barrier() { ++epoch; }

inline void watch(Memory memory) {
  memory.bytes = static_cast<Byte*>(std::calloc(memory.size, sizeof(Byte)));
  if (memory.bytes == nullptr || count == std::size(memories)) std::abort();
  memories[count++] = memory;
}

inline void watch_array(const char* name, void* begin, size_t size) {
  watch({name, 0, static_cast<unsigned char*>(begin), size, nullptr});
}

// Those of a launch, instead of the last one's. `sizes`: bytes from a pointer's target on, 0 of a number.
inline void watch_arguments(void** arguments, const size_t* sizes, unsigned number) {
  unsigned kept = 0;
  for (unsigned i = 0; i < count; ++i)
    if (memories[i].array) memories[kept++] = memories[i];
    else std::free(memories[i].bytes);
  count = kept;
  for (unsigned i = 0; i < number; ++i)
    if (sizes[i]) watch({nullptr, i, *static_cast<unsigned char**>(arguments[i]), sizes[i], nullptr});
}

UNWATCHED inline unsigned block_number() { return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }

inline std::string block_name(unsigned number) {
  const unsigned x = number % gridDim.x, y = number / gridDim.x % gridDim.y, z = number / gridDim.x / gridDim.y;
  return "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

// The running thread and `other`, of `block` if that is another one.
[[noreturn]] inline void report(const Memory& memory, size_t byte, Kind kind, Kind other_kind, unsigned other,
                                unsigned block) {
  const char* const does[kKinds] = {" reads", " writes", " atomically changes"};
  const bool same = memory.array || block == block_number();
  fail("race: thread " + std::to_string(threadIdx.x) + does[kind] + " byte " + std::to_string(byte) + " of " +
       (memory.array ? memory.array : "argument " + std::to_string(memory.argument)) + ", and thread " +
       std::to_string(other) + (same ? "" : " of " + block_name(block)) + does[other_kind] + " it" +
       (same ? ", with no barrier between" : ""));
}

UNWATCHED inline void check(const Memory& memory, size_t byte, Kind kind, Kind other) {
  const Users& users = memory.bytes[byte].by[other];
  if (users.epoch == 0) return;
  if (!memory.array && users.block != block_number()) report(memory, byte, kind, other, users.first, users.block);
  if (users.epoch != epoch) return;
  const unsigned racing = users.one != threadIdx.x ? users.one : users.other;
  if (racing != threadIdx.x) report(memory, byte, kind, other, racing, users.block);
}

UNWATCHED inline void enter(Users& users) {
  const unsigned short thread = threadIdx.x;
  if (users.epoch == 0) users.block = block_number(), users.first = thread;
  if (users.epoch != epoch) users.epoch = epoch, users.one = users.other = thread;
  else if (users.one == users.other) users.other = thread;
}

UNWATCHED inline const Memory* find(const unsigned char* at) {
  for (unsigned i = 0; i < count; ++i)
    if (memories[i].begin <= at && at < memories[i].begin + memories[i].size) return &memories[i];
  return nullptr;
}

UNWATCHED inline void touch(const volatile void* at, size_t size, Kind kind) {
  const auto* const from = static_cast<const unsigned char*>(const_cast<const void*>(at));
  const Memory* const memory = find(from);
  if (memory == nullptr) return;
  const size_t first = from - memory->begin, last = std::min(first + size, memory->size);
  for (size_t byte = first; byte < last; ++byte) {
    for (Kind other : {kRead, kWrite, kAtomic})
      if (other == kWrite || other != kind) check(*memory, byte, kind, other);
    enter(memory->bytes[byte].by[kind]);
  }
}

}  // namespace races
}  // namespace host

// ---- what the compiler calls

#define ACCESS(name, size, kind) \
  UNWATCHED void __tsan_##name##size(void* at) { host::races::touch(at, size, host::races::kind); }
#define ACCESSES(size)                \
  ACCESS(read, size, kRead)           \
  ACCESS(write, size, kWrite)         \
  ACCESS(unaligned_read, size, kRead) \
  ACCESS(unaligned_write, size, kWrite)
#define ATOMICS(bits)                                                                         \
  UNWATCHED std::uint##bits##_t __tsan_atomic##bits##_load(const volatile void* at, int) {    \
    host::races::touch(at, bits / 8, host::races::kAtomic);                                   \
    return *static_cast<const volatile std::uint##bits##_t*>(at);                             \
  }                                                                                           \
  UNWATCHED void __tsan_atomic##bits##_store(volatile void* at, std::uint##bits##_t x, int) { \
    host::races::touch(at, bits / 8, host::races::kAtomic);                                   \
    *static_cast<volatile std::uint##bits##_t*>(at) = x;                                      \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
UNWATCHED void __tsan_read_range(void* at, size_t size) { host::races::touch(at, size, host::races::kRead); }
UNWATCHED void __tsan_write_range(void* at, size_t size) { host::races::touch(at, size, host::races::kWrite); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(8)
ATOMICS(32)
}

#undef UNWATCHED
#undef ACCESS
#undef ACCESSES
#undef ATOMICS

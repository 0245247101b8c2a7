// A GPU in a C++ compiler: ptx.h's functions for a kernel that runs on the host, to test its numbers without a device.
//
// Every thread of a block is a fiber. Shuffles, mma and ldmatrix are meetings of a warp, sync_threads of the block:
// who arrives waits, the last one computes for all. A warp runs as far as it can before the next one starts, in
// ascending or descending order, so a missing barrier shows in the results. Blocks run one after another. Shared
// memory is filled with NaN before each block and has guards on both sides. What would hang or crash a GPU (threads at
// different barriers, lanes at different instructions, misaligned addresses) ends the launch with a message; in a build
// with -fsanitize=thread so does a race, see host_races.h.
#pragma once

#ifdef _FORTIFY_SOURCE
#undef _FORTIFY_SOURCE  // its longjmp takes a switch of stacks for an attack
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define KERNEL(threads, blocks) static void
#define DEVICE [[maybe_unused]] static inline
#define SHARED(type, name, count)                         \
  static host::SharedArray<type, count> name##_in{#name}; \
  type* const name = name##_in.data

// Exports launch_<kernel> and signature_<kernel>, for ctypes.
#define LAUNCHER(kernel)                                                                                           \
  extern "C" const char* launch_##kernel(const unsigned* grid, unsigned threads, bool descending, void** arguments, \
                                         const size_t* sizes) {                                                    \
    return host::launch(kernel, {grid[0], grid[1], grid[2]}, threads, descending, arguments, sizes);               \
  }                                                                                                                \
  extern "C" const char* signature_##kernel() { return host::signature(kernel); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

#ifdef __SANITIZE_THREAD__
#include "host_races.h"
#else
namespace host::races {
inline void watch_array(const char*, void*, size_t) {}
inline void watch_arguments(void**, const size_t*, unsigned) {}
inline void barrier() {}
}  // namespace host::races
#endif

namespace host {

constexpr unsigned kWarp = 32, kGuard = 64, kStack = 256 << 10;
constexpr unsigned char kCanary = 0xa5;

// ---- shared memory

struct SharedRange {
  unsigned char *begin, *end;  // with the guards
};

// Static: what is inline, all libraries of a process share.
static std::vector<SharedRange>& shared_ranges() {
  static std::vector<SharedRange> ranges;
  return ranges;
}

inline void poison(const SharedRange& range) {
  std::memset(range.begin, kCanary, range.end - range.begin);
  std::memset(range.begin + kGuard, 0xff, range.end - range.begin - 2 * kGuard);
}

template <class T, unsigned count>
struct alignas(16) SharedArray {
  unsigned char before[kGuard];
  T data[count];
  unsigned char after[kGuard];

  explicit SharedArray(const char* name) {
    auto* begin = reinterpret_cast<unsigned char*>(this);
    shared_ranges().push_back({begin, begin + sizeof *this});
    poison(shared_ranges().back());
    races::watch_array(name, data, sizeof data);
  }
};

inline bool guards_hold() {
  for (auto& range : shared_ranges())
    for (unsigned i = 0; i < kGuard; ++i)
      if (range.begin[i] != kCanary || range.end[-1 - static_cast<int>(i)] != kCanary) return false;
  return true;
}

// ---- fibers

struct Meeting {
  const char* what = nullptr;
  unsigned arrived = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;  // of use once it has started
  bool started = false;
  const char* waits_for = nullptr;  // null while it can run
  void* operands = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  unsigned current = 0;
  bool descending = false;
  ucontext_t out;
  std::string error;
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}

[[noreturn]] inline void fail(const std::string& why) {
  block()->error = why;
  setcontext(&block()->out);
  std::abort();
}

inline std::string thread_name(unsigned index) { return "thread " + std::to_string(index); }

inline void switch_to(unsigned index) {
  Fiber &from = block()->fibers[block()->current], &to = block()->fibers[index];
  block()->current = threadIdx.x = index;
#ifdef __SANITIZE_ADDRESS__  // does not follow longjmp to another stack
  swapcontext(&from.context, &to.context);
#else  // swapcontext takes a call of the system
  if (_setjmp(from.at)) return;
  if (to.started) _longjmp(to.at, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

// The next fiber that can run: of the same warp first, then of the other warps in order.
inline void switch_away() {
  Block& b = *block();
  const unsigned threads = b.fibers.size(), warps = threads / kWarp, step = b.descending ? kWarp - 1 : 1;
  const unsigned warp = b.current / kWarp, lane = b.current % kWarp;
  for (unsigned w = 0; w < warps; ++w) {
    const unsigned first = (warp + (b.descending ? warps - w : w)) % warps * kWarp;
    for (unsigned i = 1, l = lane; i <= kWarp; ++i) {
      l = (l + step) % kWarp;
      if (b.fibers[first + l].waits_for == nullptr) return switch_to(first + l);
    }
  }
  std::string who;
  for (unsigned i = 0; i < threads; ++i)
    if (i == 0 || b.fibers[i].waits_for != b.fibers[i - 1].waits_for)
      who += (i ? ", " : "") + thread_name(i) + " waits at " + b.fibers[i].waits_for;
  fail("deadlock: " + who);
}

// Waits for `count` fibers from `first` on; the last one calls compute() before all go on.
template <class Compute>
inline void meet(Meeting& meeting, unsigned first, unsigned count, const char* what, void* operands, Compute compute) {
  Block& b = *block();
  if (meeting.arrived && std::strcmp(meeting.what, what))
    fail(thread_name(b.current) + " is at " + what + " while others wait at " + meeting.what);
  meeting.what = what;
  b.fibers[b.current].operands = operands;
  b.fibers[b.current].waits_for = what;
  if (++meeting.arrived < count) return switch_away();
  compute(&b.fibers[first]);
  meeting.arrived = 0;
  for (unsigned i = 0; i < count; ++i) b.fibers[first + i].waits_for = nullptr;
}

template <class Compute>
inline void meet_warp(const char* what, void* operands, Compute compute) {
  const unsigned warp = threadIdx.x / kWarp;
  meet(block()->warps[warp], warp * kWarp, kWarp, what, operands, compute);
}

inline void meet_block(const char* what) {
  meet(block()->all, 0, block()->fibers.size(), what, nullptr, [](Fiber*) { races::barrier(); });
}

// ---- launch

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::decay_t<A>*>(arguments[I])...);
}

template <class... A>
struct Launch {
  static inline void (*kernel)(A...);
  static inline void** arguments;

  static void run() {
    Block& b = *block();
    for (unsigned z = 0; z < gridDim.z; ++z)
      for (unsigned y = 0; y < gridDim.y; ++y)
        for (unsigned x = 0; x < gridDim.x; ++x) {
          meet(b.all, 0, b.fibers.size(), "the start of the kernel", nullptr, [=](Fiber*) {
            blockIdx = {x, y, z};
            for (auto& range : shared_ranges()) poison(range);
            races::barrier();
          });
          call(kernel, arguments, std::index_sequence_for<A...>());
          meet_block("the end of the kernel");
          if (!guards_hold()) fail("a write beyond the end of an array in shared memory");
        }
    setcontext(&b.out);
  }
};

template <class... A>
const char* launch(void (*kernel)(A...), dim3 grid, unsigned threads, bool descending, void** arguments,
                   const size_t* sizes) {
  static std::string message;
  if (threads == 0 || threads % kWarp || threads > 1024) return "a block has 32 to 1,024 threads, in warps of 32";
  Block b;
  b.fibers.resize(threads);
  b.warps.resize(threads / kWarp);
  b.descending = descending;
  const size_t bytes = static_cast<size_t>(threads) * kStack;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the stacks of the threads";
  for (unsigned i = 0; i < threads; ++i) {
    ucontext_t& start = b.fibers[i].context;
    getcontext(&start);
    start.uc_stack.ss_sp = static_cast<unsigned char*>(stacks) + static_cast<size_t>(i) * kStack;
    start.uc_stack.ss_size = kStack;
    makecontext(&start, Launch<A...>::run, 0);
  }
  Launch<A...>::kernel = kernel;
  Launch<A...>::arguments = arguments;
  races::watch_arguments(arguments, sizes, sizeof...(A));
  gridDim = grid;
  blockDim = {threads, 1, 1};
  block() = &b;
  b.current = threadIdx.x = descending ? threads - 1 : 0;
  b.fibers[b.current].started = true;
  swapcontext(&b.out, &b.fibers[b.current].context);
#ifdef __SANITIZE_ADDRESS__  // or the next one to get this memory is blamed for the fibers' frames
  ASAN_UNPOISON_MEMORY_REGION(stacks, bytes);
#endif
  munmap(stacks, bytes);
  if (b.error.empty()) return nullptr;
  char where[64];
  std::snprintf(where, sizeof where, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  message = where + b.error;
  return message.c_str();
}

template <class T>
constexpr char letter() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int> || std::is_same_v<T, float>,
                "kernels take pointers, int and float");
  return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int> ? 'i' : 'f';
}

// One letter an argument: p(ointer), i(nt) or f(loat).
template <class... A>
const char* signature(void (*)(A...)) {
  static const char letters[] = {letter<std::decay_t<A>>()..., 0};
  return letters;
}

template <class T>
T from_bits(std::uint32_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace host

// ---- the functions of ptx.h

using std::max;
using std::min;

DEVICE void sync_threads() { host::meet_block("sync_threads"); }

DEVICE unsigned float_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
DEVICE float float_from_bits(unsigned x) { return host::from_bits<float>(x); }
DEVICE unsigned upper_halves(unsigned low, unsigned high) { return low >> 16 | (high & 0xffff0000u); }
DEVICE unsigned with_sign_of(unsigned x, unsigned sign) { return (x & 0x7fffffffu) | (sign & 0x80000000u); }

DEVICE float to_float(Half x) {
  const unsigned magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
  if (magnitude >= 0x7c00u << 13) return float_from_bits(magnitude | 0xffu << 23 | sign);  // infinity and NaN
  return float_from_bits(float_bits(float_from_bits(magnitude) * 0x1p112f) | sign);
}

DEVICE Half to_half(float x) {
  const unsigned sign = float_bits(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return static_cast<Half>(0x7fff);
  if (magnitude >= 65520.0f) return static_cast<Half>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f)  // subnormal: a multiple of 2^-24
    return static_cast<Half>(sign | static_cast<unsigned>(std::nearbyint(magnitude * 0x1p24f)));
  const unsigned bits = float_bits(magnitude) - (112u << 23);
  return static_cast<Half>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

template <class T>
DEVICE T shfl_xor(T x, int mask) {
  static_assert(sizeof(T) == 4, "a register has 4 bytes");
  if (mask < 0 || mask >= 32) host::fail("shfl_xor beyond the warp");
  struct Operands {
    T in, out;
    int mask;
  } o{x, x, mask};
  host::meet_warp("shfl_xor", &o, [](host::Fiber* lanes) {
    const auto at = [=](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int l = 0; l < 32; ++l) at(l)->out = at(l ^ at(l)->mask)->in;
  });
  return o.out;
}

// c += a b, summed in fp32 in the order of k. A device's order is not documented.
DEVICE void mma_m16n8k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  struct Operands {
    float* c;
    unsigned a[2], b;
  } o{c, {a0, a1}, b};
  host::meet_warp("mma_m16n8k8", &o, [](host::Fiber* lanes) {
    float a[16][8], b[8][8], sum[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto& o = *static_cast<Operands*>(lanes[l].operands);
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 2; ++i) {
        a[g][2 * q + i] = to_float(static_cast<Half>(o.a[0] >> 16 * i));
        a[g + 8][2 * q + i] = to_float(static_cast<Half>(o.a[1] >> 16 * i));
        b[2 * q + i][g] = to_float(static_cast<Half>(o.b >> 16 * i));
        sum[g][2 * q + i] = o.c[i];
        sum[g + 8][2 * q + i] = o.c[2 + i];
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 8; ++k)
        for (int n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; ++l) {
      float* c = static_cast<Operands*>(lanes[l].operands)->c;
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 2; ++i) c[i] = sum[g][2 * q + i], c[2 + i] = sum[g + 8][2 * q + i];
    }
  });
}

namespace host {

inline void check_row(const void* row) {
  const auto* p = static_cast<const unsigned char*>(row);
  if (reinterpret_cast<std::uintptr_t>(p) % 16) fail("ldmatrix from an address that is not a multiple of 16");
  for (auto& range : shared_ranges())
    if (p >= range.begin + kGuard && p + 16 <= range.end - kGuard) return;
  fail("ldmatrix from outside of shared memory");
}

template <bool trans>
void ldmatrix(unsigned (&m)[4], const void* row) {
  check_row(row);
  struct Operands {
    unsigned* m;
    const Half* row;
  } o{m, static_cast<const Half*>(row)};
  meet_warp(trans ? "ldmatrix_x4_trans" : "ldmatrix_x4", &o, [](Fiber* lanes) {
    const auto at = [=](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    const unsigned last = threadIdx.x;
    for (int l = 0; l < 32; ++l) {
      threadIdx.x = last / kWarp * kWarp + l;  // each lane reads what it gets
      for (int i = 0; i < 4; ++i) {
        const int g = l / 4, q = l % 4;
        unsigned half[2];
        for (int j = 0; j < 2; ++j)
          half[j] = trans ? at(8 * i + 2 * q + j)->row[g] : at(8 * i + g)->row[2 * q + j];
        at(l)->m[i] = half[0] | half[1] << 16;
      }
    }
    threadIdx.x = last;
  });
}

}  // namespace host

DEVICE void ldmatrix_x4(unsigned (&m)[4], const void* row) { host::ldmatrix<false>(m, row); }
DEVICE void ldmatrix_x4_trans(unsigned (&m)[4], const void* row) { host::ldmatrix<true>(m, row); }

DEVICE float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }
DEVICE float ex2(float x) { return flush(std::exp2(x)); }
DEVICE float lg2(float x) { return std::log2(flush(x)); }
DEVICE float rcp(float x) { return flush(1 / flush(x)); }

DEVICE unsigned atomicMax(unsigned* at, unsigned x) {
  const unsigned before = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, max(before, x), __ATOMIC_RELAXED);
  return before;
}

// The ops of ant5m._cpu. Each is compiled once per instruction set, in a namespace of that name; dispatch.cpp
// holds the table of the one in use. Only pointers, shapes and strides come in: no torch, no numpy.
#pragma once
#include <cstdint>

#ifndef ANT5M_ISA
#define ANT5M_ISA portable
#endif

namespace ant5m {

struct Ops {
    // Each of `windows` [rows] points to `length` + 1 tokens, which are widened to int64:
    // inputs [rows, length] and the same shifted by one, targets [rows, length].
    void (*gather)(const uint16_t* const* windows, int64_t rows, int64_t length, int64_t* inputs, int64_t* targets);
};

// The table in use. `use` switches to "portable", "avx2" or "avx512" and returns false when this processor
// (or this build) does not have it.
const Ops& ops();
const char* instruction_set();
bool use(const char* name);

#define ANT5M_DECLARE(isa) \
    namespace isa {        \
    void gather(const uint16_t* const*, int64_t, int64_t, int64_t*, int64_t*); \
    }
ANT5M_DECLARE(portable)
#if defined(__x86_64__)
ANT5M_DECLARE(avx2)
ANT5M_DECLARE(avx512)
#endif
#undef ANT5M_DECLARE

}  // namespace ant5m

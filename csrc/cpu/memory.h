// Memory for the ops. Compiled once, not for each instruction set.
#pragma once
#include <cstdint>

namespace ant5m {

// This thread's own memory, at least `floats` long, 64-byte aligned, with undefined content; the next call in the
// same thread gives the same memory again.
float* scratch(int64_t floats);

constexpr int64_t kLarge = 1 << 18;  // floats, from which on a piece of Memory comes from the cache

// 64-byte aligned, with undefined content; may be asked for and destroyed on any thread. Large pieces come from a
// cache of pieces of the same size, which makes the process hold hardly more than was in use at once: a training
// step asks for the same sizes again and again, and malloc either leaves holes between them (a third more memory)
// or has the system clear fresh pages for each (a quarter more time).
class Memory {
  public:
    explicit Memory(int64_t floats);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    float* data() const { return data_; }
    int64_t floats() const { return floats_; }

  private:
    int64_t floats_;
    float* data_;
};

// Bytes of large pieces that the process holds: in use, and kept for later.
struct Held {
    int64_t used, kept;
};
Held held();

// Gives what is kept for later back to the system, and returns how many bytes that were. Memory that the system refuses
// is asked for again after that.
int64_t release_memory();

}  // namespace ant5m

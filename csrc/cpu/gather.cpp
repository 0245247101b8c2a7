// Batch gathering: the data path's hot loop. uint16 tokens out of a memory-mapped shard become the int64 inputs
// and targets of a batch in one pass, where numpy needs a slice, a widening and a copy for each of the two.
// Bound by stores (16 bytes written for 2 read), which stay in the cache for the embedding that reads them next.
#include "ops.h"

namespace ant5m::ANT5M_ISA {

void gather(const uint16_t* const* windows, int64_t rows, int64_t length, int64_t* inputs, int64_t* targets) {
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* window = windows[row];
        int64_t* __restrict input = inputs + row * length;
        int64_t* __restrict target = targets + row * length;
        for (int64_t i = 0; i < length; ++i) {
            input[i] = window[i];
            target[i] = window[i + 1];
        }
    }
}

}  // namespace ant5m::ANT5M_ISA

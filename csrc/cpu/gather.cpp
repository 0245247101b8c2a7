// Batch gathering: the data path's hot loop. uint16 tokens out of a memory-mapped shard become the int64 inputs
// and targets of a batch in one pass, where numpy needs three (slice, widen, copy) for each of the two.
#include "ops.h"

namespace ant5m::ANT5M_ISA {

void gather(const uint16_t* tokens, const int64_t* starts, int64_t rows, int64_t length, int64_t* inputs,
            int64_t* targets) {
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* window = tokens + starts[row];
        for (int64_t i = 0; i < length; ++i) {
            inputs[row * length + i] = window[i];
            targets[row * length + i] = window[i + 1];
        }
    }
}

}  // namespace ant5m::ANT5M_ISA

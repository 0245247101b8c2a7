// silu(gate) * up (Shazeer, 2020); the backward pass recomputes the sigmoid.
#include "ops.h"
#include "parallel.h"
#include "silu.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kRowsATask = 32;

}  // namespace

void swiglu_forward(int64_t rows, int64_t width, const float* gate, int64_t gate_row, const float* up, int64_t up_row,
                    float* out, int threads) {
    parallel_rows(threads, rows, kRowsATask, [=](int64_t, int64_t row) {
        for_vectors(width, [=](int64_t i, auto load, auto store) {
            const Vec x = load(gate + row * gate_row + i);
            store(out + row * width + i, x * sigmoid(x) * load(up + row * up_row + i));
        });
    });
}

void swiglu_backward(int64_t rows, int64_t width, const float* gate, int64_t gate_row, const float* up, int64_t up_row,
                     const float* grad, int64_t grad_row, float* grad_gate, float* grad_up, int64_t grad_in_row,
                     int threads) {
    parallel_rows(threads, rows, kRowsATask, [=](int64_t, int64_t row) {
        for_vectors(width, [=](int64_t i, auto load, auto store) {
            const SiluGradient silu(load(gate + row * gate_row + i));
            const Vec g = load(grad + row * grad_row + i);
            store(grad_up + row * grad_in_row + i, g * silu.value);
            store(grad_gate + row * grad_in_row + i, g * load(up + row * up_row + i) * silu.slope);
        });
    });
}

}  // namespace ant5m::ANT5M_ISA

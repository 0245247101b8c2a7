// RMSNorm with the residual stream's addition (Zhang and Sennrich, 2019): one pass over a row forward, one backward.
#include <math.h>

#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kRowsATask = 64;  // part of the result: the gradient of weight is summed by tasks

}  // namespace

void rms_norm_forward(int64_t rows, int64_t dim, float eps, const float* x, int64_t x_row, const float* residual,
                      int64_t residual_row, const float* weight, float* out, float* total, float* rstd, int threads) {
    parallel_rows(threads, rows, kRowsATask, [=](int64_t, int64_t row) {
        const float* from = x + row * x_row;
        Vec squares = {};
        if (residual) {
            const float* other = residual + row * residual_row;
            float* to = total + row * dim;
            for_vectors(dim, [&](int64_t i, auto load, auto store) {
                const Vec sum = load(from + i) + load(other + i);
                squares += sum * sum;
                store(to + i, sum);
            });
            from = to;
        } else {
            for_vectors(dim, [&](int64_t i, auto load, auto) {
                const Vec value = load(from + i);
                squares += value * value;
            });
        }
        const float factor = rstd[row] = 1.0f / sqrtf(sum(squares) / static_cast<float>(dim) + eps);
        for_vectors(dim, [&](int64_t i, auto load, auto store) {
            store(out + row * dim + i, load(from + i) * factor * load(weight + i));
        });
    });
}

void rms_norm_backward(int64_t rows, int64_t dim, const float* x, int64_t x_row, const float* weight,
                       const float* rstd, const float* grad, int64_t grad_row, const float* grad_total,
                       int64_t grad_total_row, float* grad_x, float* grad_weight, int threads) {
    const int64_t tasks = (rows + kRowsATask - 1) / kRowsATask;
    const Memory parts(tasks * dim);
    std::memset(parts.data(), 0, sizeof(float) * tasks * dim);
    parallel_rows(threads, rows, kRowsATask, [=, &parts](int64_t task, int64_t row) {
        const float* from = x + row * x_row;
        const float* grad_out = grad + row * grad_row;
        float* part = parts.data() + task * dim;
        float* to = grad_x + row * dim;
        const float factor = rstd[row];
        Vec along = {};
        for_vectors(dim, [&](int64_t i, auto load, auto store) {
            const Vec unit = load(from + i) * factor;
            const Vec grad_unit = load(grad_out + i);
            store(part + i, load(part + i) + grad_unit * unit);
            along += grad_unit * load(weight + i) * unit;
        });
        const float mean = sum(along) / static_cast<float>(dim);
        for_vectors(dim, [&](int64_t i, auto load, auto store) {
            const Vec unit = load(from + i) * factor;
            Vec result = (load(grad_out + i) * load(weight + i) - unit * mean) * factor;
            if (grad_total) result += load(grad_total + row * grad_total_row + i);
            store(to + i, result);
        });
    });
    std::memset(grad_weight, 0, sizeof(float) * dim);
    for (int64_t task = 0; task < tasks; ++task)
        for (int64_t i = 0; i < dim; ++i) grad_weight[i] += parts.data()[task * dim + i];
}

}  // namespace ant5m::ANT5M_ISA

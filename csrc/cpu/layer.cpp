// A layer of a Llama around its attention, when no gradient is wanted: what lies between its products never leaves L2.
#include <math.h>

#include "block.h"
#include "memory.h"
#include "parallel.h"

namespace ant5m::ANT5M_ISA {
namespace {

// to = RMSNorm of the tokens x; both [panels, dim, kLanes].
void norm_lanes(const Block& block, const float* x, int64_t dim, float eps, const float* weight, float* to) {
    for (int64_t panel = 0; panel < block.panels; ++panel)
        for (int j = 0; j < kVecs; ++j) {
            const int64_t at = panel * dim * kLanes + j * kWidth;
            Vec squares = {};
            for (int64_t d = 0; d < dim; ++d) {
                const Vec value = load(x + at + d * kLanes);
                squares += value * value;
            }
            float scales[kWidth];
            store(scales, squares / static_cast<float>(dim) + eps);
            for (float& scale : scales) scale = 1.0f / sqrtf(scale);
            const Vec scale = load(scales);
            for (int64_t d = 0; d < dim; ++d) store(to + at + d * kLanes, load(x + at + d * kLanes) * scale * weight[d]);
        }
}

// out (+)= the product of weight [rows, depth] and x [panels, depth, kLanes]: [panels, rows, kLanes].
template <bool kAdd>
void multiply_lanes(const Block& block, int64_t rows, int64_t depth, const float* weight, const float* x, float* out) {
    for (int64_t panel = 0; panel < block.panels; ++panel)
        multiply_panel<Fp32, kVecs, kAdd>(rows, depth, {weight, depth, 1}, x + panel * depth * kLanes, kLanes,
                                    out + panel * rows * kLanes, kLanes);
}

}  // namespace

void norm_product(int64_t tokens, int64_t dim, int64_t rows, const float* x, int64_t x_row, float eps,
                  const float* norm, const float* weight, float* out, int threads) {
    parallel(threads, divide_up(tokens, kTokens), [&](int64_t index) {
        const Block block(tokens, index);
        float* x_lanes = scratch(kTokens * (dim + rows));
        float* out_lanes = x_lanes + kTokens * dim;
        load_lanes<Fp32>(block, x, x_row, dim, x_lanes);
        norm_lanes(block, x_lanes, dim, eps, norm, x_lanes);
        multiply_lanes<false>(block, rows, dim, weight, x_lanes, out_lanes);
        store_lanes(block, out_lanes, rows, out);
    });
}

void finish_layer(const MlpShape& shape, int64_t inner, const float* mixed, int64_t mixed_row, const float* residual,
                  int64_t residual_row, const float* weight, float eps, const float* norm, const float* gate,
                  const float* up, const float* down, float* out, int threads) {
    parallel(threads, divide_up(shape.tokens, kTokens), [&](int64_t index) {
        const Block block(shape.tokens, index);
        float* memory = scratch(kMlpScratch + kTokens * (2 * shape.dim + inner));
        float* total = memory + kMlpScratch;  // [panels, dim, kLanes]
        float* x = total + kTokens * shape.dim;
        float* mixed_lanes = x + kTokens * shape.dim;
        load_lanes<Fp32>(block, mixed, mixed_row, inner, mixed_lanes);
        load_lanes<Fp32>(block, residual, residual_row, shape.dim, total);
        multiply_lanes<true>(block, shape.dim, inner, weight, mixed_lanes, total);
        norm_lanes(block, total, shape.dim, eps, norm, x);
        add_mlp<Fp32>(shape, block, x, gate, up, down, total, memory);
        store_lanes(block, total, shape.dim, out);
    });
}

}  // namespace ant5m::ANT5M_ISA

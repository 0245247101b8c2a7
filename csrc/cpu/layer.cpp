// A layer of a Llama around its attention, when no gradient is wanted: what lies between its products never leaves L2.
#include <math.h>

#include "block.h"
#include "skinny_gemm.h"
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
            float of_lanes[kWidth];
            store(of_lanes, squares / static_cast<float>(dim) + eps);
            for (float& lane : of_lanes) lane = 1.0f / sqrtf(lane);
            const Vec rstd = load(of_lanes);
            for (int64_t d = 0; d < dim; ++d) store(to + at + d * kLanes, load(x + at + d * kLanes) * rstd * weight[d]);
        }
}

// out (+)= the product of weight [rows, depth] and x [panels, depth, kLanes]: [panels, rows, kLanes].
template <bool kAdd>
void multiply_lanes(const Block& block, int64_t rows, int64_t depth, const float* weight, const float* x, float* out) {
    for (int64_t panel = 0; panel < block.panels; ++panel)
        multiply_panel<Fp32, kVecs, kAdd>(rows, depth, {weight, depth, 1}, x + panel * depth * kLanes, kLanes,
                                    out + panel * rows * kLanes, kLanes);
}

// to [tokens, dim] = RMSNorm of the tokens x [tokens, x_row].
void norm_rows(int64_t tokens, const float* x, int64_t x_row, int64_t dim, float eps, const float* weight, float* to) {
    for (int64_t t = 0; t < tokens; ++t, x += x_row, to += dim) {
        Vec squares = {};
        for_vectors(dim, [&](int64_t d, auto read, auto) {
            const Vec value = read(x + d);
            squares += value * value;
        });
        const float rstd = 1.0f / sqrtf(sum(squares) / static_cast<float>(dim) + eps);
        for_vectors(dim, [&](int64_t d, auto read, auto write) { write(to + d, read(x + d) * rstd * read(weight + d)); });
    }
}

void skinny_post_attention(const MlpShape& shape, int64_t inner, const float* attn_out, int64_t attn_out_row,
                           const float* residual, int64_t residual_row, const float* weight, float eps,
                           const float* norm, const float* gate, const float* up, const float* down, float* out,
                           int threads) {
    const auto [tokens, dim, width] = shape;
    float* x = scratch(tokens * (dim + 2 * width));
    float* gates = x + tokens * dim;
    float* ups = gates + tokens * width;
    for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(out + t * dim, residual + t * residual_row, sizeof(float) * dim);
    skinny_gemm<true>(tokens, dim, inner, weight, attn_out, attn_out_row, out, dim, threads);
    norm_rows(tokens, out, dim, dim, eps, norm, x);
    for_rows(threads, width, dim, [&](int64_t first, int64_t count) {
        skinny_gemm_rows<false>(tokens, count, dim, gate + first * dim, x, dim, gates + first, width);
        skinny_gemm_rows<false>(tokens, count, dim, up + first * dim, x, dim, ups + first, width);
        for (int64_t t = 0; t < tokens; ++t) {
            float *g = gates + t * width + first, *u = ups + t * width + first;
            for_vectors(count, [&](int64_t i, auto read, auto write) {
                const Vec value = read(g + i);
                write(g + i, value * sigmoid(value) * read(u + i));
            });
        }
    });
    skinny_gemm<true>(tokens, dim, width, down, gates, width, out, dim, threads);
}

}  // namespace

void rms_norm_linear(int64_t tokens, int64_t dim, int64_t rows, const float* x, int64_t x_row, float eps,
                     const float* norm, const float* weight, float* out, int64_t out_row, int threads) {
    if (tokens < kSkinnyTokens) {
        float* normed = scratch(tokens * dim);
        norm_rows(tokens, x, x_row, dim, eps, norm, normed);
        return skinny_gemm<false>(tokens, rows, dim, weight, normed, dim, out, out_row, threads);
    }
    const int64_t size = tokens_of_block(tokens, threads);
    parallel(threads, divide_up(tokens, size), [&](int64_t index) {
        const Block block(tokens, index, size);
        float* x_lanes = scratch(kTokens * (dim + rows));
        float* out_lanes = x_lanes + kTokens * dim;
        load_lanes<Fp32>(block, x, x_row, dim, x_lanes);
        norm_lanes(block, x_lanes, dim, eps, norm, x_lanes);
        multiply_lanes<false>(block, rows, dim, weight, x_lanes, out_lanes);
        store_lanes(block, out_lanes, rows, out, out_row);
    });
}

void fused_post_attention(const MlpShape& shape, int64_t inner, const float* attn_out, int64_t attn_out_row,
                          const float* residual, int64_t residual_row, const float* weight, float eps,
                          const float* norm, const float* gate, const float* up, const float* down, float* out,
                          int threads) {
    if (shape.tokens < kSkinnyTokens)
        return skinny_post_attention(shape, inner, attn_out, attn_out_row, residual, residual_row, weight, eps, norm,
                                     gate, up, down, out, threads);
    const int64_t size = tokens_of_block(shape.tokens, threads);
    parallel(threads, divide_up(shape.tokens, size), [&](int64_t index) {
        const Block block(shape.tokens, index, size);
        float* memory = scratch(kMlpScratch + kTokens * (2 * shape.dim + inner));
        float* total = memory + kMlpScratch;  // [panels, dim, kLanes]
        float* x = total + kTokens * shape.dim;
        float* attn_lanes = x + kTokens * shape.dim;
        load_lanes<Fp32>(block, attn_out, attn_out_row, inner, attn_lanes);
        load_lanes<Fp32>(block, residual, residual_row, shape.dim, total);
        multiply_lanes<true>(block, shape.dim, inner, weight, attn_lanes, total);
        norm_lanes(block, total, shape.dim, eps, norm, x);
        add_mlp<Fp32>(shape, block, x, gate, up, down, total, memory);
        store_lanes(block, total, shape.dim, out, shape.dim);
    });
}

}  // namespace ant5m::ANT5M_ISA

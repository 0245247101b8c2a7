// Skinny GEMM: products of few tokens, as in generation: what layer.cpp and product.cpp share.
#pragma once
#include "parallel.h"
#include "simd.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

// Below kSkinnyTokens tokens most lanes would be empty: so a vector holds consecutive channels of one token, and weights,
// which come from memory, are read once for kGroup tokens. What a token becomes does not depend on the others.
constexpr int64_t kSkinnyTokens = 16;
constexpr int kGroup = 4, kDots = kWidth == 16 ? 4 : 2;

// y [kT, y_row] (+)= x [kT, x_row] times kR rows of `depth` weights.
template <int kR, int kT, bool kAdd>
void dot_rows(int64_t depth, const float* weight, const float* x, int64_t x_row, float* y, int64_t y_row) {
    Vec sums[kR][kT] = {};
    const auto visit = [&](int64_t d, auto read) {
        Vec w[kR];
        ANT5M_UNROLL for (int r = 0; r < kR; ++r) w[r] = read(weight + r * depth + d);
        ANT5M_UNROLL for (int t = 0; t < kT; ++t) {
            const Vec v = read(x + t * x_row + d);
            ANT5M_UNROLL for (int r = 0; r < kR; ++r) sums[r][t] += w[r] * v;
        }
    };
    int64_t d = 0;
    for (; d + kWidth <= depth; d += kWidth) visit(d, load);
    if (d < depth) visit(d, [left = depth - d](const float* p) { return load_part(p, left); });
    for (int t = 0; t < kT; ++t)
        for (int r = 0; r < kR; ++r) {
            float& to = y[t * y_row + r];
            to = (kAdd ? to : 0.0f) + sum(sums[r][t]);
        }
}

template <int kT, bool kAdd>
void multiply_group(int64_t rows, int64_t depth, const float* weight, const float* x, int64_t x_row, float* y,
                    int64_t y_row) {
    int64_t i = 0;
    for (; i + kDots <= rows; i += kDots) dot_rows<kDots, kT, kAdd>(depth, weight + i * depth, x, x_row, y + i, y_row);
    for (; i < rows; ++i) dot_rows<1, kT, kAdd>(depth, weight + i * depth, x, x_row, y + i, y_row);
}

// y [tokens, y_row] (+)= x [tokens, x_row] times the transpose of weight [rows, depth].
template <bool kAdd>
void skinny_gemm_rows(int64_t tokens, int64_t rows, int64_t depth, const float* weight, const float* x, int64_t x_row,
                       float* y, int64_t y_row) {
    for (; tokens >= kGroup; tokens -= kGroup, x += kGroup * x_row, y += kGroup * y_row)
        multiply_group<kGroup, kAdd>(rows, depth, weight, x, x_row, y, y_row);
    if (tokens == 3) multiply_group<3, kAdd>(rows, depth, weight, x, x_row, y, y_row);
    if (tokens == 2) multiply_group<2, kAdd>(rows, depth, weight, x, x_row, y, y_row);
    if (tokens == 1) multiply_group<1, kAdd>(rows, depth, weight, x, x_row, y, y_row);
}

// Calls body(first, count) for parts of the rows of a weight, on several threads where that is worth waking them.
template <typename Body>
void for_rows(int threads, int64_t rows, int64_t depth, const Body& body) {
    constexpr int64_t kPart = 64;
    parallel(threads_for(rows * depth, threads), divide_up(rows, kPart), [&](int64_t index) {
        const int64_t first = index * kPart;
        body(first, smaller(kPart, rows - first));
    });
}

// The same by parts of the rows.
template <bool kAdd>
void skinny_gemm(int64_t tokens, int64_t rows, int64_t depth, const float* weight, const float* x, int64_t x_row,
                  float* y, int64_t y_row, int threads) {
    for_rows(threads, rows, depth, [&](int64_t first, int64_t count) {
        skinny_gemm_rows<kAdd>(tokens, count, depth, weight + first * depth, x, x_row, y + first, y_row);
    });
}

}  // namespace
}  // namespace ant5m::ANT5M_ISA

// The one matrix product that attention and the head are made of: small operands in L1 and L2, vectors along the
// columns of B and C, elements of A broadcast.
#pragma once
#include "simd.h"

namespace ant5m::ANT5M_ISA {

// A register tile has kRows x kVecs accumulators: enough to hide the latency of a multiply-add (8 on AVX-512),
// few enough to stay in registers, and fewer loads than multiply-adds. On a Sapphire Rapids core 8 x 2 reaches
// the rate of MKL's large products (185 GFLOP/s fp32), without any packing of A.
constexpr int kVecs = 2;
constexpr int kLanes = kVecs * kWidth;  // columns of a panel of B

// What is done to a finished element of C before it is stored: nothing.
struct Keep {
    Vec operator()(Vec c, int64_t, int) const { return c; }
};

// A matrix operand read element by element: (i, k) is at data[i * row + k * column].
struct Operand {
    const float* data;
    int64_t row, column;
    Operand from(int64_t i, int64_t k = 0) const { return {data + i * row + k * column, row, column}; }
};

template <int R, int V, bool kAdd, typename Finish>
inline void register_tile(int64_t depth, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t i0,
                          const Finish& finish) {
    Vec sum[R][V];
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = kAdd ? load(c + i * ldc + j * kWidth) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[V];
        ANT5M_UNROLL for (int j = 0; j < V; ++j) row[j] = load(b + k * ldb + j * kWidth);
        ANT5M_UNROLL for (int i = 0; i < R; ++i) {
            Vec element = broadcast(a.data[i * a.row + k * a.column]);
            ANT5M_UNROLL for (int j = 0; j < V; ++j) sum[i][j] += element * row[j];
        }
    }
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) store(c + i * ldc + j * kWidth, finish(sum[i][j], i0 + i, j));
}

// C [rows, V * kWidth] = (C +) A [rows, depth] B [depth, V * kWidth]; `finish(value, row, vector)` is what is stored.
template <int V, bool kAdd, int R = kRows, typename Finish = Keep>
inline void multiply_panel(int64_t rows, int64_t depth, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
                           const Finish& finish = {}, int64_t i = 0) {
    for (; i + R <= rows; i += R)
        register_tile<R, V, kAdd>(depth, a.from(i), b, ldb, c + i * ldc, ldc, i, finish);
    if constexpr (R > 1) multiply_panel<V, kAdd, R == 6 ? 4 : R / 2>(rows, depth, a, b, ldb, c, ldc, finish, i);
}

// C [rows, columns] += A [rows, depth] B [depth, columns]; columns is a multiple of kWidth.
inline void multiply_add(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
                         int64_t ldc) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) multiply_panel<kVecs, true>(rows, depth, a, b + j, ldb, c + j, ldc);
    if (j < columns) multiply_panel<1, true>(rows, depth, a, b + j, ldb, c + j, ldc);
}

}  // namespace ant5m::ANT5M_ISA

// The one matrix product that attention, the MLP and the head are made of: small operands in L1 and L2, vectors along
// the columns of B and C, elements of A broadcast.
#pragma once
#include <type_traits>

#include "vnni.h"

namespace ant5m::ANT5M_ISA {

// The tile of the microkernel has kRows x kVecs accumulators: enough to hide the latency of a multiply-add (8 on
// AVX-512), few enough to stay in registers, and fewer loads than multiply-adds. On a Sapphire Rapids core 8 x 2 reaches
// the rate of MKL's large products (185 GFLOP/s fp32), without any packing of A.
constexpr int kVecs = 2;
constexpr int kLanes = kVecs * kWidth;  // columns of a panel of B

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of each of so many parts or more of them; even, because of pairs.
inline int64_t part_of(int64_t rows, int64_t parts) { return larger(2, rows / parts / 2 * 2); }

// What is done to a finished element of C before it is stored: nothing.
struct Keep {
    Vec operator()(Vec c, int64_t, int) const { return c; }
};

// A matrix operand read 32 bits by 32 bits: (i, k) is at data[i * row + k * column].
struct Operand {
    const float* data;
    int64_t row, column;
};

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
// BFMMLA multiplies two rows of A by two columns of B over two pairs of the depth: twice what BFDOT does. Tiles of two
// by two lie in a vector one row behind the other; two tiles of the same rows are two vectors of C, halves exchanged.
inline Vec exchange_low(Vec a, Vec b) { return (Vec)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
inline Vec exchange_high(Vec a, Vec b) { return (Vec)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }

// Two pairs of each of R rows of A, from the pair k on, two rows a vector; behind the depth 0. kRowMajor: the pairs of a
// row are neighbors, else the rows of a pair are.
template <bool kRowMajor, bool kWhole, int R>
inline void load_row_pairs(const float* a, int64_t row, int64_t column, int64_t k, Vec (&to)[R / 2]) {
    if constexpr (kRowMajor) {
        const auto two = [&](int i) {
            return kWhole ? vld1_f32(a + i * row + k) : vset_lane_f32(a[i * row + k], vdup_n_f32(0), 0);
        };
        ANT5M_UNROLL for (int i = 0; i < R / 2; ++i) to[i] = (Vec)vcombine_f32(two(2 * i), two(2 * i + 1));
    } else if constexpr (R == 2) {
        const float32x2_t first = vld1_f32(a + k * column);
        const float32x2_t second = kWhole ? vld1_f32(a + (k + 1) * column) : vdup_n_f32(0);
        to[0] = (Vec)vcombine_f32(vzip1_f32(first, second), vzip2_f32(first, second));
    } else {
        ANT5M_UNROLL for (int i = 0; i < R / 4; ++i) {
            const auto first = (float32x4_t)load(a + k * column + 4 * i);
            const auto second = (float32x4_t)(kWhole ? load(a + (k + 1) * column + 4 * i) : Vec{});
            to[2 * i] = (Vec)vzip1q_f32(first, second);
            to[2 * i + 1] = (Vec)vzip2q_f32(first, second);
        }
    }
}

template <bool kRowMajor, int R, int V, bool kAdd, typename Epilogue>
[[gnu::noinline]] void matrix_microkernel(int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                                          int64_t ldb, float* c, int64_t ldc, const Epilogue& epilogue, int64_t first) {
    Vec sum[R / 2][2 * V];
    ANT5M_UNROLL for (int i = 0; i < R / 2; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) {
            const Vec upper = kAdd ? load(c + 2 * i * ldc + j * kWidth) : Vec{};
            const Vec lower = kAdd ? load(c + (2 * i + 1) * ldc + j * kWidth) : Vec{};
            sum[i][2 * j] = exchange_low(upper, lower);
            sum[i][2 * j + 1] = exchange_high(upper, lower);
        }
    const auto visit = [&](int64_t k, auto whole) {
        Vec rows[R / 2], columns[2 * V];
        load_row_pairs<kRowMajor, whole.value, R>(a, row, column, k, rows);
        ANT5M_UNROLL for (int j = 0; j < V; ++j) {
            const auto upper = (float32x4_t)load(b + k * ldb + j * kWidth);
            const auto lower = (float32x4_t)(whole.value ? load(b + (k + 1) * ldb + j * kWidth) : Vec{});
            columns[2 * j] = (Vec)vzip1q_f32(upper, lower);
            columns[2 * j + 1] = (Vec)vzip2q_f32(upper, lower);
        }
        ANT5M_UNROLL for (int i = 0; i < R / 2; ++i)
            ANT5M_UNROLL for (int j = 0; j < 2 * V; ++j)
                sum[i][j] = (Vec)vbfmmlaq_f32((float32x4_t)sum[i][j], (bfloat16x8_t)rows[i], (bfloat16x8_t)columns[j]);
    };
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2) visit(k, std::true_type());
    if (k < depth) visit(k, std::false_type());
    Vec out[R][V];
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) {
            const Vec *tiles = &sum[i / 2][2 * j];
            out[i][j] = epilogue(i % 2 ? exchange_high(tiles[0], tiles[1]) : exchange_low(tiles[0], tiles[1]), first + i, j);
        }
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) store(c + i * ldc + j * kWidth, out[i][j]);
}
#endif

// Never inlined: inside a larger function the accumulators are the first to be spilled, and the product runs at half
// its speed (measured with GCC 12 on AVX2).
template <typename Format, int R, int V, bool kAdd, typename Epilogue>
[[gnu::noinline]] void microkernel(int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                                     int64_t ldb, float* c, int64_t ldc, const Epilogue& epilogue, int64_t first) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    if constexpr (Format::kVnni == 2 && R % 2 == 0) {
        if (column == 1) return matrix_microkernel<true, R, V, kAdd>(depth, a, row, column, b, ldb, c, ldc, epilogue, first);
        if (row == 1) return matrix_microkernel<false, R, V, kAdd>(depth, a, row, column, b, ldb, c, ldc, epilogue, first);
    }
#endif
    Vec sum[R][V];
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = kAdd ? load(c + i * ldc + j * kWidth) : Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        Vec from[V];
        ANT5M_UNROLL for (int j = 0; j < V; ++j) from[j] = load(b + k * ldb + j * kWidth);
        ANT5M_UNROLL for (int i = 0; i < R; ++i) {
            const Vec element = Format::broadcast(a + i * row + k * column);
            ANT5M_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = Format::multiply_add(element, from[j], sum[i][j]);
        }
    }
    // All of them before the first is stored, so that what `epilogue` gathers can stay in registers.
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) sum[i][j] = epilogue(sum[i][j], first + i, j);
    ANT5M_UNROLL for (int i = 0; i < R; ++i)
        ANT5M_UNROLL for (int j = 0; j < V; ++j) store(c + i * ldc + j * kWidth, sum[i][j]);
}

// C [rows, V * kWidth] = (C +) A [rows, depth] B [depth, V * kWidth]; `epilogue(value, row, vector)` is what is stored.
// Depth counts numbers; the strides of A and B are packed.
template <typename Format, int V, bool kAdd, int R = kRows, typename Epilogue = Keep>
inline void multiply_panel(int64_t rows, int64_t depth, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
                           const Epilogue& epilogue = {}, int64_t i = 0) {
    for (; i + R <= rows; i += R)
        microkernel<Format, R, V, kAdd>(Format::count(depth), a.data + i * a.row, a.row, a.column, b, ldb, c + i * ldc,
                                        ldc, epilogue, i);
    if constexpr (R > 1)
        multiply_panel<Format, V, kAdd, R == 6 ? 4 : R / 2>(rows, depth, a, b, ldb, c, ldc, epilogue, i);
}

// C [rows, columns] = (C +) A [rows, depth] B [depth, columns]; columns is a multiple of kWidth.
template <typename Format, bool kAdd>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t ldb, float* c,
                     int64_t ldc) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes)
        multiply_panel<Format, kVecs, kAdd>(rows, depth, a, b + j, ldb, c + j, ldc);
    if (j < columns) multiply_panel<Format, 1, kAdd>(rows, depth, a, b + j, ldb, c + j, ldc);
}

// B's columns for a product, at `data`, rows `row` apart.
struct Columns {
    const float* data;
    int64_t row;
};

// Of a panel [depth, kLanes] of numbers: where they lie for fp32, else packed in `spare`.
template <typename Format>
inline Columns panel_of(int64_t depth, const float* from, int64_t row, float* spare) {
    if (Format::kVnni == 1) return {from, row};
    Format::pack_rows(depth, kLanes, from, row, spare, kLanes);
    return {spare, kLanes};
}

}  // namespace ant5m::ANT5M_ISA

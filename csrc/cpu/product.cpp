// The products between the ops, and their gradients: in bf16 of numbers that stay in fp32, which torch could only
// convert before and after, and in fp32, where torch's are no faster and their sums depend on the number of threads.
#include "skinny_gemm.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kTokens = 64;  // of a block: packed they stay in L1 beside a panel of the weight
constexpr int64_t kDepth = 256;  // tokens of a sum at a time: so do two packed panels of them

// A matrix [depth, columns] as products read it: packed along the depth, in panels [Format::count(depth), kLanes] of
// its columns, zero behind the last.
template <typename Format>
class Panels {
  public:
    Panels(int64_t depth, int64_t columns, const float* x, int64_t x_row, int threads)
        : size_(Format::count(depth) * kLanes), memory_(divide_up(columns, kLanes) * size_) {
        parallel(threads, divide_up(depth, kDepth), [&](int64_t index) {
            const int64_t first = index * kDepth;
            const int64_t n = smaller(kDepth, depth - first);
            for (int64_t column = 0; column < columns; column += kLanes) {
                const int64_t lanes = smaller(kLanes, columns - column);
                float* to = at(column, first);
                if (lanes < kLanes) std::memset(to, 0, sizeof(float) * Format::count(n) * kLanes);
                Format::pack_rows(n, lanes, x + first * x_row + column, x_row, to, kLanes);
            }
        });
    }

    // The panel that begins with `column`, from `depth` on, which is even.
    float* at(int64_t column, int64_t depth = 0) const {
        return memory_.data() + column / kLanes * size_ + depth / Format::kVnni * kLanes;
    }

  private:
    int64_t size_;
    Memory memory_;
};

template <typename Format>
void multiply_rows(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
                   bool transposed, float* out, int threads) {
    const Memory turned(transposed ? 0 : depth * rows);
    if (!transposed) {
        transpose(rows, depth, weight, depth, turned.data(), rows);
        weight = turned.data();
    }
    const Panels<Format> panels(depth, rows, weight, rows, threads);
    parallel(threads, divide_up(tokens, kTokens), [&](int64_t index) {
        const int64_t first = index * kTokens;
        const int64_t n = smaller(kTokens, tokens - first);
        const int64_t packed_depth = Format::count(depth);
        float* from = scratch(kTokens * (packed_depth + kLanes));
        float* part = from + kTokens * packed_depth;
        Format::pack_columns(n, depth, x + first * x_row, x_row, from, packed_depth);
        for (int64_t row = 0; row < rows; row += kLanes) {
            float* to = out + first * rows + row;
            const bool whole = row + kLanes <= rows;
            multiply_panel<Format, kVecs, false>(n, depth, {from, packed_depth, 1}, panels.at(row), kLanes,
                                                 whole ? to : part, whole ? rows : kLanes);
            for (int64_t i = 0; !whole && i < n; ++i)
                std::memcpy(to + i * rows, part + i * kLanes, sizeof(float) * (rows - row));
        }
    });
}

template <typename Format>
void multiply_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                          int64_t b_row, float* out, int threads) {
    constexpr bool kWhereItLies = Format::kVnni == 1;  // a, whose elements are broadcast
    const Panels<Format> a_panels(kWhereItLies ? 0 : tokens, rows, a, a_row, threads);
    const Panels<Format> b_panels(tokens, columns, b, b_row, threads);
    const int64_t padded = divide_up(columns, kLanes) * kLanes;
    parallel(threads, divide_up(rows, kLanes), [&](int64_t panel) {
        const int64_t first = panel * kLanes;
        const int64_t n = smaller(kLanes, rows - first);
        float* sum = scratch(n * padded);
        std::memset(sum, 0, sizeof(float) * n * padded);
        for (int64_t start = 0; start < tokens; start += kDepth) {
            const Operand rows_of_a = kWhereItLies ? Operand{a + start * a_row + first, 1, a_row}
                                                   : Operand{a_panels.at(first, start), 1, kLanes};
            for (int64_t column = 0; column < columns; column += kLanes)
                multiply_panel<Format, kVecs, true>(n, smaller(kDepth, tokens - start), rows_of_a,
                                                  b_panels.at(column, start), kLanes, sum + column, padded);
        }
        for (int64_t i = 0; i < n; ++i)
            std::memcpy(out + (first + i) * columns, sum + i * padded, sizeof(float) * columns);
    });
}

}  // namespace

void product(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
             bool transposed, float* out, bool bf16, int threads) {
    if (tokens < kSkinnyTokens && !transposed && !bf16)
        return skinny_gemm<false>(tokens, rows, depth, weight, x, x_row, out, rows, threads);
    with_format(bf16, [&](auto format) {
        multiply_rows<decltype(format)>(tokens, depth, rows, x, x_row, weight, transposed, out, threads);
    });
}

void product_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                         int64_t b_row, float* out, bool bf16, int threads) {
    with_format(bf16, [&](auto format) {
        multiply_over_tokens<decltype(format)>(tokens, rows, columns, a, a_row, b, b_row, out, threads);
    });
}

}  // namespace ant5m::ANT5M_ISA

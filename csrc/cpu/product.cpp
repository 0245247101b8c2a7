// The products between the ops, and their gradients: in bf16 of numbers that stay in fp32, which torch could only
// convert before and after, and in fp32, where torch's are no faster and their sums depend on the number of threads.
#include "skinny_gemm.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "gemm.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kTokens = 64;  // of a block: packed they stay in L2, and in L1 the rows of one tile
constexpr int64_t kDepth = 256;  // of a sum at a time: so does a packed panel of them
constexpr int64_t kPart = 64;    // rows transposed at a time

// A matrix [depth, columns] as products read it: packed along the depth, in panels [Format::count(depth), kLanes] of
// its columns, zero behind the last.
template <typename Format>
class Panels {
  public:
    Panels(int64_t depth, int64_t columns)
        : depth_(depth), columns_(columns), size_(Format::count(depth) * kLanes),
          memory_(divide_up(columns, kLanes) * size_) {}

    // Of x [depth, columns].
    void pack(const float* x, int64_t x_row, int threads) {
        parallel(threads, divide_up(depth_, kDepth), [&](int64_t index) {
            const int64_t first = index * kDepth;
            const int64_t n = smaller(kDepth, depth_ - first);
            for (int64_t column = 0; column < columns_; column += kLanes) {
                const int64_t lanes = smaller(kLanes, columns_ - column);
                float* to = at(column, first);
                if (lanes < kLanes) std::memset(to, 0, sizeof(float) * Format::count(n) * kLanes);
                Format::pack_rows(n, lanes, x + first * x_row + column, x_row, to, kLanes);
            }
        });
    }

    // Of the transpose of x [columns, depth].
    void pack_transposed(const float* x, int64_t x_row, int threads) {
        parallel(threads, divide_up(columns_, kLanes), [&](int64_t panel) {
            const int64_t column = panel * kLanes;
            const int64_t lanes = smaller(kLanes, columns_ - column);
            float numbers[kPart * kLanes] = {};
            for (int64_t first = 0; first < depth_; first += kPart) {
                const int64_t n = smaller(kPart, depth_ - first);
                transpose(lanes, n, x + column * x_row + first, x_row, numbers, kLanes);
                Format::pack_rows(n, kLanes, numbers, kLanes, at(column, first), kLanes);
            }
        });
    }

    // The panel that begins with `column`, from `depth` on, which is even.
    float* at(int64_t column, int64_t depth = 0) const {
        return memory_.data() + column / kLanes * size_ + depth / Format::kVnni * kLanes;
    }

  private:
    int64_t depth_, columns_, size_;
    Memory memory_;
};

template <typename Format>
void multiply_rows(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
                   bool transposed, float* out, bool add, int threads) {
    Panels<Format> panels(depth, rows);
    if (transposed)
        panels.pack(weight, rows, threads);
    else
        panels.pack_transposed(weight, depth, threads);
    parallel(threads, divide_up(tokens, kTokens), [&](int64_t index) {
        const int64_t first = index * kTokens;
        const int64_t n = smaller(kTokens, tokens - first);
        // The rows of a tile are this far apart, so that they do not all fall into the same sets of L1.
        const int64_t from_row = divide_up(Format::count(depth), kWidth) * kWidth + kWidth;
        float* from = scratch(kTokens * (from_row + kLanes));
        float* part = from + kTokens * from_row;
        Format::pack_columns(n, depth, x + first * x_row, x_row, from, from_row);
        for (int64_t row = 0; row < rows; row += kLanes) {
            const bool whole = row + kLanes <= rows;
            float* to = whole ? out + first * rows + row : part;
            const int64_t to_row = whole ? rows : kLanes;
            for (int64_t i = 0; add && !whole && i < n; ++i)
                std::memcpy(part + i * kLanes, out + (first + i) * rows + row, sizeof(float) * (rows - row));
            for (int64_t start = 0; start == 0 || start < depth; start += kDepth) {
                const int64_t size = smaller(kDepth, depth - start);
                const Operand a{from + start / Format::kVnni, from_row, 1};
                if (start > 0 || add)
                    multiply_panel<Format, kVecs, true>(n, size, a, panels.at(row, start), kLanes, to, to_row);
                else
                    multiply_panel<Format, kVecs, false>(n, size, a, panels.at(row), kLanes, to, to_row);
            }
            for (int64_t i = 0; !whole && i < n; ++i)
                std::memcpy(out + (first + i) * rows + row, part + i * kLanes, sizeof(float) * (rows - row));
        }
    });
}

template <typename Format>
void multiply_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                          int64_t b_row, float* out, int threads) {
    // a too, whose elements are broadcast: where it lies, tokens may all fall into the same sets of L1.
    Panels<Format> a_panels(tokens, rows), b_panels(tokens, columns);
    a_panels.pack(a, a_row, threads);
    b_panels.pack(b, b_row, threads);
    const int64_t padded = divide_up(columns, kLanes) * kLanes;
    parallel(threads, divide_up(rows, kLanes), [&](int64_t panel) {
        const int64_t first = panel * kLanes;
        const int64_t n = smaller(kLanes, rows - first);
        float* sum = scratch(n * padded);
        std::memset(sum, 0, sizeof(float) * n * padded);
        for (int64_t start = 0; start < tokens; start += kDepth)
            for (int64_t column = 0; column < columns; column += kLanes)
                multiply_panel<Format, kVecs, true>(n, smaller(kDepth, tokens - start),
                                                    {a_panels.at(first, start), 1, kLanes}, b_panels.at(column, start),
                                                    kLanes, sum + column, padded);
        for (int64_t i = 0; i < n; ++i)
            std::memcpy(out + (first + i) * columns, sum + i * padded, sizeof(float) * columns);
    });
}

}  // namespace

void product(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
             bool transposed, float* out, bool add, bool bf16, int threads) {
    if (tokens < kSkinnyTokens && !transposed && !add && !bf16)
        return skinny_gemm<false>(tokens, rows, depth, weight, x, x_row, out, rows, threads);
    with_format(bf16, [&](auto format) {
        multiply_rows<decltype(format)>(tokens, depth, rows, x, x_row, weight, transposed, out, add, threads);
    });
}

void product_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                         int64_t b_row, float* out, bool bf16, int threads) {
    with_format(bf16, [&](auto format) {
        multiply_over_tokens<decltype(format)>(tokens, rows, columns, a, a_row, b, b_row, out, threads);
    });
}

}  // namespace ant5m::ANT5M_ISA

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
constexpr int64_t kPart = 64;    // of the depth packed at a time, at most

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
        const int64_t part = smaller(kPart, part_of(depth_, kTasks));
        parallel(threads_for(depth_ * columns_, threads), divide_up(depth_, part), [&](int64_t task) {
            const int64_t first = task * part;
            const int64_t n = smaller(part, depth_ - first);
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
        const int64_t panels = divide_up(columns_, kLanes);
        const int64_t part = smaller(kPart, part_of(depth_, divide_up(kTasks, larger(1, panels))));
        const int64_t parts = divide_up(depth_, part);
        parallel(threads_for(depth_ * columns_, threads), panels * parts, [&](int64_t task) {
            const int64_t column = task / parts * kLanes;
            const int64_t first = task % parts * part;
            const int64_t lanes = smaller(kLanes, columns_ - column);
            const int64_t n = smaller(part, depth_ - first);
            float numbers[kPart * kLanes];
            if (lanes < kLanes) std::memset(numbers, 0, sizeof numbers);
            transpose(lanes, n, x + column * x_row + first, x_row, numbers, kLanes);
            Format::pack_rows(n, kLanes, numbers, kLanes, at(column, first), kLanes);
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

// How a product [rows, columns] over tokens is cut into tasks: by row, by groups of columns and, where that is too few,
// by chunks of tokens, whose sums are added in their order. Only these change a result, and they depend on the shape
// alone.
struct Cut {
    int64_t panels, groups, group, chunks, chunk;  // group: columns; chunk: tokens

    Cut(int64_t tokens, int64_t rows, int64_t columns, int threads) : panels(divide_up(rows, kLanes)) {
        const int64_t of_columns = divide_up(columns, kLanes);
        const int64_t tasks = smaller(kTasks, 4 * threads);
        group = smaller(of_columns, larger(1, panels * of_columns / tasks)) * kLanes;
        groups = divide_up(columns, group);
        const int64_t blocks = larger(1, divide_up(tokens, kDepth));
        chunks = smaller(divide_up(blocks, 2), divide_up(kTasks, panels * of_columns));
        chunk = divide_up(blocks, chunks) * kDepth;
        chunks = divide_up(blocks * kDepth, chunk);
    }
    int64_t tasks() const { return panels * groups * chunks; }
};

template <typename Format>
void multiply_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                          int64_t b_row, float* out, int threads) {
    const int64_t size = rows * columns;
    if (size == 0) return;
    // a too, whose elements are broadcast: where it lies, tokens may all fall into the same sets of L1.
    Panels<Format> a_panels(tokens, rows), b_panels(tokens, columns);
    a_panels.pack(a, a_row, threads);
    b_panels.pack(b, b_row, threads);
    const Cut cut(tokens, rows, columns, threads);
    const Memory parts(cut.chunks > 1 ? cut.chunks * size : 0);
    parallel(threads, cut.tasks(), [&](int64_t task) {
        const int64_t chunk = task / (cut.panels * cut.groups);
        const int64_t row = task / cut.groups % cut.panels * kLanes;
        const int64_t column = task % cut.groups * cut.group;
        const int64_t n = smaller(kLanes, rows - row);
        const int64_t width = smaller(cut.group, columns - column);
        const int64_t end = smaller(tokens, (chunk + 1) * cut.chunk);
        float* sum = scratch(n * cut.group);
        std::memset(sum, 0, sizeof(float) * n * cut.group);
        for (int64_t start = chunk * cut.chunk; start < end; start += kDepth)
            for (int64_t j = 0; j < width; j += kLanes)
                multiply_panel<Format, kVecs, true>(n, smaller(kDepth, end - start),
                                                    {a_panels.at(row, start), 1, kLanes},
                                                    b_panels.at(column + j, start), kLanes, sum + j, cut.group);
        float* to = (cut.chunks > 1 ? parts.data() + chunk * size : out) + row * columns + column;
        for (int64_t i = 0; i < n; ++i)
            std::memcpy(to + i * columns, sum + i * cut.group, sizeof(float) * width);
    });
    if (cut.chunks == 1) return;
    parallel_rows(threads_for(cut.chunks * size, threads), rows, larger(1, rows / kTasks), [&](int64_t, int64_t row) {
        for_vectors(columns, [&](int64_t column, auto read, auto write) {
            const float* part = parts.data() + row * columns + column;
            Vec sum = read(part);
            for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) sum += read(part + chunk * size);
            write(out + row * columns + column, sum);
        });
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

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

// How a product [rows, columns] over tokens is cut into tasks: by panels of the wider factor, by groups of the other's
// panels and, where that is too few, by chunks of tokens, whose sums are added in their order. Only these change a
// result, and they depend on the shape alone.
struct Cut {
    int64_t panels, groups, group, chunks, chunk;  // group: panels; chunk: tokens

    Cut(int64_t tokens, int64_t wide, int64_t narrow, int threads) : panels(divide_up(wide, kLanes)) {
        const int64_t others = divide_up(narrow, kLanes);
        const int64_t tasks = smaller(kTasks, 4 * threads);
        group = smaller(others, larger(1, panels * others / tasks));
        groups = divide_up(others, group);
        const int64_t blocks = larger(1, divide_up(tokens, kDepth));
        chunks = smaller(divide_up(blocks, 2), divide_up(kTasks, panels * others));
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
    // The narrow factor is packed before, the wide one by the task that needs it, so that its copy stays in the cache.
    const bool wide_rows = rows > columns;
    const int64_t wide = wide_rows ? rows : columns, narrow = wide_rows ? columns : rows;
    const float* from = wide_rows ? a : b;
    const int64_t from_row = wide_rows ? a_row : b_row;
    Panels<Format> others(tokens, narrow);
    others.pack(wide_rows ? b : a, wide_rows ? b_row : a_row, threads);
    const Cut cut(tokens, wide, narrow, threads);
    const Memory parts(cut.chunks > 1 ? cut.chunks * size : 0);
    parallel(threads, cut.tasks(), [&](int64_t task) {
        const int64_t chunk = task / (cut.panels * cut.groups);
        const int64_t first = task / cut.groups % cut.panels * kLanes;
        const int64_t other = task % cut.groups * cut.group * kLanes;
        const int64_t n = smaller(kLanes, wide - first);
        const int64_t width = smaller(cut.group * kLanes, narrow - other);
        const int64_t end = smaller(tokens, (chunk + 1) * cut.chunk);
        float* panel = scratch(kLanes * (kDepth + cut.group * kLanes));  // [kDepth, kLanes]
        float* sum = panel + kDepth * kLanes;  // [n, group] of wide rows, else [width, kLanes]
        const int64_t sum_row = wide_rows ? cut.group * kLanes : kLanes;
        std::memset(sum, 0, sizeof(float) * kLanes * cut.group * kLanes);
        if (n < kLanes) std::memset(panel, 0, sizeof(float) * kDepth * kLanes);
        for (int64_t start = chunk * cut.chunk; start < end; start += kDepth) {
            const int64_t depth = smaller(kDepth, end - start);
            Format::pack_rows(depth, n, from + start * from_row + first, from_row, panel, kLanes);
            for (int64_t j = 0; j < width; j += kLanes) {
                const float* with = others.at(other + j, start);
                if (wide_rows)
                    multiply_panel<Format, kVecs, true>(n, depth, {panel, 1, kLanes}, with, kLanes, sum + j, sum_row);
                else
                    multiply_panel<Format, kVecs, true>(smaller(kLanes, width - j), depth, {with, 1, kLanes}, panel,
                                                        kLanes, sum + j * kLanes, kLanes);
            }
        }
        float* to = (cut.chunks > 1 ? parts.data() + chunk * size : out) +
                    (wide_rows ? first * columns + other : other * columns + first);
        for (int64_t i = 0; i < (wide_rows ? n : width); ++i)
            std::memcpy(to + i * columns, sum + i * sum_row, sizeof(float) * (wide_rows ? width : n));
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

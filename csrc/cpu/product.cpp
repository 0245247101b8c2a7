// The products between the ops, and their gradients. In fp32 torch's are as fast; these are for products in bf16 of
// numbers that stay in fp32, which torch could only convert before and after.
#include "block.h"
#include "memory.h"
#include "parallel.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kDepth = 512;  // tokens of a sum at a time: their words and 64 rows of the result stay in L2

template <typename Word>
void multiply_rows(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
                   bool transposed, float* out, int threads) {
    const int64_t row = transposed ? rows : Word::count(depth);
    const int64_t stored_rows = transposed ? depth : rows;
    const Memory packed((transposed ? Word::count(depth) : rows) * row);
    parallel(threads, divide_up(stored_rows, kTile), [&](int64_t tile) {
        const int64_t first = tile * kTile;
        const int64_t n = smaller(kTile, stored_rows - first);
        if (transposed)
            Word::pack_rows(n, rows, weight + first * rows, rows, packed.data() + first / Word::kNumbers * row, row);
        else
            Word::pack_columns(n, depth, weight + first * depth, depth, packed.data() + first * row, row);
    });
    const Operand operand = transposed ? Operand{packed.data(), 1, row} : Operand{packed.data(), row, 1};
    parallel(threads, divide_up(tokens, kTokens), [&](int64_t index) {
        const Block block(tokens, index);
        float* x_lanes = scratch(kTokens * (depth + rows));
        float* out_lanes = x_lanes + kTokens * depth;
        load_lanes<Word>(block, x, x_row, depth, x_lanes);
        for (int64_t panel = 0; panel < block.panels; ++panel)
            multiply_panel<Word, kVecs, false>(rows, depth, operand, x_lanes + panel * depth * kLanes, kLanes,
                                               out_lanes + panel * rows * kLanes, kLanes);
        store_lanes(block, out_lanes, rows, out);
    });
}

// a [tokens, columns] in words along the tokens: to [Word::count(tokens), row], zero behind the columns.
template <typename Word>
void pack_tokens(int64_t tokens, int64_t columns, const float* a, int64_t a_row, float* to, int64_t row, int threads) {
    parallel(threads, divide_up(tokens, kTokens), [&](int64_t index) {
        const int64_t first = index * kTokens;
        const int64_t n = smaller(kTokens, tokens - first);
        float* words = to + first / Word::kNumbers * row;
        if (row > columns) std::memset(words, 0, sizeof(float) * Word::count(n) * row);
        Word::pack_rows(n, columns, a + first * a_row, a_row, words, row);
    });
}

template <typename Word>
void multiply_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                          int64_t b_row, float* out, int threads) {
    const int64_t padded = divide_up(columns, kWidth) * kWidth;
    const Memory packed(Word::count(tokens) * (rows + padded));
    float* b_words = packed.data() + Word::count(tokens) * rows;
    pack_tokens<Word>(tokens, rows, a, a_row, packed.data(), rows, threads);
    pack_tokens<Word>(tokens, columns, b, b_row, b_words, padded, threads);
    const int64_t tile_rows = rows < 8 * kTile ? kTile / 2 : kTile;  // so many tasks that threads have like shares
    parallel(threads, divide_up(rows, tile_rows), [&](int64_t tile) {
        const int64_t first = tile * tile_rows;
        const int64_t n = smaller(tile_rows, rows - first);
        float* sum = scratch(n * padded);
        std::memset(sum, 0, sizeof(float) * n * padded);
        for (int64_t start = 0; start < tokens; start += kDepth) {
            const int64_t word = start / Word::kNumbers;
            multiply<Word, true>(n, padded, smaller(kDepth, tokens - start),
                                 {packed.data() + word * rows + first, 1, rows}, b_words + word * padded, padded, sum,
                                 padded);
        }
        for (int64_t i = 0; i < n; ++i)
            std::memcpy(out + (first + i) * columns, sum + i * padded, sizeof(float) * columns);
    });
}

}  // namespace

void product(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
             bool transposed, float* out, bool bf16, int threads) {
    with_word(bf16, [&](auto word) {
        multiply_rows<decltype(word)>(tokens, depth, rows, x, x_row, weight, transposed, out, threads);
    });
}

void product_over_tokens(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* b,
                         int64_t b_row, float* out, bool bf16, int threads) {
    with_word(bf16, [&](auto word) {
        multiply_over_tokens<decltype(word)>(tokens, rows, columns, a, a_row, b, b_row, out, threads);
    });
}

}  // namespace ant5m::ANT5M_ISA

// What a product multiplies, in units of 32 bits: a number in fp32, or a VNNI pair, two numbers in bf16 that are
// neighbours along the product's depth and whose products are both added to a sum in fp32. So one microkernel does for
// both: of bf16 it sees half the depth.
#pragma once
#include "simd.h"

namespace ant5m::ANT5M_ISA {

struct Fp32 {
    static constexpr int64_t kVnni = 1;  // numbers in a unit
    static constexpr int64_t count(int64_t depth) { return depth; }
    static Vec broadcast(const float* number) { return ANT5M_ISA::broadcast(*number); }
    static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
    static Vec of(const Vec (&numbers)[1]) { return numbers[0]; }
    static Vec rounded(Vec numbers) { return numbers; }

    // to [rows, columns] = from, whose columns (or rows) are the depth of a product.
    static void pack_columns(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                             int64_t to_row) {
        if (from == to) return;
        for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, sizeof(float) * columns);
    }
    static void pack_rows(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                          int64_t to_row) {
        pack_columns(rows, columns, from, from_row, to, to_row);
    }
};

#ifdef __AVX512BF16__
struct Bf16 {
    static constexpr int64_t kVnni = 2;
    static constexpr int64_t count(int64_t depth) { return (depth + 1) / 2; }
    static Vec broadcast(const float* pair) {
        int32_t bits;
        std::memcpy(&bits, pair, sizeof bits);
        return (Vec)_mm512_set1_epi32(bits);
    }
    static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static Vec of(const Vec (&numbers)[2]) { return interleave(round(numbers[0], numbers[1])); }
    // As a factor of a product has them: bf16 is the upper half of fp32.
    static Vec rounded(Vec numbers) { return interleave(round(Vec{}, numbers)); }

    // to [rows, count(columns)]: each row's pairs of neighbours, and 0 beside the last of an odd number. `to` may be
    // `from`, with the same stride.
    static void pack_columns(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                             int64_t to_row) {
        for (int64_t i = 0; i < rows; ++i) {
            const float* x = from + i * from_row;
            float* pairs = to + i * to_row;
            int64_t j = 0;
            for (; j + 2 * kWidth <= columns; j += 2 * kWidth)
                store(pairs + j / 2, round(load(x + j), load(x + j + kWidth)));
            if (j == columns) continue;
            const int64_t left = columns - j;
            const Vec low = load_part(x + j, left < kWidth ? left : kWidth);
            const Vec high = left > kWidth ? load_part(x + j + kWidth, left - kWidth) : Vec{};
            store_part(pairs + j / 2, round(low, high), count(left));
        }
    }

    // to [count(rows), columns]: neighbours of a column.
    static void pack_rows(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                          int64_t to_row) {
        for (int64_t i = 0; i < rows; i += 2) {
            const float* low = from + i * from_row;
            const float* high = i + 1 < rows ? low + from_row : nullptr;
            float* pairs = to + i / 2 * to_row;
            for_vectors(columns, [&](int64_t j, const auto& load, const auto& store) {
                store(pairs + j, of({load(low + j), high ? load(high + j) : Vec{}}));
            });
        }
    }

  private:
    // The numbers of both in bf16, `low`'s first.
    static Vec round(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }

    // Of 32 numbers in bf16: 0, 16, 1, 17, ...
    static Vec interleave(Vec numbers) {
        typedef int16_t Places __attribute__((vector_size(64)));
        Places places;
        for (int i = 0; i < 32; ++i) places[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
        return (Vec)_mm512_permutexvar_epi16((__m512i)places, (__m512i)numbers);
    }
};
#endif

// Calls body(Bf16()) where bf16 is asked for and there, else body(Fp32()).
template <typename Body>
void with_format([[maybe_unused]] bool bf16, const Body& body) {
#ifdef __AVX512BF16__
    if (bf16) return body(Bf16());
#endif
    body(Fp32());
}

}  // namespace ant5m::ANT5M_ISA

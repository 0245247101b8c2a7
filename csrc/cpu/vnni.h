// What a product multiplies, in units of 32 bits: a number in fp32, or a VNNI pair, two numbers in bf16 that are
// neighbors along the product's depth and whose products are both added to a sum in fp32. So one microkernel does for
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

// What a processor (or its emulation) brings for pairs.
#if defined(__AVX512BF16__)
#define ANT5M_HAS_BF16
// sum + the products of both numbers of each pair.
inline Vec dot(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Pair i is x[2 i], x[2 i + 1] of the numbers x of `low` and, behind them, `high`.
inline Vec neighbors_of(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }

// Pair i is low[i], high[i].
inline Vec pairs_of(Vec low, Vec high) {
    typedef int16_t Places __attribute__((vector_size(64)));
    Places places;  // 0, 16, 1, 17, ...
    for (int i = 0; i < 32; ++i) places[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
    return (Vec)_mm512_permutexvar_epi16((__m512i)places, (__m512i)neighbors_of(low, high));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define ANT5M_HAS_BF16
inline Vec dot(Vec a, Vec b, Vec sum) {
    return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

inline Vec neighbors_of(Vec low, Vec high) {
    return (Vec)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}

inline Vec pairs_of(Vec low, Vec high) {
    const auto numbers = (uint16x8_t)neighbors_of(low, high);
    return (Vec)vzip1q_u16(numbers, vextq_u16(numbers, numbers, 4));
}
#elif defined(ANT5M_EMULATE_BF16)
#define ANT5M_HAS_BF16
// As AVX512-BF16 has it, bit for bit but for the payload of a NaN, so that its kernels can be tested on any processor.
// Numbers are rounded to the nearest bf16, ties to even. The second numbers' product is added first, then the first
// ones', each product exact and each sum rounded to the nearest. Denormals count as 0 of their sign, in and out.
inline BitVec bits_of(Vec x) {
    BitVec bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline Vec flush(BitVec bits) {
    bits &= (bits & 0x7f800000) == 0 ? BitVec{} + 0x80000000 : BitVec{} + 0xffffffff;
    Vec x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline Vec dot(Vec a, Vec b, Vec sum) {
    // In double a product is exact, and rounding twice gives what rounding once would.
    const auto add = [&](Vec x, Vec y) {
        sum = flush(bits_of(sum));
        for (int i = 0; i < kWidth; ++i)
            sum[i] = static_cast<float>(static_cast<double>(sum[i]) + static_cast<double>(x[i]) * y[i]);
        sum = flush(bits_of(sum));
    };
    const BitVec x = bits_of(a), y = bits_of(b);
    add(flush(x & 0xffff0000), flush(y & 0xffff0000));
    add(flush(x << 16), flush(y << 16));
    return sum;
}

inline Vec pairs_of(Vec low, Vec high) {
    const auto rounded = [](Vec x) -> BitVec {
        const BitVec bits = bits_of(flush(bits_of(x)));
        return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : (bits >> 16) | 0x40;
    };
    const BitVec bits = rounded(low) | rounded(high) << 16;
    Vec pairs;
    std::memcpy(&pairs, &bits, sizeof pairs);
    return pairs;
}

inline Vec neighbors_of(Vec low, Vec high) {
    Vec even, odd;
    for (int i = 0; i < kWidth; ++i) {
        even[i] = 2 * i < kWidth ? low[2 * i % kWidth] : high[2 * i % kWidth];
        odd[i] = 2 * i < kWidth ? low[2 * i % kWidth + 1] : high[2 * i % kWidth + 1];
    }
    return pairs_of(even, odd);
}
#endif

#ifdef ANT5M_HAS_BF16
struct Bf16 {
    static constexpr int64_t kVnni = 2;
    static constexpr int64_t count(int64_t depth) { return (depth + 1) / 2; }
    static Vec broadcast(const float* pair) {
        int32_t bits;  // not a float, whose NaN may be changed on the way
        std::memcpy(&bits, pair, sizeof bits);
        return (Vec)(bits + IntVec{});
    }
    static Vec multiply_add(Vec a, Vec b, Vec sum) { return dot(a, b, sum); }
    static Vec of(const Vec (&numbers)[2]) { return pairs_of(numbers[0], numbers[1]); }
    // As a factor of a product has them: bf16 is the upper half of fp32.
    static Vec rounded(Vec numbers) { return pairs_of(Vec{}, numbers); }

    // to [rows, count(columns)]: each row's pairs of neighbors, and 0 beside the last of an odd number. `to` may be
    // `from`, with the same stride.
    static void pack_columns(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                             int64_t to_row) {
        for (int64_t i = 0; i < rows; ++i) {
            const float* x = from + i * from_row;
            float* pairs = to + i * to_row;
            int64_t j = 0;
            for (; j + 2 * kWidth <= columns; j += 2 * kWidth)
                store(pairs + j / 2, neighbors_of(load(x + j), load(x + j + kWidth)));
            if (j == columns) continue;
            const int64_t left = columns - j;
            const Vec low = load_part(x + j, left < kWidth ? left : kWidth);
            const Vec high = left > kWidth ? load_part(x + j + kWidth, left - kWidth) : Vec{};
            store_part(pairs + j / 2, neighbors_of(low, high), count(left));
        }
    }

    // to [count(rows), columns]: neighbors of a column.
    static void pack_rows(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to,
                          int64_t to_row) {
        for (int64_t i = 0; i < rows; i += 2) {
            const float* low = from + i * from_row;
            const float* high = i + 1 < rows ? low + from_row : nullptr;
            float* pairs = to + i / 2 * to_row;
            for_vectors(columns, [&](int64_t j, const auto& load, const auto& store) {
                store(pairs + j, pairs_of(load(low + j), high ? load(high + j) : Vec{}));
            });
        }
    }
};
#endif

// Calls body(Bf16()) where bf16 is asked for and there, else body(Fp32()).
template <typename Body>
void with_format([[maybe_unused]] bool bf16, const Body& body) {
#ifdef ANT5M_HAS_BF16
    if (bf16) return body(Bf16());
#endif
    body(Fp32());
}

}  // namespace ant5m::ANT5M_ISA

// A thin layer over GCC's and Clang's vector extensions: one source, as wide as the instruction set allows.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef ANT5M_ISA
#define ANT5M_ISA portable
#endif

// Loops over registers must be unrolled whole, or the array of registers becomes an array in memory.
#ifdef __clang__
#define ANT5M_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ANT5M_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ant5m::ANT5M_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a register
constexpr int kRows = 8;    // of the tile of the microkernel: see gemm.h
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRows = 6;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kRows = 8;  // of 32 registers 16 are sums: four pipes of four cycles want as many
#else
constexpr int kWidth = 4;
constexpr int kRows = 6;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * sizeof(uint32_t))));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// The first n elements, the rest 0; and the first n elements only.
inline Vec load_part(const float* p, int64_t n) {
    Vec v = {};
    std::memcpy(&v, p, sizeof(float) * n);
    return v;
}

inline void store_part(float* p, Vec v, int64_t n) { std::memcpy(p, &v, sizeof(float) * n); }

// Calls visit(i, load, store) for i = 0, kWidth, ... below n, where load and store are the whole ones or, for what is
// left at the end, those of a part.
template <typename Visit>
inline void for_vectors(int64_t n, const Visit& visit) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) visit(i, load, store);
    if (i == n) return;
    const int64_t left = n - i;
    visit(
        i, [left](const float* p) { return load_part(p, left); },
        [left](float* p, Vec v) { store_part(p, v, left); });
}

// to += from; a multiple of kWidth floats.
inline void add_floats(int64_t floats, const float* from, float* to) {
    for (int64_t i = 0; i < floats; i += kWidth) store(to + i, load(to + i) + load(from + i));
}

inline Vec broadcast(float x) { return x - Vec{}; }

// b where one of them is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__) || !defined(__x86_64__)
    return a > b ? a : b;
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);  // GCC makes two instructions of the above where `a` is a constant
#else
    return _mm_max_ps(a, b);
#endif
}

// The sum of the elements, always in the same order.
inline float sum(Vec v) {
    float parts[kWidth];
    store(parts, v);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// 0, 1, 2, ... in the lanes.
inline IntVec iota() {
    IntVec v;
    for (int i = 0; i < kWidth; ++i) v[i] = i;
    return v;
}

#if defined(__x86_64__)
constexpr int64_t kSquare = 4;
inline void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row, float scale) {
    const __m128 factor = _mm_set1_ps(scale);
    __m128 rows[4];
    for (int n = 0; n < 4; ++n) rows[n] = _mm_loadu_ps(from + n * from_row) * factor;
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    for (int n = 0; n < 4; ++n) _mm_storeu_ps(to + n * to_row, rows[n]);
}
#elif defined(__aarch64__)
constexpr int64_t kSquare = 4;
inline void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row, float scale) {
    float32x4_t rows[4];
    for (int n = 0; n < 4; ++n) rows[n] = vmulq_n_f32(vld1q_f32(from + n * from_row), scale);
    for (int n = 0; n < 2; ++n) {  // columns n and n + 2
        const auto pair = [&](int i) {
            return vreinterpretq_f64_f32(n ? vtrn2q_f32(rows[i], rows[i + 1]) : vtrn1q_f32(rows[i], rows[i + 1]));
        };
        vst1q_f32(to + n * to_row, vreinterpretq_f32_f64(vtrn1q_f64(pair(0), pair(2))));
        vst1q_f32(to + (n + 2) * to_row, vreinterpretq_f32_f64(vtrn2q_f64(pair(0), pair(2))));
    }
}
#else
constexpr int64_t kSquare = 1;
inline void transpose_square(const float* from, int64_t, float* to, int64_t, float scale) { *to = *from * scale; }
#endif

// to [columns, rows] = the transpose of from [rows, columns], times `scale`.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row,
                      float scale = 1.0f) {
    const int64_t whole_rows = rows / kSquare * kSquare, whole_columns = columns / kSquare * kSquare;
    for (int64_t i = 0; i < whole_rows; i += kSquare)
        for (int64_t j = 0; j < whole_columns; j += kSquare)
            transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row, scale);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
            to[j * to_row + i] = from[i * from_row + j] * scale;
}

// 2^x with a relative error of at most 1.7e-7; 2^0 is exact. Where the result would be below the smallest normal
// number (x < -126, -inf too) it is at most that, and from -127 on 0. NaN stays NaN. x must be below 128.
// Several vectors go step by step together, because the steps of one wait for one another.
// The polynomial is the minimax of 2^f, among those that are 1 at 0, for f in [0, 1] and in [-1/2, 1/2] (there with
// errors weighted by 1 + |f|, which leaves room for those of rounding without a fused multiply-add).
template <int kVectors>
inline void exp2(Vec (&x)[kVectors]) {
    Vec f[kVectors], p[kVectors];
#ifdef __AVX512F__
    constexpr float kTerms[] = {0.00186713f, 0.009017031f, 0.055799913f, 0.24016444f, 0.6931513f, 1.0f};
    // The masked intrinsics, because GCC warns of the unmasked ones' undefined operand.
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i)
        f[i] = _mm512_maskz_reduce_ps(0xffff, x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    constexpr float kTerms[] = {0.0013261207f, 0.009672549f, 0.055507585f, 0.2402222f, 0.69314694f, 1.0f};
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Vec shifted[kVectors];
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) x[i] = max(broadcast(-127.0f), x[i]);
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) shifted[i] = x[i] + kRound;
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) f[i] = shifted[i] - kRound;
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) f[i] = x[i] - f[i];
#endif
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) p[i] = broadcast(kTerms[0]);
    ANT5M_UNROLL for (int term = 1; term < 6; ++term)
        ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) p[i] = p[i] * f[i] + kTerms[term];
#ifdef __AVX512F__
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) x[i] = _mm512_maskz_scalef_ps(0xffff, p[i], x[i]);
#else
    ANT5M_UNROLL for (int i = 0; i < kVectors; ++i) {
        BitVec exponent, bits;
        std::memcpy(&exponent, &shifted[i], sizeof exponent);
        std::memcpy(&bits, &p[i], sizeof bits);
        bits += exponent << 23;
        std::memcpy(&x[i], &bits, sizeof bits);
    }
#endif
}

inline Vec exp2(Vec x) {
    Vec only[1] = {x};
    exp2(only);
    return only[0];
}

}  // namespace ant5m::ANT5M_ISA

// Numbers of 16 or 32 bits in global memory, several at once, as floats in registers.
#pragma once

#include "ptx.h"

template <int bits>
struct NumberOf;
template <>
struct NumberOf<16> {
  using Type = Half;
};
template <>
struct NumberOf<32> {
  using Type = float;
};
template <int bits>
using Number = typename NumberOf<bits>::Type;

template <class T>
DEVICE T* row_of(T* x, int row, int stride) {
  return x + static_cast<long long>(row) * stride;
}

// `count` (8, 4, 2, 1) halves or floats, from or to an address that is a multiple of their size, at most 16 bytes.
template <int count>
DEVICE void load(float (&x)[count], const Half* from) {
  if constexpr (count == 1) {
    x[0] = to_float(*from);
  } else {
    unsigned pairs[count / 2];
    if constexpr (count == 8) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
    } else if constexpr (count == 4) {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      pairs[0] = all.x, pairs[1] = all.y;
    } else {
      pairs[0] = *reinterpret_cast<const unsigned*>(from);
    }
#pragma unroll
    for (int i = 0; i < count / 2; ++i) x[2 * i] = low_half(pairs[i]), x[2 * i + 1] = high_half(pairs[i]);
  }
}

template <int count>
DEVICE void load(float (&x)[count], const float* from) {
  if constexpr (count == 1) {
    x[0] = *from;
  } else if constexpr (count == 2) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    x[0] = both.x, x[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

template <int count>
DEVICE void store(const float (&x)[count], Half* to) {
  if constexpr (count == 1) {
    *to = to_half(x[0]);
  } else {
    unsigned pairs[count / 2];
#pragma unroll
    for (int i = 0; i < count / 2; ++i) pairs[i] = pack(x[2 * i], x[2 * i + 1]);
    if constexpr (count == 8) *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    if constexpr (count == 4) *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
    if constexpr (count == 2) *reinterpret_cast<unsigned*>(to) = pairs[0];
  }
}

template <int count>
DEVICE void store(const float (&x)[count], float* to) {
  if constexpr (count == 1) {
    *to = x[0];
  } else if constexpr (count == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shfl_xor(x, mask);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, shfl_xor(x, mask));
  return x;
}

// 1 / (1 + e^-x). 0 where e^-x overflows.
DEVICE float sigmoid(float x) { return rcp(1 + ex2(x * -1.44269504f)); }

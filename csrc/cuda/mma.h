// Fragments of 16 rows of a matrix of halves, [rows][8 chunks], between global memory and the registers of a warp.
#pragma once

#include "vector.h"

// Of a fragment: the lane's first row and first column.
DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// A: 16 rows of x from `first` on, of which those before `end` exist. The others are 0.
template <int chunks>
DEVICE void load_rows(unsigned (&a)[chunks][2], const Half* x, int stride, int first, int end) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + i * 8 + lane_row();
    const Half* from = row_of(x, row, stride) + lane_column();
#pragma unroll
    for (int c = 0; c < chunks; ++c) a[c][i] = row < end ? *reinterpret_cast<const unsigned*>(from + c * 8) : 0;
  }
}

// C, each of its two rows a lane times a factor, to 16 rows of x from `first` on, of which those before `end` exist.
template <int chunks>
DEVICE void store_rows(const float (&sum)[chunks][4], const float (&factor)[2], Half* x, int stride, int first,
                       int end) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + i * 8 + lane_row();
    if (row >= end) continue;
    Half* to = row_of(x, row, stride) + lane_column();
#pragma unroll
    for (int c = 0; c < chunks; ++c)
      *reinterpret_cast<unsigned*>(to + c * 8) = pack(sum[c][2 * i] * factor[i], sum[c][2 * i + 1] * factor[i]);
  }
}

template <int chunks>
DEVICE void clear(float (&sum)[chunks][4]) {
#pragma unroll
  for (int c = 0; c < chunks; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[c][i] = 0;
}

// The same of several times 16 rows.
template <int tiles, int chunks>
DEVICE void load_rows(unsigned (&a)[tiles][chunks][2], const Half* x, int stride, int first, int end) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) load_rows(a[m], x, stride, first + m * 16, end);
}

template <int tiles, int chunks>
DEVICE void store_rows(const float (&sum)[tiles][chunks][4], const float (&factor)[tiles][2], Half* x, int stride,
                       int first, int end) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) store_rows(sum[m], factor[m], x, stride, first + m * 16, end);
}

template <int tiles, int chunks>
DEVICE void store_rows(const float (&sum)[tiles][chunks][4], Half* x, int stride, int first, int end) {
  constexpr float kOne[2] = {1, 1};
#pragma unroll
  for (int m = 0; m < tiles; ++m) store_rows(sum[m], kOne, x, stride, first + m * 16, end);
}

template <int tiles, int chunks>
DEVICE void clear(float (&sum)[tiles][chunks][4]) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) clear(sum[m]);
}

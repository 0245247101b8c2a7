// SwiGLU: y = silu(gate) * up, and both gradients from the inputs alone.
//
// Compile with -DSIZE=<row> -DVECTOR=<8, 4, 2, 1: numbers read at once, divides SIZE> -DX=<bits>.
// 256 threads, grid ceil(rows SIZE / VECTOR / 256); an element of the vectors of all rows in turn is a thread's.
//
//     swiglu_forward    gate up y          rows, strides of rows of gate up
//     swiglu_backward   dy gate up dboth   rows, strides of rows of dy gate up
// y [rows, SIZE] and dboth [rows, 2 SIZE], which holds dgate and dup side by side, are dense.
// With a = sigmoid(gate): dup = dy gate a, dgate = dy up a (1 + gate (1 - a)).
#include "vector.h"

constexpr int kVector = VECTOR, kChunks = SIZE / kVector;
using In = Number<X>;

DEVICE bool place(int rows, long long& row, int& column) {
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  row = i / kChunks;
  column = static_cast<int>(i % kChunks) * kVector;
  return row < rows;
}

KERNEL(256, 4) swiglu_forward(const In* gate, const In* up, In* y, int rows, int gate_stride, int up_stride) {
  long long row;
  int column;
  if (!place(rows, row, column)) return;
  float g[kVector], u[kVector];
  load(g, gate + row * gate_stride + column);
  load(u, up + row * up_stride + column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) g[i] *= sigmoid(g[i]) * u[i];
  store(g, y + row * SIZE + column);
}
LAUNCHER(swiglu_forward)

KERNEL(256, 4)
swiglu_backward(const In* dy, const In* gate, const In* up, In* dboth, int rows, int dy_stride, int gate_stride,
                int up_stride) {
  long long row;
  int column;
  if (!place(rows, row, column)) return;
  float d[kVector], g[kVector], u[kVector];
  load(d, dy + row * dy_stride + column);
  load(g, gate + row * gate_stride + column);
  load(u, up + row * up_stride + column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float a = sigmoid(g[i]), silu = g[i] * a;
    u[i] *= d[i] * (a + silu * (1 - a));
    d[i] *= silu;
  }
  store(u, dboth + row * 2 * SIZE + column);
  store(d, dboth + row * 2 * SIZE + SIZE + column);
}
LAUNCHER(swiglu_backward)

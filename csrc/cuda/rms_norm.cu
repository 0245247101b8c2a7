// RMSNorm of rows, with the residual added first; statistics in fp32. A warp has a row and keeps it in registers.
//
// Compile with -DSIZE=<row> -DVECTOR=<8, 4, 2, 1: numbers read at once> -DX=<bits of x> -DRESIDUAL=<of the residual, or
// 0> -DY=<of y> -DDIRECT=<0, 1: whether the sum has a gradient of its own>. total is as wide as the wider one of x and
// the residual. 256 threads, 8 rows a block.
//
//     rms_norm_forward   grid ceil(rows / 8)     x residual weight y total rstd            rows eps, strides x residual
//     rms_norm_backward  grid any, G             dy dtotal total weight rstd dx dresidual partial   rows,
//                                                                                          strides dy dtotal total
// Rows of y, total, dx, dresidual are dense; weight [SIZE] and rstd [rows], 1 / root mean square, are fp32.
// partial [8 G, SIZE] fp32: its sum over rows is the gradient of weight. dresidual is written where its kind is another
// one than dx's. Arguments that have no use may be any pointer.
#include "vector.h"

constexpr int kSize = SIZE, kVector = VECTOR;
constexpr int kParts = (kSize + 32 * kVector - 1) / (32 * kVector);
constexpr bool kResidual = RESIDUAL != 0;
using In = Number<X>;
using Residual = Number<kResidual ? RESIDUAL : X>;
using Out = Number<Y>;
using Total = Number<(RESIDUAL > X ? RESIDUAL : X)>;

DEVICE int first_column(int part) { return (part * 32 + threadIdx.x % 32) * kVector; }

KERNEL(256, 4)
rms_norm_forward(const In* x, const Residual* residual, const float* weight, Out* y, Total* total, float* rstd,
                 int rows, float eps, int x_stride, int residual_stride) {
  const int row = blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  x = row_of(x, row, x_stride);
  residual = row_of(residual, row, residual_stride);
  float sum[kParts][kVector] = {}, squares = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int column = first_column(p);
    if (column >= kSize) continue;
    load(sum[p], x + column);
    if (kResidual) {
      float other[kVector];
      load(other, residual + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[p][i] += other[i];
      store(sum[p], row_of(total, row, kSize) + column);
      if (sizeof(Total) == 2) {  // what is normalized is what the caller gets
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[p][i] = to_float(to_half(sum[p][i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += sum[p][i] * sum[p][i];
  }
  const float factor = 1 / sqrtf(warp_sum(squares) / kSize + eps);
  if (threadIdx.x % 32 == 0) rstd[row] = factor;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int column = first_column(p);
    if (column >= kSize) continue;
    float w[kVector];
    load(w, weight + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) w[i] *= sum[p][i] * factor;
    store(w, row_of(y, row, kSize) + column);
  }
}
LAUNCHER(rms_norm_forward)

// With u = total * rstd and g = dy * weight: the sum's gradient is (g - u mean(g u)) * rstd.
KERNEL(256, SIZE > 512 ? 1 : 2)
rms_norm_backward(const Out* dy, const Total* dtotal, const Total* total, const float* weight, const float* rstd,
                  In* dx, Residual* dresidual, float* partial, int rows, int dy_stride, int dtotal_stride,
                  int total_stride) {
  const int warp = blockIdx.x * 8 + threadIdx.x / 32;
  float w[kParts][kVector] = {}, dweight[kParts][kVector] = {};
#pragma unroll
  for (int p = 0; p < kParts; ++p)
    if (first_column(p) < kSize) load(w[p], weight + first_column(p));
  for (int row = warp; row < rows; row += gridDim.x * 8) {
    const float factor = rstd[row];
    float unit[kParts][kVector] = {}, grad[kParts][kVector] = {}, along = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int column = first_column(p);
      if (column >= kSize) continue;
      load(unit[p], row_of(total, row, total_stride) + column);
      load(grad[p], row_of(dy, row, dy_stride) + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        unit[p][i] *= factor;
        dweight[p][i] += grad[p][i] * unit[p][i];
        grad[p][i] *= w[p][i];
        along += grad[p][i] * unit[p][i];
      }
    }
    along = warp_sum(along) / kSize;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int column = first_column(p);
      if (column >= kSize) continue;
      float direct[kVector];
      if (DIRECT) load(direct, row_of(dtotal, row, dtotal_stride) + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        grad[p][i] = (grad[p][i] - unit[p][i] * along) * factor;
        if (DIRECT) grad[p][i] += direct[i];
      }
      store(grad[p], row_of(dx, row, kSize) + column);
      if (kResidual && RESIDUAL != X) store(grad[p], row_of(dresidual, row, kSize) + column);
    }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p)
    if (first_column(p) < kSize) store(dweight[p], row_of(partial, warp, kSize) + first_column(p));
}
LAUNCHER(rms_norm_backward)

// The SwiGLU block: out = down (silu(gate x) * (up x)), fp16 in, fp32 sums, for tensor cores from compute capability
// 7.5 on. Nothing of the block's width reaches memory on the way forward; the way back computes gate x and up x again.
//
// Compile with -DSIZE=<64 or 128: channels> -DWIDTH=<of the block, a multiple of 8>.
//
//     mlp_forward    256 threads, grid ceil(tokens / 256)   x gate up down out               tokens, stride of x
//     mlp_backward   256 threads, grid ceil(tokens / 128)   dy x gate up down hidden dboth dx   tokens, strides of dy x
// x, dy, out, dx [tokens, SIZE] halves, rows of out and dx dense, strides even; gate, up and down are all
// [WIDTH, SIZE] (down transposed), dense, from a multiple of 16 bytes on. hidden [tokens, WIDTH] is silu(gate x) *
// (up x), dboth [tokens, 2 WIDTH] its gradients by gate x and by up x, side by side, for the products with x and dy
// that give the weights' gradients.
//
// A warp keeps its tokens (32, back 16) and their sums in registers; the weights go by in stages of 16 columns, through
// shared memory, the next stage on its way in registers.
#include "mma.h"

constexpr int kSize = SIZE, kWidth = WIDTH, kThreads = 256;
constexpr int kChunks = kSize / 8;  // of 16 bytes, the width of a product
constexpr int kStage = 16, kMatrix = kStage * kSize;
constexpr int kForwardTiles = 2, kBackwardTiles = 1;  // of 16 tokens a warp

using Rows = unsigned[kChunks][2];  // A, 16 rows of a matrix [tokens][kSize]
using Sums = float[kChunks][4];     // C, the same

// 8 columns of the block, packed, to rows of `stride`. `x`: at the lane's first row and column.
DEVICE void store_columns(unsigned low, unsigned high, Half* x, int stride, int row, int tokens) {
  if (row < tokens) *reinterpret_cast<unsigned*>(x) = low;
  if (row + 8 < tokens) *reinterpret_cast<unsigned*>(row_of(x, 8, stride)) = high;
}

// ---- weights: rows of kSize halves in shared memory, chunks swapped so that the same chunk of 8 rows has no conflicts

DEVICE int chunk_place(int row, int chunk) { return row * kSize + (chunk ^ row % 8) * 8; }

// Each thread's part of a stage: of gate, up and down.
struct Parts {
  static constexpr int kEach = (3 * kStage * kChunks + kThreads - 1) / kThreads;
  uint4 part[kEach];
};

DEVICE void load_parts(Parts& parts, const Half* gate, const Half* up, const Half* down, int column) {
#pragma unroll
  for (int e = 0; e < Parts::kEach; ++e) {
    const int i = threadIdx.x + e * kThreads, matrix = i / (kStage * kChunks), row = column + i / kChunks % kStage;
    const Half* from = matrix == 0 ? gate : matrix == 1 ? up : down;
    parts.part[e] = make_uint4(0, 0, 0, 0);
    if (matrix < 3 && row < kWidth)
      parts.part[e] = *reinterpret_cast<const uint4*>(from + row * kSize + i % kChunks * 8);
  }
}

DEVICE void store_parts(const Parts& parts, Half* stage) {
#pragma unroll
  for (int e = 0; e < Parts::kEach; ++e) {
    const int i = threadIdx.x + e * kThreads, matrix = i / (kStage * kChunks), row = i / kChunks % kStage;
    if (matrix < 3)
      *reinterpret_cast<uint4*>(stage + matrix * kMatrix + chunk_place(row, i % kChunks)) = parts.part[e];
  }
}

// Calls work(gate, up, down, column) with 8 rows of each weight in shared memory: those of `column` on.
template <class Work>
DEVICE void for_columns(const Half* gate, const Half* up, const Half* down, Work work) {
  SHARED(Half, stages, 2 * 3 * kMatrix);
  Parts parts;
  load_parts(parts, gate, up, down, 0);
#pragma unroll 1
  for (int column = 0, buffer = 0; column < kWidth; column += kStage, buffer ^= 1) {
    Half* stage = stages + buffer * 3 * kMatrix;
    store_parts(parts, stage);
    sync_threads();
    if (column + kStage < kWidth) load_parts(parts, gate, up, down, column + kStage);
#pragma unroll 1
    for (int j = 0; j < kStage && column + j < kWidth; j += 8) {
      const Half* rows = stage + j * kSize;
      work(rows, rows + kMatrix, rows + 2 * kMatrix, column + j);
    }
  }
}

// B of 8 rows and 4 chunks: plain for a product with the transposed matrix, trans for one with itself.
DEVICE void load_b(unsigned (&b)[4], const Half* rows, int chunk, bool trans) {
  const int lane = threadIdx.x % 32;
  const Half* from = rows + chunk_place(lane % 8, chunk + lane / 8);
  if (trans) ldmatrix_x4_trans(b, from);
  else ldmatrix_x4(b, from);
}

// sum = a rows^T: 8 columns.
template <int tiles>
DEVICE void multiply(float (&sum)[tiles][4], const Rows (&a)[tiles], const Half* rows) {
#pragma unroll
  for (int m = 0; m < tiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[m][i] = 0;
#pragma unroll
  for (int c = 0; c < kChunks; c += 4) {
    unsigned b[4];
    load_b(b, rows, c, false);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < tiles; ++m) mma_m16n8k8(sum[m], a[m][c + i][0], a[m][c + i][1], b[i]);
  }
}

// sum += a rows, of 8 columns of a.
template <int tiles>
DEVICE void multiply_add(Sums (&sum)[tiles], const unsigned (&a)[tiles][2], const Half* rows) {
#pragma unroll
  for (int c = 0; c < kChunks; c += 4) {
    unsigned b[4];
    load_b(b, rows, c, true);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < tiles; ++m) mma_m16n8k8(sum[m][c + i], a[m][0], a[m][1], b[i]);
  }
}

KERNEL(kThreads, 1)
mlp_forward(const Half* x, const Half* gate, const Half* up, const Half* down, Half* out, int tokens, int x_stride) {
  constexpr int kTiles = kForwardTiles;
  const int first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * 16 * kTiles;
  Rows a[kTiles];
  Sums sum[kTiles];
  load_rows(a, x, x_stride, first, tokens);
  clear(sum);
  for_columns(gate, up, down, [&](const Half* gate, const Half* up, const Half* down, int) {
    float g[kTiles][4], u[kTiles][4];
    unsigned h[kTiles][2];
    multiply(g, a, gate);
    multiply(u, a, up);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) u[m][i] *= g[m][i] * sigmoid(g[m][i]);
      h[m][0] = pack(u[m][0], u[m][1]), h[m][1] = pack(u[m][2], u[m][3]);
    }
    multiply_add(sum, h, down);
  });
  store_rows(sum, out, kSize, first, tokens);
}
LAUNCHER(mlp_forward)

KERNEL(kThreads, 1)
mlp_backward(const Half* dy, const Half* x, const Half* gate, const Half* up, const Half* down, Half* hidden,
             Half* dboth, Half* dx, int tokens, int dy_stride, int x_stride) {
  constexpr int kTiles = kBackwardTiles;
  static_assert(kTiles == 1, "rows and columns below are those of one tile");
  const int first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * 16, row = first + lane_row();
  Rows a[1], d[1];
  Sums sum[1];
  load_rows(a, x, x_stride, first, tokens);
  load_rows(d, dy, dy_stride, first, tokens);
  clear(sum);
  hidden = row_of(hidden, row, kWidth) + lane_column();
  dboth = row_of(dboth, row, 2 * kWidth) + lane_column();
  for_columns(gate, up, down, [&](const Half* gate, const Half* up, const Half* down, int column) {
    float g[1][4], u[1][4], dh[1][4];
    multiply(g, a, gate);
    multiply(u, a, up);
    multiply(dh, d, down);
    float h[4], dg[4], du[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float s = sigmoid(g[0][i]), silu = g[0][i] * s;
      h[i] = silu * u[0][i];
      du[i] = dh[0][i] * silu;
      dg[i] = dh[0][i] * u[0][i] * (s + silu * (1 - s));
    }
    store_columns(pack(h[0], h[1]), pack(h[2], h[3]), hidden + column, kWidth, row, tokens);
    const unsigned by_gate[1][2] = {{pack(dg[0], dg[1]), pack(dg[2], dg[3])}};
    const unsigned by_up[1][2] = {{pack(du[0], du[1]), pack(du[2], du[3])}};
    store_columns(by_gate[0][0], by_gate[0][1], dboth + column, 2 * kWidth, row, tokens);
    store_columns(by_up[0][0], by_up[0][1], dboth + kWidth + column, 2 * kWidth, row, tokens);
    multiply_add(sum, by_gate, gate);
    multiply_add(sum, by_up, up);
  });
  store_rows(sum, dx, kSize, first, tokens);
}
LAUNCHER(mlp_backward)

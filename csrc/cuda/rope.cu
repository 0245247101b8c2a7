// Rotary position embedding of q and k in one launch, half-rotate layout: dimension j is rotated with j + SIZE / 2. And the
// gradients of q, k and v, where these are parts of one product, as that product's: q's and k's rotated back.
//
// Compile with -DSIZE=<head> -DHEADS=<of q> -DKV=<of k> -DVECTOR=<8, 4, 2, 1: numbers read at once, divides SIZE / 2>
// -DX=<bits of q and k>.
//
//     rope            256 threads, grid ceil(B T (HEADS + KV) SIZE / 2 / VECTOR / 256)
//                     q k cos sin q_out k_out  B * T, T, sign, strides (B, T, H) of q and of k
//     rope_packed_back   256 threads, grid ceil(B T (HEADS + 2 KV) SIZE / 2 / VECTOR / 256)
//                     dq dk dv cos sin out  B * T, T, strides (B, T, H) of dq, of dk and of dv
// q, dq [B, T, HEADS, SIZE], k, dk, dv [B, T, KV, SIZE], the last dimension dense; q_out and k_out dense; out dense,
// [B, T, HEADS + 2 KV, SIZE]; cos and sin fp32 [T, SIZE / 2]. sign 1 rotates, -1 rotates back, which is the gradient.
#include "vector.h"

constexpr int kHalf = SIZE / 2, kVector = VECTOR, kChunks = kHalf / kVector;
using In = Number<X>;

// Whose numbers a thread has, of `heads` a position.
struct Place {
  int position, head, column;
};

DEVICE Place place(unsigned heads) {
  const unsigned i = blockIdx.x * 256u + threadIdx.x, row = i / kChunks;
  return {static_cast<int>(row / heads), static_cast<int>(row % heads), static_cast<int>(i % kChunks * kVector)};
}

// Of x, whose strides these are: the row of a head.
DEVICE const In* row(const In* x, long long batch, long long time, long long head, int x_batch, int x_time,
                     int x_head) {
  return x + batch * x_batch + time * x_time + head * x_head;
}

DEVICE void rotate(const In* from, In* to, const float* cos, const float* sin, float sign) {
  float first[kVector], second[kVector], c[kVector], s[kVector], low[kVector], high[kVector];
  load(first, from);
  load(second, from + kHalf);
  load(c, cos);
  load(s, sin);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    s[j] *= sign;
    low[j] = first[j] * c[j] - second[j] * s[j];
    high[j] = second[j] * c[j] + first[j] * s[j];
  }
  store(low, to);
  store(high, to + kHalf);
}

KERNEL(256, 4)
rope(const In* q, const In* k, const float* cos, const float* sin, In* q_out, In* k_out, int positions, int T,
     float sign, int q_batch, int q_time, int q_head, int k_batch, int k_time, int k_head) {
  const Place it = place(HEADS + KV);
  if (it.position >= positions) return;
  const long long batch = it.position / T, time = it.position % T, at = it.position;
  const int head = it.head;
  const In* from = head < HEADS ? row(q, batch, time, head, q_batch, q_time, q_head)
                                : row(k, batch, time, head - HEADS, k_batch, k_time, k_head);
  In* to = head < HEADS ? q_out + (at * HEADS + head) * SIZE : k_out + (at * KV + head - HEADS) * SIZE;
  const long long angle = time * kHalf + it.column;
  rotate(from + it.column, to + it.column, cos + angle, sin + angle, sign);
}
LAUNCHER(rope)

KERNEL(256, 4)
rope_packed_back(const In* dq, const In* dk, const In* dv, const float* cos, const float* sin, In* out, int positions,
              int T, int q_batch, int q_time, int q_head, int k_batch, int k_time, int k_head, int v_batch, int v_time,
              int v_head) {
  const Place it = place(HEADS + 2 * KV);
  if (it.position >= positions) return;
  const long long batch = it.position / T, time = it.position % T, at = it.position;
  const int head = it.head;
  In* to = out + (at * (HEADS + 2 * KV) + head) * SIZE + it.column;
  if (head >= HEADS + KV) {
    const In* from = row(dv, batch, time, head - HEADS - KV, v_batch, v_time, v_head) + it.column;
    float first[kVector], second[kVector];
    load(first, from);
    load(second, from + kHalf);
    store(first, to);
    store(second, to + kHalf);
    return;
  }
  const In* from = head < HEADS ? row(dq, batch, time, head, q_batch, q_time, q_head)
                                : row(dk, batch, time, head - HEADS, k_batch, k_time, k_head);
  const long long angle = time * kHalf + it.column;
  rotate(from + it.column, to, cos + angle, sin + angle, -1);
}
LAUNCHER(rope_packed_back)

// Rotary position embedding of q and k in one launch, half-rotate layout: dimension j turns with j + SIZE / 2.
//
// Compile with -DSIZE=<head> -DHEADS=<of q> -DKV=<of k> -DVECTOR=<8, 4, 2, 1: numbers read at once, divides SIZE / 2>
// -DX=<bits of q and k>.
//
//     rope   256 threads, grid ceil(B T (HEADS + KV) SIZE / 2 / VECTOR / 256)
//            q k cos sin q_out k_out  B * T, T, sign, strides (B, T, H) of q and of k
// q [B, T, HEADS, SIZE], k [B, T, KV, SIZE], the last dimension dense; q_out and k_out dense; cos and sin fp32
// [T, SIZE / 2]. sign 1 turns, -1 turns back, which is the gradient.
#include "vector.h"

constexpr int kHalf = SIZE / 2, kVector = VECTOR, kChunks = kHalf / kVector;
using In = Number<X>;

KERNEL(256, 4)
rope(const In* q, const In* k, const float* cos, const float* sin, In* q_out, In* k_out, int positions, int T,
     float sign, int q_batch, int q_time, int q_head, int k_batch, int k_time, int k_head) {
  const unsigned i = blockIdx.x * 256u + threadIdx.x;
  const int chunk = i % kChunks, head = i / kChunks % (HEADS + KV), position = i / kChunks / (HEADS + KV);
  if (position >= positions) return;
  const long long batch = position / T, time = position % T, at = position;
  const In* from = head < HEADS ? q + batch * q_batch + time * q_time + static_cast<long long>(head) * q_head
                                : k + batch * k_batch + time * k_time + static_cast<long long>(head - HEADS) * k_head;
  In* to = head < HEADS ? q_out + (at * HEADS + head) * SIZE : k_out + (at * KV + head - HEADS) * SIZE;
  const int column = chunk * kVector;
  float first[kVector], second[kVector], c[kVector], s[kVector], low[kVector], high[kVector];
  load(first, from + column);
  load(second, from + column + kHalf);
  load(c, cos + time * kHalf + column);
  load(s, sin + time * kHalf + column);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    s[j] *= sign;
    low[j] = first[j] * c[j] - second[j] * s[j];
    high[j] = second[j] * c[j] + first[j] * s[j];
  }
  store(low, to + column);
  store(high, to + column + kHalf);
}
LAUNCHER(rope)

// Between the products of the head: a row of logits becomes its loss, and in its place factor * (softmax - one-hot).
//
// Compile with -DVOCAB=<entries> -DSTRIDE=<from row to row, a multiple of 8 (fp32: 4) and at least VOCAB>
// -DTHREADS=<256, 512, 1024> -DX=<bits of logits> -DGRADIENT=<0: only the loss> -DSIZE=<of hidden>
// -DVECTOR=<8, 4, 2, 1: numbers of hidden and weight read at once, divides SIZE>.
//
//     softmax_gradient   THREADS threads, grid rows     logits hidden weight targets losses  ignore_index factor
// logits [rows, STRIDE] start at a multiple of 16 bytes; they are hidden [rows, SIZE] times weight [VOCAB, SIZE]
// transposed, both dense. targets int64 [rows], losses fp32 [rows]. A target that is ignore_index makes loss and row 0,
// one that is no entry makes the loss NaN. What lies behind entry VOCAB is not used and may become anything.
//
// The row stays in registers, packed: it is read once and written once, which is all that this takes on a T4. But the
// half of a logit of 64 is off by up to 1 / 32, of 400 by up to 1 / 8, and a probability by as large a part. So where the
// highest one is 64 or more, those that are less than 8 below (others have a probability below e^-8) are computed again,
// in fp32, and of the whole row halves hold what is left without the highest. Few are so near as a rule; the more there
// are, the longer such a row takes.
#include "vector.h"

constexpr int kWide = 128 / X;  // numbers in 16 bytes
constexpr int kParts = (STRIDE + THREADS * kWide - 1) / (THREADS * kWide);
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kLowest = -3.0e38f;
constexpr float kPeaked = 64, kLargest = 65504, kNear = 8;  // an infinite logit stays one, and makes the loss NaN
using In = Number<X>;

DEVICE int first_entry(int part) { return (part * THREADS + static_cast<int>(threadIdx.x)) * kWide; }

// 16 bytes as floats, and back.
DEVICE void unpack(float (&x)[kWide], const uint4& part) {
  const unsigned words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (X == 16) x[2 * i] = low_half(words[i]), x[2 * i + 1] = high_half(words[i]);
    else x[i] = float_from_bits(words[i]);
  }
}

DEVICE void load_row(uint4 (&parts)[kParts], const In* logits) {
#pragma unroll
  for (int p = 0; p < kParts; ++p)
    if (first_entry(p) < STRIDE) parts[p] = *reinterpret_cast<const uint4*>(logits + first_entry(p));
}

// A logit in fp32.
DEVICE float product(const In* hidden, const In* weight) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < SIZE; i += VECTOR) {
    float a[VECTOR], b[VECTOR];
    load(a, hidden + i);
    load(b, weight + i);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum += a[j] * b[j];
  }
  return sum;
}

// Takes `row_max` from the logits of the row, those near it computed again.
DEVICE void subtract(In* logits, const In* hidden, const In* weight, float row_max) {
#pragma unroll 1
  for (int entry = threadIdx.x; entry < VOCAB; entry += THREADS) {
    float x[1];
    load(x, logits + entry);
    if (x[0] > row_max - kNear) x[0] = product(hidden, weight + static_cast<long long>(entry) * SIZE);
    x[0] -= row_max;
    store(x, logits + entry);
  }
}

template <bool largest>
DEVICE float block_reduce(float x, float* shared) {
  x = largest ? warp_max(x) : warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  sync_threads();
  x = shared[threadIdx.x % (THREADS / 32)];
#pragma unroll
  for (int mask = THREADS / 64; mask; mask /= 2) {
    const float other = shfl_xor(x, mask);
    x = largest ? fmaxf(x, other) : x + other;
  }
  return x;
}

KERNEL(THREADS, 1024 / THREADS)
softmax_gradient(In* logits, const In* hidden, const In* weight, const long long* targets, float* losses,
                 int ignore_index, float factor) {
  SHARED(float, max_of_warp, THREADS / 32);
  SHARED(float, sum_of_warp, THREADS / 32);
  const long long row = blockIdx.x, target = targets[row];
  logits += row * STRIDE;
  hidden += row * SIZE;
  if (target == ignore_index) {
    if (threadIdx.x == 0) losses[row] = 0;
    if (GRADIENT)
      for (int p = 0; p < kParts; ++p)
        if (first_entry(p) < STRIDE) *reinterpret_cast<uint4*>(logits + first_entry(p)) = make_uint4(0, 0, 0, 0);
    return;
  }
  const bool known = target >= 0 && target < VOCAB;
  // Read before the first barrier, written behind the last one.
  float at_target[1];
  load(at_target, logits + (known ? target : 0));

  uint4 parts[kParts];
  load_row(parts, logits);
  float row_max = kLowest;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if (first_entry(p) >= STRIDE) continue;
    float x[kWide];
    unpack(x, parts[p]);
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (first_entry(p) + i < VOCAB) row_max = fmaxf(row_max, x[i]);
  }
  row_max = block_reduce<true>(row_max, max_of_warp);
  if (X == 16 && fabsf(row_max) >= kPeaked && fabsf(row_max) <= kLargest) {
    subtract(logits, hidden, weight, row_max);
    if (known && threadIdx.x == 0) at_target[0] = product(hidden, weight + target * SIZE) - row_max;
    row_max = 0;
    sync_threads();
    load_row(parts, logits);
  }

  float row_sum = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if (first_entry(p) >= STRIDE) continue;
    float x[kWide];
    unpack(x, parts[p]);
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      if (first_entry(p) + i < VOCAB) row_sum += ex2((x[i] - row_max) * kLog2e);
  }
  row_sum = block_reduce<false>(row_sum, sum_of_warp);

  if (threadIdx.x == 0)
    losses[row] = known ? row_max - at_target[0] + lg2(row_sum) * kLn2 : float_from_bits(0x7fffffff);
  if (!GRADIENT) return;
  const float scale = factor / row_sum;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if (first_entry(p) >= STRIDE) continue;
    float x[kWide];
    unpack(x, parts[p]);
#pragma unroll
    for (int i = 0; i < kWide; ++i) x[i] = ex2((x[i] - row_max) * kLog2e) * scale;
    store(x, logits + first_entry(p));
  }
  sync_threads();
  if (threadIdx.x == 0 && known) {
    const float delta[1] = {ex2((at_target[0] - row_max) * kLog2e) * scale - factor};
    store(delta, logits + target);
  }
}
LAUNCHER(softmax_gradient)

// Causal flash attention with grouped queries, fp16 in, fp32 sums, for tensor cores from compute capability 7.5 on.
//
// Compile with -DHEAD_SIZE=16|32|64 -DGROUP=<query heads a key/value head> -DSTARTS=0|1.
//     heads = 4, 3, 2 or 1, the first that divides GROUP: so many of a group share a block of 4 warps and its tiles of
//     K and V. A warp has 32 positions of one head, or (dK, dV) 32 keys, 16 at size 64.
//
//     kernel              threads  grid
//     attention_forward   128      (ceil(T / (4 / heads * 32)), KV * GROUP / heads, B); 4 / 3 is 1: a warp idles
//     attention_dq        128      the same
//     attention_dkdv      128      (ceil(T / (64 at size 64, else 128)), KV, B)
//
// Backward: first attention_dq, then attention_dkdv. Arguments in order (no other memory is needed):
//     forward  q k v starts        o lse v_norm          T scale  strides of q k v
//     dq       q k v starts o do   lse v_norm rows do_norm dq        T scale  strides of q k v do dq
//     dkdv     q k v starts do     rows v_norm do_norm dk dv         T scale  strides of q k v do dk dv
// q, do, dq [B, T, H, D] and k, v, dk, dv [B, T, KV, D] halves, each with three int strides (B, T, H) in elements, the
// last dimension dense; all start at multiples of 16 bytes and have strides that are multiples of 8.
// o [B, T, H, D] halves, dense. scale > 0. starts [B, T] int32, dense, not decreasing along T: position t sees
// starts[t]..t; any pointer where STARTS is 0. lse [B, H, T] fp32: log2 of the sum of 2^(score * scale * log2 e).
// v_norm [B, KV, T / 16] and do_norm [B, H, T / 16] fp32 (rounded up): largest squared norms of 16 rows. rows
// [B, H, T, 2] fp32.
//
// Probabilities and score gradients become halves without a conversion instruction (pack_positive in ptx.h: on 7.5 a
// conversion takes the unit that computes 2^x, the scarcest here). That is right for small numbers only, so:
//   - probabilities are at most 1 (2^1/2 by rounding, as rows with |lse| >= 2^22 become NaN), scaled by 2^kShift;
//   - a score's gradient p (dp - delta) is at most 2 |dO row| |V row| (Cauchy and Schwarz), and is scaled by what makes
//     that 2^5. dQ scales each row, dK and dV each block of keys, whence the norms. Infinity and NaN in dO, O, lse or V
//     make the scale, and with it the results, not finite: an overflow is never lost.
//
// Instructions that a warp issues per 16 x 8 scores off the diagonal, mma among them, and registers (nvcc 13.0, sm_75,
// GROUP 4); on paper, the cycles that these scores take in a T4's tensor core and in its unit of 2^x:
//                       head size 16            32                     64                    cycles at 16
//     forward           30.1 ( 4)  154          36.6 ( 8)  193         56.9 (16)  214          32, 34
//     dQ                33.9 ( 6)  148          42.1 (12)  195         61.8 (24)  224          48, 32
//     dK, dV            43.1 ( 8)  161          53.5 (16)  228         82.2 (32)  217          64, 32
// Source: Dao, "FlashAttention-2", 2023.
#include "mma.h"

constexpr int kSize = HEAD_SIZE, kGroup = GROUP;
constexpr int kChunks = kSize / 8;  // of 16 bytes, the width of a product
constexpr int kHeads = kGroup % 4 == 0 ? 4 : kGroup % 3 == 0 ? 3 : kGroup % 2 == 0 ? 2 : 1;
constexpr int kThreads = 128;

constexpr int kForwardTiles = 2, kForwardKeys = kSize == 64 ? 32 : 64;  // row tiles of 16 a warp; keys a tile
constexpr int kQueryTiles = 2, kQueryKeys = 1024 / kSize;
constexpr int kKeyTiles = kSize == 64 ? 1 : 2, kKeyQueries = kSize == 16 ? 64 : 32;
constexpr int kKeyRows = 4 * 16 * kKeyTiles;
// Blocks a multiprocessor: what the registers allow without spills.
constexpr int kQueryBlocks = kSize == 16 && !STARTS ? 3 : 2, kKeyBlocks = kSize == 16 ? 3 : 2;

constexpr float kLog2e = 1.44269504f;
// Instead of a score that a row does not see, and the bias of a row without keys yet: beyond that of any score, but not
// of a masked one.
constexpr float kMasked = -1e30f, kNothing = 1e20f;
constexpr float kShift = 10;             // 2^-24 is still a normal half
constexpr float kBias = kShift - 112;    // see pack_positive
constexpr float kUnshift = 1.0f / 1024;  // 2^-kShift

// ---- fragments

using Rows = unsigned[kChunks][2];  // A, 16 rows of a matrix [rows][kSize]

// Row `time` of a head.
template <class X>
DEVICE X* place(X* x, int batch, int time, int head, int batch_stride, int time_stride, int head_stride) {
  return x + static_cast<long long>(batch) * batch_stride + static_cast<long long>(time) * time_stride +
         static_cast<long long>(head) * head_stride;
}

// ---- tiles in shared memory: rows of kSize halves, chunks swapped so that the same chunk of 8 rows has no conflicts

DEVICE int chunk_place(int row, int chunk) { return (chunk ^ (row % 8 * kChunks / 8)) * 8; }

// Two matrices [rows][kSize] on the way to shared memory: each thread's part, the same rows and chunk of both.
template <int rows>
struct Parts {
  static constexpr int kEach = rows * kChunks / kThreads, kApart = kThreads / kChunks;
  uint4 a[kEach], b[kEach];
};

DEVICE int part_row() { return threadIdx.x / kChunks; }
DEVICE int part_column() { return threadIdx.x % kChunks * 8; }

// `a` and `b` are the thread's: place(.., part_row(), ..) + part_column() of a tile of which `left` rows exist.
template <int rows>
DEVICE void load_parts(Parts<rows>& parts, const Half* a, int stride_a, const Half* b, int stride_b, int left) {
  using P = Parts<rows>;
#pragma unroll
  for (int i = 0; i < P::kEach; ++i) {
    const bool exists = part_row() + i * P::kApart < left;
    parts.a[i] = parts.b[i] = make_uint4(0, 0, 0, 0);
    if (exists) parts.a[i] = *reinterpret_cast<const uint4*>(row_of(a, i * P::kApart, stride_a));
    if (exists) parts.b[i] = *reinterpret_cast<const uint4*>(row_of(b, i * P::kApart, stride_b));
  }
}

template <int rows>
DEVICE void store_parts(const Parts<rows>& parts, Half* tile) {
  using P = Parts<rows>;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int i = 0; i < P::kEach; ++i) {
    const int row = part_row() + i * P::kApart;
    uint4* to = reinterpret_cast<uint4*>(tile + row * kSize + chunk_place(row, chunk));
    to[0] = parts.a[i];
    to[rows * kChunks] = parts.b[i];
  }
}

// B of 16 rows as [rows / 8][columns / 8]: plain for a product with the transposed matrix, trans for one with itself.
DEVICE void load_b(unsigned (&b)[2][kChunks], const Half* tile, bool trans) {
  const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
#pragma unroll
  for (int c = 0; c < kChunks; c += 2) {
    unsigned m[4];
    const Half* from = tile + row * kSize + chunk_place(row, chunk + c);
    if (trans) ldmatrix_x4_trans(m, from);
    else ldmatrix_x4(m, from);
    b[0][c] = m[0], b[0][c + 1] = m[1], b[1][c] = m[2], b[1][c + 1] = m[3];
  }
}

// Two times 8 columns of a b^T.
template <int tiles>
DEVICE void multiply(float (&sum)[tiles][2][4], const Rows (&a)[tiles], const unsigned (&b)[2][kChunks]) {
#pragma unroll
  for (int m = 0; m < tiles; ++m)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][j][i] = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) mma_m16n8k8(sum[m][j], a[m][c][0], a[m][c][1], b[j][c]);
}

// sum += a b, of 8 columns of a.
DEVICE void multiply_add(float (&sum)[kChunks][4], unsigned a0, unsigned a1, const unsigned (&b)[kChunks]) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) mma_m16n8k8(sum[c], a0, a1, b[c]);
}

// ---- norms: squared, as bits, which order like the numbers and NaN above all

DEVICE unsigned warp_max(unsigned bits) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) bits = max(bits, shfl_xor(bits, mask));
  return bits;
}

DEVICE float warp_max(const float* x, int count) {
  unsigned bits = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) bits = max(bits, float_bits(x[i]));
  return float_from_bits(warp_max(bits));
}

// Writes the largest of a warp's bits for `tiles` times 16 rows from `row` on.
template <int tiles>
DEVICE void store_norm(float* norms, unsigned bits, int row, int T) {
  const int lane = threadIdx.x % 32;
  bits = warp_max(bits);
  if (lane < tiles && row + lane * 16 < T) norms[row / 16 + lane] = float_from_bits(bits);
}

// What brings 2 |dO| |V| to 2^5. Its inverse is not finite where a norm is not.
DEVICE float gradient_scale(float do_norm, float v_norm) {
  return ex2(4 - 0.5f * lg2(do_norm * v_norm + 0x1p-100f));
}

// ---- masks

// The positions a warp's rows see: every row those of [all_from, all_to), none one outside of [from, to).
struct Range {
  int from, to, all_from, all_to;
};

DEVICE Range seen_by(const int* starts, int first, int rows, int T) {
  const int last = min(first + rows, T) - 1;
  if (first >= T) return {0, 0, 0, 0};
  if (STARTS) return {starts[first], last + 1, starts[last], first + 1};
  return {0, last + 1, 0, first + 1};
}

// Scores of 16 keys from `key` on that rows do not see. `row`: position of the lane's first row.
template <int tiles>
DEVICE void mask_keys(float (&score)[tiles][2][4], int row, int key, const int* starts, int T) {
#pragma unroll
  for (int m = 0; m < tiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int last = row + m * 16 + i / 2 * 8, first = STARTS ? starts[min(last, T - 1)] : 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = key + j * 8 + lane_column() + i % 2;
        if (at > last || (STARTS && at < first)) score[m][j][i] = kMasked;
      }
    }
}

// Which positions and head a block and its warps have, in the kernels that own queries. The longest rows come first.
struct Place {
  int block_first, block_end, first, head, kv;
};

template <int rows>
DEVICE Place query_place(int T) {
  constexpr int kBlock = 4 / kHeads * rows;
  const int warp = threadIdx.x / 32, first = (gridDim.x - 1 - blockIdx.x) * kBlock;
  const int later = kHeads == 4 ? 0 : warp / kHeads * rows;  // a compiler sees what all warps of 4 heads share
  const int head = blockIdx.y * kHeads + (kHeads == 1 ? 0 : warp % kHeads), kv = blockIdx.y * kHeads / kGroup;
  const bool idle = kHeads == 3 && warp == 3;  // but for loading keys and values
  return {first, min(first + kBlock, T), idle ? T : first + later, head, kv};
}

// Calls work(K, V, key) for tiles of `keys` rows of k and v in shared memory, from the one that holds `from` to `end`;
// meanwhile the next one is on its way.
template <int keys, class Work>
DEVICE void for_tiles(const Half* k, int k_time, const Half* v, int v_time, int from, int end, int T, Work work) {
  constexpr int kTile = keys * kSize;
  SHARED(Half, tiles, 4 * kTile);  // twice K and V
  Parts<keys> parts;
  int key = from / keys * keys, buffer = 0;
  k = row_of(k, key + part_row(), k_time) + part_column();
  v = row_of(v, key + part_row(), v_time) + part_column();
  load_parts(parts, k, k_time, v, v_time, T - key);
  while (true) {
    Half* tile = tiles + buffer * 2 * kTile;
    store_parts(parts, tile);
    sync_threads();
    const int next = key + keys;
    if (next < end) {
      k = row_of(k, keys, k_time);
      v = row_of(v, keys, v_time);
      load_parts(parts, k, k_time, v, v_time, T - next);
    }
    work(tile, tile + kTile, key);
    if (next >= end) return;
    key = next;
    buffer ^= 1;
  }
}

// ---- forward

// `bias`: kBias less the running maximum times c.
template <bool masked>
DEVICE void attend(float (&out)[kForwardTiles][kChunks][4], float (&bias)[kForwardTiles][2],
                   float (&l)[kForwardTiles][2], const Rows (&q)[kForwardTiles], const Half* k, const Half* v,
                   float c, int row, int key, const int* starts, int T) {
  constexpr int kSteps = kForwardKeys / 16;
  float score[kSteps][kForwardTiles][2][4];
  unsigned b[2][kChunks];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    load_b(b, k + s * 16 * kSize, false);
    multiply(score[s], q, b);
    if (masked) mask_keys(score[s], row, key + s * 16, starts, T);
  }
#pragma unroll
  for (int m = 0; m < kForwardTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float row_max = kMasked;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          row_max = fmaxf(fmaxf(row_max, score[s][m][j][2 * i]), score[s][m][j][2 * i + 1]);
      row_max = fmaxf(row_max, shfl_xor(row_max, 1));
      row_max = fmaxf(row_max, shfl_xor(row_max, 2));
      const float before = bias[m][i];
      bias[m][i] = fminf(before, kBias - row_max * c);
      const float alpha = ex2(bias[m][i] - before);
      l[m][i] *= alpha;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) out[m][chunk][2 * i] *= alpha, out[m][chunk][2 * i + 1] *= alpha;
    }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    load_b(b, v + s * 16 * kSize, true);
#pragma unroll
    for (int m = 0; m < kForwardTiles; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float(&p)[4] = score[s][m][j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[i] = ex2(p[i] * c + bias[m][i / 2]);
          l[m][i / 2] += p[i];
        }
        multiply_add(out[m], pack_positive(p[0], p[1]), pack_positive(p[2], p[3]), b[j]);
      }
  }
}

KERNEL(kThreads, kQueryBlocks)
attention_forward(const Half* q, const Half* k, const Half* v, const int* starts, Half* o, float* lse, float* v_norm,
                  int T, float scale, int q_batch, int q_time, int q_head, int k_batch, int k_time, int k_head,
                  int v_batch, int v_time, int v_head) {
  constexpr int kRows = 16 * kForwardTiles;
  const Place at = query_place<kRows>(T);
  const long long batch = blockIdx.z;
  const int heads = gridDim.y * kHeads, row = at.first + lane_row(), left = T - at.first;
  k = place(k, batch, 0, at.kv, k_batch, k_time, k_head);
  v = place(v, batch, 0, at.kv, v_batch, v_time, v_head);
  starts += batch * T;
  const float c = scale * kLog2e;

  if (at.head % kGroup == 0) {
    const int lane = threadIdx.x % 32;
    float norm = 0;
    if (lane < min(kRows, left)) {
      const Half* from = row_of(v, at.first + lane, v_time);
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const unsigned x = *reinterpret_cast<const unsigned*>(from + i);
        norm += low_half(x) * low_half(x) + high_half(x) * high_half(x);
      }
    }
    float* to = v_norm + (batch * (heads / kGroup) + at.kv) * ((T + 15) / 16);
    store_norm<kForwardTiles>(to, float_bits(norm), at.first, T);
  }

  Rows a[kForwardTiles];
  load_rows(a, place(q, batch, at.first, at.head, q_batch, q_time, q_head), q_time, 0, left);
  float out[kForwardTiles][kChunks][4], bias[kForwardTiles][2], l[kForwardTiles][2];
  clear(out);
#pragma unroll
  for (int m = 0; m < kForwardTiles; ++m) bias[m][0] = bias[m][1] = kNothing, l[m][0] = l[m][1] = 0;
  const Range seen = seen_by(starts, at.first, kRows, T);

  const int from = STARTS ? starts[at.block_first] : 0;
  for_tiles<kForwardKeys>(k, k_time, v, v_time, from, at.block_end, T, [&](const Half* k, const Half* v, int key) {
    const int next = key + kForwardKeys;
    if (seen.all_from <= key && next <= seen.all_to) {
      attend<false>(out, bias, l, a, k, v, c, row, key, starts, T);
    } else if (seen.from < next && key < seen.to) {
      attend<true>(out, bias, l, a, k, v, c, row, key, starts, T);
    }
  });

  float factor[kForwardTiles][2];
  lse += (batch * heads + at.head) * T;
#pragma unroll
  for (int m = 0; m < kForwardTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = l[m][i];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (!(fabsf(bias[m][i]) < 0x1p22f)) sum = float_from_bits(0x7fffffff);
      factor[m][i] = rcp(sum * 0x1p112f);
      const int mine = row + m * 16 + i * 8;
      if (mine < T && threadIdx.x % 4 == 0) lse[mine] = lg2(sum) - bias[m][i];
    }
  store_rows(out, factor, o + ((batch * T + at.first) * heads + at.head) * kSize, heads * kSize, 0, left);
}
LAUNCHER(attention_forward)

// ---- backward: dQ

template <bool masked>
DEVICE void query_gradient(float (&dq)[kQueryTiles][kChunks][4], const Rows (&q)[kQueryTiles],
                           const Rows (&d)[kQueryTiles], const Half* k, const Half* v, float c,
                           const float (&shift)[kQueryTiles][2], const float (&up)[kQueryTiles][2],
                           const float (&delta)[kQueryTiles][2], int row, int key, const int* starts, int T) {
#pragma unroll 2
  for (int s = 0; s < kQueryKeys; s += 16) {
    if (masked && key + s >= row - lane_row() + 16 * kQueryTiles) break;  // behind the last row
    unsigned b[2][kChunks];
    float score[kQueryTiles][2][4], dp[kQueryTiles][2][4];
    load_b(b, k + s * kSize, false);
    multiply(score, q, b);
    load_b(b, v + s * kSize, false);
    multiply(dp, d, b);
    if (masked) mask_keys(score, row, key + s, starts, T);
    load_b(b, k + s * kSize, true);
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float ds[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ds[i] = ex2(score[m][j][i] * c + shift[m][i / 2]) * (dp[m][j][i] * up[m][i / 2] + delta[m][i / 2]);
        multiply_add(dq[m], pack_signed(ds[0], ds[1]), pack_signed(ds[2], ds[3]), b[j]);
      }
  }
}

KERNEL(kThreads, kQueryBlocks)
attention_dq(const Half* q, const Half* k, const Half* v, const int* starts, const Half* o, const Half* d_o,
             const float* lse, const float* v_norm, float* rows, float* do_norm, Half* dq, int T, float scale,
             int q_batch, int q_time, int q_head, int k_batch, int k_time, int k_head, int v_batch, int v_time,
             int v_head, int do_batch, int do_time, int do_head, int dq_batch, int dq_time, int dq_head) {
  constexpr int kRows = 16 * kQueryTiles;
  const Place at = query_place<kRows>(T);
  const long long batch = blockIdx.z, head = at.head;
  const int heads = gridDim.y * kHeads, row = at.first + lane_row(), left = T - at.first;
  k = place(k, batch, 0, at.kv, k_batch, k_time, k_head);
  v = place(v, batch, 0, at.kv, v_batch, v_time, v_head);
  starts += batch * T;
  const float c = scale * kLog2e;

  Rows a[kQueryTiles], d[kQueryTiles], attn_out[kQueryTiles];
  load_rows(a, place(q, batch, at.first, at.head, q_batch, q_time, q_head), q_time, 0, left);
  load_rows(d, place(d_o, batch, at.first, at.head, do_batch, do_time, do_head), do_time, 0, left);
  load_rows(attn_out, o + ((batch * T + at.first) * heads + head) * kSize, heads * kSize, 0, left);

  const int norms = (T + 15) / 16;
  const float v_largest = warp_max(v_norm + (batch * (heads / kGroup) + at.kv) * norms, (at.block_end + 15) / 16);
  float shift[kQueryTiles][2], up[kQueryTiles][2], delta[kQueryTiles][2];
  unsigned largest = 0;
  lse += (batch * heads + head) * T;
  rows += (batch * heads + head) * T * 2;
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float along = 0, norm = 0;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const unsigned x = d[m][chunk][i], y = attn_out[m][chunk][i];
        along += low_half(x) * low_half(y) + high_half(x) * high_half(y);
        norm += low_half(x) * low_half(x) + high_half(x) * high_half(x);
      }
      along += shfl_xor(along, 1);
      along += shfl_xor(along, 2);
      norm += shfl_xor(norm, 1);
      norm += shfl_xor(norm, 2);
      const int mine = row + m * 16 + i * 8;
      const float own = mine < T ? lse[mine] : 0;
      norm += 0 * (own + along);  // NaN where they are not finite
      shift[m][i] = kBias - own;
      up[m][i] = gradient_scale(norm, v_largest);
      delta[m][i] = -up[m][i] * along;
      largest = max(largest, float_bits(norm) & 0x7fffffffu);
      if (mine < T && threadIdx.x % 4 == 0)
        *reinterpret_cast<float2*>(rows + 2 * mine) = make_float2(shift[m][i], along);
    }
  store_norm<kQueryTiles>(do_norm + (batch * heads + head) * norms, largest, at.first, T);

  float sum[kQueryTiles][kChunks][4];
  clear(sum);
  const Range seen = seen_by(starts, at.first, kRows, T);

  const int from = STARTS ? starts[at.block_first] : 0;
  for_tiles<kQueryKeys>(k, k_time, v, v_time, from, at.block_end, T, [&](const Half* k, const Half* v, int key) {
    const int next = key + kQueryKeys;
    if (seen.all_from <= key && next <= seen.all_to) {
      query_gradient<false>(sum, a, d, k, v, c, shift, up, delta, row, key, starts, T);
    } else if (seen.from < next && key < seen.to) {
      query_gradient<true>(sum, a, d, k, v, c, shift, up, delta, row, key, starts, T);
    }
  });
  float factor[kQueryTiles][2];
#pragma unroll
  for (int m = 0; m < kQueryTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[m][i] = rcp(up[m][i]) * (scale * kUnshift);
  store_rows(sum, factor, place(dq, batch, at.first, at.head, dq_batch, dq_time, dq_head), dq_time, 0, left);
}
LAUNCHER(attention_dq)

// ---- backward: dK and dV, summed over the heads of the group

// Queries of a tile as columns: what dq wrote, delta scaled.
struct Columns {
  float2 row;
  int start;
};

template <bool masked>
DEVICE void key_gradients(float (&dk)[kKeyTiles][kChunks][4], float (&dv)[kKeyTiles][kChunks][4],
                          const Rows (&k)[kKeyTiles], const Rows (&v)[kKeyTiles], const Half* q, const Half* d,
                          const float2* rows, const int* starts, float c, float up, int key, int query) {
#pragma unroll 2
  for (int s = 0; s < kKeyQueries; s += 16) {
    if (masked && query + s + 16 <= key - lane_row()) continue;  // before the first key
    unsigned b[2][kChunks];
    float p[kKeyTiles][2][4], ds[kKeyTiles][2][4];
    load_b(b, q + s * kSize, false);
    multiply(p, k, b);
    load_b(b, d + s * kSize, false);
    multiply(ds, v, b);
    load_b(b, d + s * kSize, true);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = s + j * 8 + lane_column();
      const float4 two = *reinterpret_cast<const float4*>(rows + column);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int mine = key + m * 16 + i / 2 * 8;
          float score = p[m][j][i];
          if (masked && (mine > query + column + i % 2 || (STARTS && mine < starts[column + i % 2]))) score = kMasked;
          p[m][j][i] = ex2(score * c + (i % 2 ? two.z : two.x));
          ds[m][j][i] = p[m][j][i] * (ds[m][j][i] * up + (i % 2 ? two.w : two.y));
        }
        multiply_add(dv[m], pack_positive(p[m][j][0], p[m][j][1]), pack_positive(p[m][j][2], p[m][j][3]), b[j]);
      }
    }
    load_b(b, q + s * kSize, true);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
        multiply_add(dk[m], pack_signed(ds[m][j][0], ds[m][j][1]), pack_signed(ds[m][j][2], ds[m][j][3]), b[j]);
  }
}

DEVICE Columns load_columns(const float* rows, const int* starts, int left) {
  if (threadIdx.x >= kKeyQueries || static_cast<int>(threadIdx.x) >= left) return {make_float2(kMasked, 0), 1 << 30};
  return {*reinterpret_cast<const float2*>(rows), STARTS ? *starts : 0};
}

// The first position from `low` on whose start is beyond `key`.
DEVICE int first_beyond(const int* starts, int low, int T, int key) {
  while (low < T) {
    const int middle = low + (T - low) / 2;
    if (starts[middle] > key) T = middle;
    else low = middle + 1;
  }
  return low;
}

KERNEL(kThreads, kKeyBlocks)
attention_dkdv(const Half* q, const Half* k, const Half* v, const int* starts, const Half* d_o, const float* rows,
               const float* v_norm, const float* do_norm, Half* dk, Half* dv, int T, float scale, int q_batch,
               int q_time, int q_head, int k_batch, int k_time, int k_head, int v_batch, int v_time, int v_head,
               int do_batch, int do_time, int do_head, int dk_batch, int dk_time, int dk_head, int dv_batch,
               int dv_time, int dv_head) {
  constexpr int kTile = kKeyQueries * kSize;
  SHARED(Half, tiles, 4 * kTile);  // twice Q and dO
  SHARED(float2, columns, 2 * kKeyQueries);
  SHARED(int, column_starts, 2 * kKeyQueries);
  const long long batch = blockIdx.z, kv = blockIdx.y;
  const int block_first = blockIdx.x * kKeyRows, first = block_first + threadIdx.x / 32 * 16 * kKeyTiles;
  const int key = first + lane_row(), heads = gridDim.y * kGroup, left = T - first;
  starts += batch * T;
  const float c = scale * kLog2e;

  Rows a[kKeyTiles], b[kKeyTiles];
  load_rows(a, place(k, batch, first, kv, k_batch, k_time, k_head), k_time, 0, left);
  load_rows(b, place(v, batch, first, kv, v_batch, v_time, v_head), v_time, 0, left);

  const int norms = (T + 15) / 16, from = block_first / 16;
  float do_largest = 0;
#pragma unroll 1
  for (int h = 0; h < kGroup; ++h) {
    const float x = warp_max(do_norm + (batch * heads + kv * kGroup + h) * norms + from, norms - from);
    do_largest = float_from_bits(max(float_bits(do_largest), float_bits(x)));
  }
  const float v_largest =
      warp_max(v_norm + (batch * gridDim.y + kv) * norms + from, min(kKeyRows / 16, norms - from));
  const float up = gradient_scale(do_largest, v_largest);

  float dk_sum[kKeyTiles][kChunks][4], dv_sum[kKeyTiles][kChunks][4];
  clear(dk_sum);
  clear(dv_sum);

  const int begin = block_first / kKeyQueries * kKeyQueries;
  const int end = STARTS ? first_beyond(starts, block_first, T, min(block_first + kKeyRows, T) - 1) : T;
  Parts<kKeyQueries> parts;
  Columns next_columns;
  int query = begin, head = 0, buffer = 0;
  q = place(q, batch, begin + part_row(), kv * kGroup, q_batch, q_time, q_head) + part_column();
  d_o = place(d_o, batch, begin + part_row(), kv * kGroup, do_batch, do_time, do_head) + part_column();
  rows += ((batch * heads + kv * kGroup) * T + begin + threadIdx.x) * 2;
  load_parts(parts, q, q_time, d_o, do_time, T - begin);
  next_columns = load_columns(rows, starts + begin + threadIdx.x, T - begin);
  while (true) {
    store_parts(parts, tiles + buffer * 2 * kTile);
    if (threadIdx.x < kKeyQueries) {
      const float2 row = next_columns.row;
      columns[buffer * kKeyQueries + threadIdx.x] = make_float2(row.x, -up * row.y);
      if (STARTS) column_starts[buffer * kKeyQueries + threadIdx.x] = next_columns.start;
    }
    sync_threads();
    const int current = query;
    query += kKeyQueries;
    q = row_of(q, kKeyQueries, q_time);
    d_o = row_of(d_o, kKeyQueries, do_time);
    rows += 2 * kKeyQueries;
    if (query >= end) {
      q = place(q, 0, begin - query, 1, 0, q_time, q_head);
      d_o = place(d_o, 0, begin - query, 1, 0, do_time, do_head);
      rows += 2 * (T + begin - query);
      query = begin;
      ++head;
    }
    if (head < kGroup) {
      load_parts(parts, q, q_time, d_o, do_time, T - query);
      next_columns = load_columns(rows, starts + query + threadIdx.x, T - query);
    }
    const Half* tile = tiles + buffer * 2 * kTile;
    const float2* tile_columns = columns + buffer * kKeyQueries;
    const int* tile_starts = column_starts + buffer * kKeyQueries;
    const bool all = first + 16 * kKeyTiles <= current + 1 && (!STARTS || tile_starts[kKeyQueries - 1] <= first);
    if (all) {
      key_gradients<false>(dk_sum, dv_sum, a, b, tile, tile + kTile, tile_columns, tile_starts, c, up, key,
                           current);
    } else if (first < current + kKeyQueries) {
      key_gradients<true>(dk_sum, dv_sum, a, b, tile, tile + kTile, tile_columns, tile_starts, c, up, key,
                          current);
    }
    if (head >= kGroup) break;
    buffer ^= 1;
  }

  float dk_factor[kKeyTiles][2], dv_factor[kKeyTiles][2];
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dk_factor[m][i] = rcp(up) * (scale * kUnshift);
      dv_factor[m][i] = kUnshift + 0 * rcp(up);  // NaN, too, where the scale is not finite
    }
  store_rows(dk_sum, dk_factor, place(dk, batch, first, kv, dk_batch, dk_time, dk_head), dk_time, 0, left);
  store_rows(dv_sum, dv_factor, place(dv, batch, first, kv, dv_batch, dv_time, dv_head), dv_time, 0, left);
}
LAUNCHER(attention_dkdv)

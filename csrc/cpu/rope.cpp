// Rotary position embedding (Su et al., 2021) of q and k in one pass; half-rotate layout: dimension j is rotated with
// j + dim / 2. The gradient is the rotation back.
#include <type_traits>

#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kPositionsATask = 64;

// kHalf, when not 0, is dim / 2 as a constant, so that the compiler makes whole vectors of it. `to` may be `from`.
template <int kHalf>
void rotate(const float* from, const float* cos, const float* sin, float sign, int64_t any_half, float* to) {
    constexpr int64_t kBlock = kHalf ? kHalf : 1;
    const int64_t half = kHalf ? kHalf : any_half;
    for (int64_t i = 0; i < half; i += kBlock) {
        float a[kBlock], b[kBlock];
        std::memcpy(a, from + i, sizeof a);
        std::memcpy(b, from + half + i, sizeof b);
        for (int64_t j = 0; j < kBlock; ++j) {
            const float c = cos[i + j];
            const float s = sin[i + j] * sign;
            const float rotated = a[j] * c - b[j] * s;
            b[j] = b[j] * c + a[j] * s;
            a[j] = rotated;
        }
        std::memcpy(to + i, a, sizeof a);
        std::memcpy(to + half + i, b, sizeof b);
    }
}

template <int kHalf>
void rotate_heads(const Heads& x, int64_t batch, int64_t time, int64_t heads, int64_t dim, const float* cos,
                  const float* sin, float sign, const OutHeads& out) {
    const float* from = x.data + batch * x.batch + time * x.time;
    float* to = out.data + batch * out.batch + time * out.time;
    for (int64_t head = 0; head < heads; ++head)
        rotate<kHalf>(from + head * x.head, cos, sin, sign, dim / 2, to + head * out.head);
}

}  // namespace

void rope(const AttentionShape& shape, const Heads& q, const Heads& k, const float* cos, const float* sin, float sign,
          const OutHeads& out_q, const OutHeads& out_k, int threads) {
    const int64_t chunks = (shape.length + kPositionsATask - 1) / kPositionsATask;
    const auto rotate_all = [&](auto half) {
        parallel(threads, shape.batch * chunks, [&](int64_t task) {
            const int64_t batch = task / chunks;
            const int64_t end = (task % chunks + 1) * kPositionsATask;
            for (int64_t t = task % chunks * kPositionsATask; t < (end < shape.length ? end : shape.length); ++t) {
                const float* cos_t = cos + t * (shape.dim / 2);
                const float* sin_t = sin + t * (shape.dim / 2);
                rotate_heads<half.value>(q, batch, t, shape.heads, shape.dim, cos_t, sin_t, sign, out_q);
                rotate_heads<half.value>(k, batch, t, shape.kv_heads, shape.dim, cos_t, sin_t, sign, out_k);
            }
        });
    };
    switch (shape.dim) {
        case 16: return rotate_all(std::integral_constant<int, 8>());
        case 64: return rotate_all(std::integral_constant<int, 32>());
        default: return rotate_all(std::integral_constant<int, 0>());
    }
}

}  // namespace ant5m::ANT5M_ISA

// QK-norm (Henry et al., 2020): RMSNorm of each head of q and k, and RoPE behind it, in one pass; half-rotate layout,
// as in rope.cpp. The backward pass makes a head's statistic again: it reads the head anyway.
#include <math.h>

#include <type_traits>

#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace ant5m::ANT5M_ISA {
namespace {

constexpr int64_t kPositionsATask = 64;  // part of the result: the gradients of weights are summed by tasks

// What is computed at once: a register, or half of one where that is half a head. Of heads of 16 in registers of 16,
// parts of registers would take twice as long.
template <int kHalf>
struct Wide {
    using Type = Vec;
};
#if defined(__AVX512F__)
template <>
struct Wide<8> {
    typedef float Type __attribute__((vector_size(8 * sizeof(float))));
};
#endif

template <int kHalf, typename Visit>
void for_wide(int64_t n, const Visit& visit) {
    using Part = typename Wide<kHalf>::Type;
    if constexpr (sizeof(Part) == sizeof(Vec)) return for_vectors(n, visit);
    const auto load = [](const float* p) {
        Part part;
        std::memcpy(&part, p, sizeof part);
        return part;
    };
    const auto store = [](float* p, Part part) { std::memcpy(p, &part, sizeof part); };
    for (int64_t i = 0; i < n; i += sizeof(Part) / sizeof(float)) visit(i, load, store);
}

// The sum of the elements, always in the same order.
template <typename Part>
float sum_of(Part part) {
    constexpr int kCount = sizeof(Part) / sizeof(float);
    float parts[kCount];
    std::memcpy(parts, &part, sizeof part);
    for (int half = kCount / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// One head. kHalf, when not 0, is dim / 2 as a constant, so that the compiler makes whole vectors of it.
template <int kHalf>
struct Head {
    using Part = typename Wide<kHalf>::Type;
    int64_t any_half;
    float eps;
    const float* weight;
    const float* cos;
    const float* sin;

    int64_t half() const { return kHalf ? kHalf : any_half; }

    float factor(const float* x) const {
        Part squares = {};
        for_wide<kHalf>(2 * half(), [&](int64_t i, auto load, auto) {
            const auto value = load(x + i);
            squares += value * value;
        });
        return 1.0f / sqrtf(sum_of(squares) / static_cast<float>(2 * half()) + eps);
    }

    void rotate(const float* x, float* out) const {
        const float scale = factor(x);
        for_wide<kHalf>(half(), [&](int64_t i, auto load, auto store) {
            const int64_t j = half() + i;
            const auto a = load(x + i) * scale * load(weight + i), b = load(x + j) * scale * load(weight + j);
            const auto c = load(cos + i), s = load(sin + i);
            store(out + i, a * c - b * s);
            store(out + j, b * c + a * s);
        });
    }

    // grad_x, and to grad_weight is added, for the gradient `grad` of what `rotate` gives.
    void differentiate(const float* x, const float* grad, float* grad_x, float* grad_weight) const {
        const float scale = factor(x);
        Part along = {};
        const auto step = [&](Part grad_out, Part unit, Part weight, Part sum) {
            along += grad_out * weight * unit;
            return sum + grad_out * unit;
        };
        for_wide<kHalf>(half(), [&](int64_t i, auto load, auto store) {
            const int64_t j = half() + i;
            const auto a = load(grad + i), b = load(grad + j), c = load(cos + i), s = load(sin + i);
            const auto first = a * c + b * s, second = b * c - a * s;
            store(grad_weight + i, step(first, load(x + i) * scale, load(weight + i), load(grad_weight + i)));
            store(grad_weight + j, step(second, load(x + j) * scale, load(weight + j), load(grad_weight + j)));
        });
        const float mean = sum_of(along) / static_cast<float>(2 * half());
        for_wide<kHalf>(half(), [&](int64_t i, auto load, auto store) {
            const int64_t j = half() + i;
            const auto a = load(grad + i), b = load(grad + j), c = load(cos + i), s = load(sin + i);
            const auto first = a * c + b * s, second = b * c - a * s;
            store(grad_x + i, (first * load(weight + i) - load(x + i) * scale * mean) * scale);
            store(grad_x + j, (second * load(weight + j) - load(x + j) * scale * mean) * scale);
        });
    }
};

// Calls visit(half, task, batch, t) for every position, where half is dim / 2 as a constant, or 0.
template <typename Visit>
void for_positions(const AttentionShape& shape, int threads, const Visit& visit) {
    const int64_t chunks = (shape.length + kPositionsATask - 1) / kPositionsATask;
    const auto all = [&](auto half) {
        parallel(threads, shape.batch * chunks, [&](int64_t task) {
            const int64_t first = task % chunks * kPositionsATask, end = first + kPositionsATask;
            for (int64_t t = first; t < (end < shape.length ? end : shape.length); ++t)
                visit(half, task, task / chunks, t);
        });
    };
    switch (shape.dim) {
        case 16: return all(std::integral_constant<int, 8>());
        case 32: return all(std::integral_constant<int, 16>());
        case 64: return all(std::integral_constant<int, 32>());
        default: return all(std::integral_constant<int, 0>());
    }
}

const float* at(const Heads& x, int64_t batch, int64_t t) { return x.data + batch * x.batch + t * x.time; }
float* at(const OutHeads& x, int64_t batch, int64_t t) { return x.data + batch * x.batch + t * x.time; }

}  // namespace

void qk_norm_rope(const AttentionShape& shape, const Heads& q, const Heads& k, const float* q_norm,
                  const float* k_norm, float eps, const float* cos, const float* sin, const OutHeads& out_q,
                  const OutHeads& out_k, int threads) {
    for_positions(shape, threads, [&](auto half, int64_t, int64_t batch, int64_t t) {
        const int64_t angle = t * (shape.dim / 2);
        const auto rotate = [&](const Heads& x, const float* norm, int64_t heads, const OutHeads& out) {
            const Head<half.value> head{shape.dim / 2, eps, norm, cos + angle, sin + angle};
            for (int64_t h = 0; h < heads; ++h) head.rotate(at(x, batch, t) + h * x.head, at(out, batch, t) + h * out.head);
        };
        rotate(q, q_norm, shape.heads, out_q);
        rotate(k, k_norm, shape.kv_heads, out_k);
    });
}

void qk_norm_rope_backward(const AttentionShape& shape, const Heads& q, const Heads& k, const float* q_norm,
                           const float* k_norm, float eps, const float* cos, const float* sin, const Heads& grad_out_q,
                           const Heads& grad_out_k, const OutHeads& grad_q, const OutHeads& grad_k, float* grad_q_norm,
                           float* grad_k_norm, int threads) {
    const int64_t tasks = shape.batch * ((shape.length + kPositionsATask - 1) / kPositionsATask);
    const Memory parts(tasks * 2 * shape.dim);
    std::memset(parts.data(), 0, sizeof(float) * tasks * 2 * shape.dim);
    for_positions(shape, threads, [&](auto half, int64_t task, int64_t batch, int64_t t) {
        const int64_t angle = t * (shape.dim / 2);
        const auto differentiate = [&](const Heads& x, const Heads& grad, const float* norm, int64_t heads,
                                       const OutHeads& grad_x, float* grad_norm) {
            const Head<half.value> head{shape.dim / 2, eps, norm, cos + angle, sin + angle};
            for (int64_t h = 0; h < heads; ++h)
                head.differentiate(at(x, batch, t) + h * x.head, at(grad, batch, t) + h * grad.head,
                                   at(grad_x, batch, t) + h * grad_x.head, grad_norm);
        };
        float* part = parts.data() + task * 2 * shape.dim;
        differentiate(q, grad_out_q, q_norm, shape.heads, grad_q, part);
        differentiate(k, grad_out_k, k_norm, shape.kv_heads, grad_k, part + shape.dim);
    });
    std::memset(grad_q_norm, 0, sizeof(float) * shape.dim);
    std::memset(grad_k_norm, 0, sizeof(float) * shape.dim);
    for (int64_t task = 0; task < tasks; ++task)
        for (int64_t i = 0; i < shape.dim; ++i) {
            grad_q_norm[i] += parts.data()[task * 2 * shape.dim + i];
            grad_k_norm[i] += parts.data()[(task * 2 + 1) * shape.dim + i];
        }
}

}  // namespace ant5m::ANT5M_ISA

// The ops of ant5m._cpu. Each is compiled once per instruction set, in a namespace of that name; dispatch.cpp
// holds the table of the one in use. Only pointers, shapes and strides come in: no torch, no numpy.
//
// Strides count elements; those named *_row are a matrix's distance between rows, whose elements are neighbors. No
// pointer needs more alignment than its type. Outputs are contiguous unless they have a stride, and are written whole.
// Results do not depend on `threads`. With `bf16` the factors of products are rounded to bf16, and their sums are in
// fp32, where the instruction set has that (..._bf16); elsewhere it changes nothing.
#pragma once
#include <cstdint>
#include <vector>

#ifndef ANT5M_ISA
#define ANT5M_ISA portable
#endif

#ifndef ANT5M_FOR_EACH_SET  // what setup.py compiles, best first
#define ANT5M_FOR_EACH_SET(X) X(portable)
#endif

namespace ant5m {

// [batch, time, head, dim]; the last dimension's stride is 1.
struct Heads {
    const float* data;
    int64_t batch, time, head;
};

struct OutHeads {
    float* data;
    int64_t batch, time, head;
};

struct AttentionShape {
    int64_t batch, length, heads, kv_heads, dim;
};

// x [tokens, dim]; gate and up [width, dim] and down [dim, width], contiguous.
struct MlpShape {
    int64_t tokens, dim, width;
};
constexpr int64_t kMlpTokens = 128;

// Position t sees key s when s <= t < ends[s]; ends [batch, length] may be null: then every s <= t. Each position must
// see itself.
// out [batch, length, heads, dim] and lse [batch, heads, length], the log2 of the softmax's denominator; null when there
// will be no backward pass.
using AttentionForward = void(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v,
                              const int32_t* ends, float* out, float* lse, bool bf16, int threads);

// grad_q [batch, length, heads, dim]; grad_k and grad_v [batch, length, kv_heads, dim].
using AttentionBackward = void(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v,
                               const Heads& out, const Heads& grad, const int32_t* ends, const float* lse,
                               float* grad_q, float* grad_k, float* grad_v, bool bf16, int threads);

// counts [3]: the tiles of keys that one query head of each sequence goes through in the forward pass, without a mask,
// with the causal one, and with that of `ends`. For tests: a tile too many changes no result.
using AttentionTiles = void(const AttentionShape& shape, const int32_t* ends, int64_t* counts);

// The head: mean cross-entropy in nats of hidden [tokens, dim] weight [vocab, dim]^T against the targets [tokens],
// each of [0, vocab) or equal to ignore_index, over those that are not ignored; 0 when all are.
// grad_hidden [tokens, dim] and grad_weight [vocab, grad_weight_row] may be null; grad_weight_row is dim or above and
// a multiple of 16. They are of the loss + z_loss * the mean of log(sum(exp(logits)))^2; the loss is without it.
using LinearCrossEntropy = void(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                                const float* weight, int64_t weight_row, const int64_t* targets, int64_t ignore_index,
                                float z_loss, float* loss, float* grad_hidden, float* grad_weight,
                                int64_t grad_weight_row, bool bf16, int threads);

// Of each row of logits hidden [tokens, dim] weight [vocab, dim]^T: log(sum(exp)) and the first of its largest entries.
using LogsumexpArgmax = void(int64_t tokens, int64_t dim, int64_t vocab, const float* hidden, int64_t hidden_row,
                             const float* weight, int64_t weight_row, float* logsumexp, int64_t* argmax, int threads);

// out [rows, dim] = x / sqrt(mean(x^2) + eps) * weight, rstd [rows] = 1 / sqrt(mean(x^2) + eps). With a residual,
// total [rows, dim] = x + residual takes the place of x; both are null without.
using RmsNormForward = void(int64_t rows, int64_t dim, float eps, const float* x, int64_t x_row, const float* residual,
                            int64_t residual_row, const float* weight, float* out, float* total, float* rstd,
                            int threads);

// x is `total` where there was a residual, and grad_total (else null) the gradient that reaches it directly.
using RmsNormBackward = void(int64_t rows, int64_t dim, const float* x, int64_t x_row, const float* weight,
                             const float* rstd, const float* grad, int64_t grad_row, const float* grad_total,
                             int64_t grad_total_row, float* grad_x, float* grad_weight, int threads);

// q and k rotated by the angles whose cos and sin are [length, dim / 2]; with sign -1 rotated back. The outputs may be
// q and k themselves.
using Rope = void(const AttentionShape& shape, const Heads& q, const Heads& k, const float* cos, const float* sin,
                  float sign, const OutHeads& out_q, const OutHeads& out_k, int threads);

// QK-norm: out_q and out_k = the rotation by cos, sin [length, dim / 2] of each head's RMSNorm, of the weights q_norm
// and k_norm [dim]. No output may be an input.
using QkNormRope = void(const AttentionShape& shape, const Heads& q, const Heads& k, const float* q_norm,
                        const float* k_norm, float eps, const float* cos, const float* sin, const OutHeads& out_q,
                        const OutHeads& out_k, int threads);
using QkNormRopeBackward = void(const AttentionShape& shape, const Heads& q, const Heads& k, const float* q_norm,
                                const float* k_norm, float eps, const float* cos, const float* sin,
                                const Heads& grad_out_q, const Heads& grad_out_k, const OutHeads& grad_q,
                                const OutHeads& grad_k, float* grad_q_norm, float* grad_k_norm, int threads);

// out [rows, width] = silu(gate) * up.
using SwigluForward = void(int64_t rows, int64_t width, const float* gate, int64_t gate_row, const float* up,
                           int64_t up_row, float* out, int threads);

// grad_gate and grad_up have rows grad_in_row apart.
using SwigluBackward = void(int64_t rows, int64_t width, const float* gate, int64_t gate_row, const float* up,
                            int64_t up_row, const float* grad, int64_t grad_row, float* grad_gate, float* grad_up,
                            int64_t grad_in_row, int threads);

// out [tokens, dim] = down (silu(gate x) * (up x)). What backward needs goes to gates and ups, each of width times
// tokens (rounded up to a multiple of kMlpTokens) floats in an order of their own; both may be null.
using MlpForward = void(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                        const float* down, float* out, float* gates, float* ups, bool bf16, int threads);

// Gradients contiguous and of their operand's shape.
using MlpBackward = void(const MlpShape& shape, const float* x, int64_t x_row, const float* gate, const float* up,
                         const float* down, float* gates, float* ups, const float* grad, int64_t grad_row,
                         float* grad_x, float* grad_gate, float* grad_up, float* grad_down, bool bf16,
                         int threads);

// The next two are a layer around its attention, without what a backward pass needs. Matrices are contiguous.
// out [tokens, rows], rows of which are out_row apart, = RMSNorm of x [tokens, dim], with the weight `norm` [dim], times
// weight [rows, dim]^T.
using RmsNormLinear = void(int64_t tokens, int64_t dim, int64_t rows, const float* x, int64_t x_row, float eps,
                           const float* norm, const float* weight, float* out, int64_t out_row, int threads);

// total = residual [tokens, dim] + attn_out [tokens, inner] weight [dim, inner]^T; out [tokens, dim] = total + the MLP
// of the RMSNorm of total.
using FusedPostAttention = void(const MlpShape& shape, int64_t inner, const float* attn_out, int64_t attn_out_row,
                                const float* residual, int64_t residual_row, const float* weight, float eps,
                                const float* norm, const float* gate, const float* up, const float* down, float* out,
                                int threads);

// out [tokens, rows] = x [tokens, depth] weight^T, of weight [rows, depth] or, `transposed`, of [depth, rows]; with
// `add` it is added to out.
using Product = void(int64_t tokens, int64_t depth, int64_t rows, const float* x, int64_t x_row, const float* weight,
                     bool transposed, float* out, bool add, bool bf16, int threads);

// out [rows, columns] = a [tokens, rows]^T b [tokens, columns].
using ProductOverTokens = void(int64_t tokens, int64_t rows, int64_t columns, const float* a, int64_t a_row,
                               const float* b, int64_t b_row, float* out, bool bf16, int threads);

struct Ops {
    AttentionForward* attention_forward;
    AttentionBackward* attention_backward;
    AttentionTiles* attention_tiles;
    LinearCrossEntropy* linear_cross_entropy;
    LogsumexpArgmax* logsumexp_argmax;
    RmsNormForward* rms_norm_forward;
    RmsNormBackward* rms_norm_backward;
    Rope* rope;
    QkNormRope* qk_norm_rope;
    QkNormRopeBackward* qk_norm_rope_backward;
    SwigluForward* swiglu_forward;
    SwigluBackward* swiglu_backward;
    MlpForward* mlp_forward;
    MlpBackward* mlp_backward;
    RmsNormLinear* rms_norm_linear;
    FusedPostAttention* fused_post_attention;
    Product* product;
    ProductOverTokens* product_over_tokens;
};

// The table in use. `use` switches to another instruction set of setup.py by its name, and returns false when this
// processor (or this build) does not have it; `instruction_sets` are those that it has.
const Ops& ops();
const char* instruction_set();
bool use(const char* name);
std::vector<const char*> instruction_sets();

#define ANT5M_DECLARE(isa)                    \
    namespace isa {                           \
    AttentionForward attention_forward;       \
    AttentionBackward attention_backward;     \
    AttentionTiles attention_tiles;           \
    LinearCrossEntropy linear_cross_entropy;  \
    LogsumexpArgmax logsumexp_argmax;         \
    RmsNormForward rms_norm_forward;          \
    RmsNormBackward rms_norm_backward;        \
    Rope rope;                                \
    QkNormRope qk_norm_rope;                  \
    QkNormRopeBackward qk_norm_rope_backward; \
    SwigluForward swiglu_forward;             \
    SwigluBackward swiglu_backward;           \
    MlpForward mlp_forward;                   \
    MlpBackward mlp_backward;                 \
    RmsNormLinear rms_norm_linear;            \
    FusedPostAttention fused_post_attention;  \
    Product product;                          \
    ProductOverTokens product_over_tokens;    \
    }
ANT5M_FOR_EACH_SET(ANT5M_DECLARE)
#undef ANT5M_DECLARE

}  // namespace ant5m

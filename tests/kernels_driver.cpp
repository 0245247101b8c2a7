// The ops of csrc/cpu with products against plain loops in double, on every instruction set that the processor has:
// for processors on which no Python runs (tests/test_arm.py). Prints a line for each result: instruction set, fp32 or
// bf16, result, RMS error over RMS.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats draw(int64_t size, float scale = 1.0f) {
    static std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, scale);
    Floats numbers(size);
    for (float& x : numbers) x = normal(generator);
    return numbers;
}

Floats empty(int64_t size) { return Floats(size, NAN); }
Doubles widen(const Floats& x) { return Doubles(x.begin(), x.end()); }

// [rows, columns] = a [rows, depth] b [depth, columns], element (i, k) of a at a[i * a_row + k * a_column], b likewise.
Doubles multiply(int64_t rows, int64_t depth, int64_t columns, const Doubles& a, int64_t a_row, int64_t a_column,
                 const Doubles& b, int64_t b_row, int64_t b_column) {
    Doubles c(rows * columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t j = 0; j < columns; ++j)
                c[i * columns + j] += a[i * a_row + k * a_column] * b[k * b_row + j * b_column];
    return c;
}

struct Report {
    bool bf16;
    void operator()(const char* name, const Floats& got, const Doubles& expected) const {
        double error = 0, size = 0;
        for (size_t i = 0; i < expected.size(); ++i) {
            error += (got[i] - expected[i]) * (got[i] - expected[i]);
            size += expected[i] * expected[i];
        }
        std::printf("%s %s %s %g\n", ant5m::instruction_set(), bf16 ? "bf16" : "fp32", name, std::sqrt(error / size));
    }
};

void check_products(const Report& report, int64_t n, int64_t d, int64_t r) {
    const Floats x = draw(n * d), weight = draw(r * d), across = draw(d * r), grad = draw(n * r);
    Floats out = empty(n * r), transposed = empty(n * r), over = empty(r * d);
    ant5m::ops().product(n, d, r, x.data(), d, weight.data(), false, out.data(), false, report.bf16, 2);
    ant5m::ops().product(n, d, r, x.data(), d, across.data(), true, transposed.data(), false, report.bf16, 2);
    ant5m::ops().product_over_tokens(n, r, d, grad.data(), r, x.data(), d, over.data(), report.bf16, 2);
    report("product", out, multiply(n, d, r, widen(x), d, 1, widen(weight), 1, d));
    report("product_transposed", transposed, multiply(n, d, r, widen(x), d, 1, widen(across), r, 1));
    report("product_over_tokens", over, multiply(r, n, d, widen(grad), 1, r, widen(x), d, 1));
}

void check_mlp(const Report& report, int64_t n, int64_t d, int64_t w) {
    const Floats x = draw(n * d), gate = draw(w * d, 0.2f), up = draw(w * d, 0.2f), down = draw(d * w), grad = draw(n * d);
    Floats out = empty(n * d), grad_x = empty(n * d), grad_gate = empty(w * d), grad_up = empty(w * d),
           grad_down = empty(d * w);
    const int64_t padded = (n + ant5m::kMlpTokens - 1) / ant5m::kMlpTokens * ant5m::kMlpTokens;
    Floats gates = empty(padded * w), ups = empty(padded * w);
    const ant5m::MlpShape shape{n, d, w};
    ant5m::ops().mlp_forward(shape, x.data(), d, gate.data(), up.data(), down.data(), out.data(), gates.data(),
                             ups.data(), report.bf16, 2);
    ant5m::ops().mlp_backward(shape, x.data(), d, gate.data(), up.data(), down.data(), gates.data(), ups.data(),
                              grad.data(), d, grad_x.data(), grad_gate.data(), grad_up.data(), grad_down.data(),
                              report.bf16, 2);
    const Doubles g = multiply(n, d, w, widen(x), d, 1, widen(gate), 1, d);
    const Doubles u = multiply(n, d, w, widen(x), d, 1, widen(up), 1, d);
    const Doubles grad_hidden = multiply(n, d, w, widen(grad), d, 1, widen(down), w, 1);
    Doubles hidden(n * w), grad_gates(n * w), grad_ups(n * w);
    for (int64_t i = 0; i < n * w; ++i) {
        const double s = 1 / (1 + std::exp(-g[i]));
        hidden[i] = g[i] * s * u[i];
        grad_ups[i] = grad_hidden[i] * g[i] * s;
        grad_gates[i] = grad_hidden[i] * u[i] * s * (1 + g[i] * (1 - s));
    }
    Doubles of_x = multiply(n, w, d, grad_gates, w, 1, widen(gate), d, 1);
    const Doubles of_x_too = multiply(n, w, d, grad_ups, w, 1, widen(up), d, 1);
    for (int64_t i = 0; i < n * d; ++i) of_x[i] += of_x_too[i];
    report("mlp", out, multiply(n, w, d, hidden, w, 1, widen(down), 1, w));
    report("mlp_grad_x", grad_x, of_x);
    report("mlp_grad_gate", grad_gate, multiply(w, n, d, grad_gates, 1, w, widen(x), d, 1));
    report("mlp_grad_up", grad_up, multiply(w, n, d, grad_ups, 1, w, widen(x), d, 1));
    report("mlp_grad_down", grad_down, multiply(d, n, w, widen(grad), 1, d, hidden, w, 1));
}

void check_head(const Report& report, int64_t n, int64_t d, int64_t v) {
    const Floats hidden = draw(n * d), weight = draw(v * d, 0.3f);
    const int64_t row = (d + 15) / 16 * 16;
    std::vector<int64_t> targets(n);
    for (int64_t i = 0; i < n; ++i) targets[i] = i * 37 % v;
    Floats loss(1), grad_hidden = empty(n * d), padded = empty(v * row), grad_weight(v * d);
    ant5m::ops().linear_cross_entropy(n, d, v, hidden.data(), d, weight.data(), d, targets.data(), -100, 0, loss.data(),
                                      grad_hidden.data(), padded.data(), row, report.bf16, 2);
    for (int64_t i = 0; i < v * d; ++i) grad_weight[i] = padded[i / d * row + i % d];
    Doubles grad = multiply(n, d, v, widen(hidden), d, 1, widen(weight), 1, d);
    double losses = 0;
    for (int64_t i = 0; i < n; ++i) {
        double* logits = grad.data() + i * v;
        double sum = 0;
        for (int64_t j = 0; j < v; ++j) sum += std::exp(logits[j]);
        losses += std::log(sum) - logits[targets[i]];
        for (int64_t j = 0; j < v; ++j) logits[j] = (std::exp(logits[j]) / sum - (j == targets[i])) / n;
    }
    report("head", loss, {losses / n});
    report("head_grad_hidden", grad_hidden, multiply(n, v, d, grad, v, 1, widen(weight), d, 1));
    report("head_grad_weight", grad_weight, multiply(v, n, d, grad, 1, v, widen(hidden), d, 1));
}

void check_attention(const Report& report, const ant5m::AttentionShape& shape) {
    const auto [batch, length, heads, kv_heads, dim] = shape;
    const int64_t size = batch * length * dim;
    const Floats q = draw(size * heads), k = draw(size * kv_heads), v = draw(size * kv_heads), grad = draw(size * heads);
    Floats out = empty(size * heads), lse = empty(batch * heads * length), grad_q = empty(size * heads),
           grad_k = empty(size * kv_heads), grad_v = empty(size * kv_heads);
    const auto of = [&](const Floats& x, int64_t n) {
        return ant5m::Heads{x.data(), shape.length * n * shape.dim, n * shape.dim, shape.dim};
    };
    ant5m::ops().attention_forward(shape, of(q, heads), of(k, kv_heads), of(v, kv_heads), nullptr, out.data(),
                                   lse.data(), report.bf16, 2);
    ant5m::ops().attention_backward(shape, of(q, heads), of(k, kv_heads), of(v, kv_heads), of(out, heads),
                                    of(grad, heads), nullptr, lse.data(), grad_q.data(), grad_k.data(), grad_v.data(),
                                    report.bf16, 2);
    Doubles expected(size * heads), of_q(size * heads), of_k(size * kv_heads), of_v(size * kv_heads);
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    for (int64_t task = 0; task < batch * heads; ++task) {
        const int64_t b = task / heads, h = task % heads, kv = h / (heads / kv_heads);
        const auto query = [&](int64_t t) { return ((b * shape.length + t) * shape.heads + h) * shape.dim; };
        const auto key = [&](int64_t t) { return ((b * shape.length + t) * shape.kv_heads + kv) * shape.dim; };
        for (int64_t t = 0; t < length; ++t) {
            Doubles p(t + 1), dp(t + 1);
            double sum = 0, delta = 0;
            for (int64_t s = 0; s <= t; ++s) {
                double score = 0;
                for (int64_t d = 0; d < dim; ++d) {
                    score += static_cast<double>(q[query(t) + d]) * k[key(s) + d];
                    dp[s] += static_cast<double>(grad[query(t) + d]) * v[key(s) + d];
                }
                sum += p[s] = std::exp(score * scale);
            }
            for (int64_t s = 0; s <= t; ++s) delta += (p[s] /= sum) * dp[s];
            for (int64_t s = 0; s <= t; ++s)
                for (int64_t d = 0; d < dim; ++d) {
                    const double slope = p[s] * (dp[s] - delta) * scale;
                    expected[query(t) + d] += p[s] * v[key(s) + d];
                    of_q[query(t) + d] += slope * k[key(s) + d];
                    of_k[key(s) + d] += slope * q[query(t) + d];
                    of_v[key(s) + d] += p[s] * grad[query(t) + d];
                }
        }
    }
    report("attention", out, expected);
    report("attention_grad_q", grad_q, of_q);
    report("attention_grad_k", grad_k, of_k);
    report("attention_grad_v", grad_v, of_v);
}

}  // namespace

int main() {
    for (const char* name : ant5m::instruction_sets()) {
        ant5m::use(name);
        for (const bool bf16 : {false, true}) {
            if (bf16 && std::string(name).find("bf16") == std::string::npos) continue;
            const Report report{bf16};
            check_products(report, 70, 37, 43);
            check_products(report, 33, 128, 65);
            check_mlp(report, 140, 36, 133);
            check_head(report, 70, 36, 301);
            check_attention(report, {2, 75, 4, 2, 16});
            check_attention(report, {1, 33, 3, 1, 9});
        }
    }
}

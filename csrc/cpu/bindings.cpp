// Python's view: pointers come in as integers (a tensor's data_ptr() or an array's ctypes.data), shapes as integers.
// The callers in ant5m/ check shapes, dtypes and contiguity; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <utility>

#include "memory.h"
#include "ngrams.h"
#include "ops.h"
#include "parallel.h"

namespace py = pybind11;

namespace {
template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// What Python passes for a C++ parameter, and the parameter made of it.
template <typename T>
struct Argument {
    using Type = T;
    static T from(T x) { return x; }
};

template <typename T>
struct Argument<T*> {
    using Type = uintptr_t;
    static T* from(uintptr_t x) { return at<T>(x); }
};

template <>
struct Argument<const ant5m::Heads&> {
    using Type = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides of batch, time and head
    static ant5m::Heads from(const Type& x) {
        return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
    }
};

template <>
struct Argument<const ant5m::OutHeads&> {
    using Type = Argument<const ant5m::Heads&>::Type;
    static ant5m::OutHeads from(const Type& x) {
        return {at<float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
    }
};

template <>
struct Argument<const ant5m::AttentionShape&> {
    using Type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
    static ant5m::AttentionShape from(const Type& x) {
        return {std::get<0>(x), std::get<1>(x), std::get<2>(x), std::get<3>(x), std::get<4>(x)};
    }
};

template <>
struct Argument<const ant5m::MlpShape&> {
    using Type = std::tuple<int64_t, int64_t, int64_t>;
    static ant5m::MlpShape from(const Type& x) { return {std::get<0>(x), std::get<1>(x), std::get<2>(x)}; }
};

// The op of the instruction set in use, under the GIL's release. Its arguments are given by name, as in ops.h.
template <typename... A, size_t kNames, size_t... I>
void define(py::module_& m, const char* name, void (*ant5m::Ops::*op)(A...), const char* const (&names)[kNames],
            std::index_sequence<I...>) {
    m.def(
        name,
        [op](typename Argument<A>::Type... arguments) {
            py::gil_scoped_release release;
            (ant5m::ops().*op)(Argument<A>::from(arguments)...);
        },
        py::kw_only(), py::arg(names[I])...);
}

template <typename... A, size_t kNames>
void define(py::module_& m, const char* name, void (*ant5m::Ops::*op)(A...), const char* const (&names)[kNames]) {
    static_assert(kNames == sizeof...(A), "a name for each argument");
    define(m, name, op, names, std::make_index_sequence<kNames>());
}
}  // namespace

PYBIND11_MODULE(_cpu, m) {
    using ant5m::Ops;
    m.doc() = "CPU ops of ant5m; see csrc/cpu/ops.h";
    m.def("instruction_set", &ant5m::instruction_set, "The instruction set in use");
    m.def("instruction_sets", &ant5m::instruction_sets, "Those that this processor has, best first, and the emulation");
    m.def("use", &ant5m::use, py::arg("name"), "Switch the instruction set; False when this processor lacks it");
    m.def("use_openmp", &ant5m::use_openmp, py::arg("gomp_parallel"),
          "Run on the OpenMP pool whose GOMP_parallel is at this address; 0: on threads of our own");
    py::class_<ant5m::Memory>(m, "Memory", py::buffer_protocol(), "See memory.h: fp32 with undefined content")
        .def(py::init<int64_t>(), py::arg("floats"))
        .def_buffer([](ant5m::Memory& memory) { return py::buffer_info(memory.data(), memory.floats()); });
    m.def(
        "held",
        [] {
            const ant5m::Held held = ant5m::held();
            return std::make_pair(held.used, held.kept);
        },
        "Bytes of large pieces of Memory: in use, and kept for later");
    m.def("release_memory", &ant5m::release_memory, py::call_guard<py::gil_scoped_release>(),
          "Give what is kept for later back to the system; how many bytes that were");
    m.def(
        "hash_ngrams",
        [](std::string_view text, uintptr_t letters, int64_t known, int64_t n, uintptr_t filter,
           int64_t filter_words) -> std::optional<py::bytes> {
            const auto found = ant5m::hash_ngrams(text, at<const uint32_t>(letters), known, n,
                                                  {at<const uint64_t>(filter), filter_words});
            if (!found) return std::nullopt;
            return py::bytes(reinterpret_cast<const char*>(found->data()), found->size() * sizeof(uint64_t));
        },
        py::kw_only(), py::arg("text"), py::arg("letters"), py::arg("known"), py::arg("n"), py::arg("filter"),
        py::arg("filter_words"), "See ngrams.h: the hashes, end to end");
    define(m, "attention_forward", &Ops::attention_forward,
           {"shape", "q", "k", "v", "ends", "out", "lse", "bf16", "threads"});
    define(m, "attention_backward", &Ops::attention_backward,
           {"shape", "q", "k", "v", "out", "grad", "ends", "lse", "grad_q", "grad_k", "grad_v", "bf16", "threads"});
    define(m, "attention_tiles", &Ops::attention_tiles, {"shape", "ends", "counts"});
    define(m, "linear_cross_entropy", &Ops::linear_cross_entropy,
           {"tokens", "dim", "vocab", "hidden", "hidden_row", "weight", "weight_row", "targets", "ignore_index", "z_loss",
            "loss", "grad_hidden", "grad_weight", "grad_weight_row", "bf16", "threads"});
    define(m, "logsumexp_argmax", &Ops::logsumexp_argmax,
           {"tokens", "dim", "vocab", "hidden", "hidden_row", "weight", "weight_row", "logsumexp", "argmax",
            "threads"});
    define(m, "rms_norm_forward", &Ops::rms_norm_forward,
           {"rows", "dim", "eps", "x", "x_row", "residual", "residual_row", "weight", "out", "total", "rstd",
            "threads"});
    define(m, "rms_norm_backward", &Ops::rms_norm_backward,
           {"rows", "dim", "x", "x_row", "weight", "rstd", "grad", "grad_row", "grad_total", "grad_total_row",
            "grad_x", "grad_weight", "threads"});
    define(m, "rope", &Ops::rope, {"shape", "q", "k", "cos", "sin", "sign", "out_q", "out_k", "threads"});
    define(m, "qk_norm_rope", &Ops::qk_norm_rope,
           {"shape", "q", "k", "q_norm", "k_norm", "eps", "cos", "sin", "out_q", "out_k", "threads"});
    define(m, "qk_norm_rope_backward", &Ops::qk_norm_rope_backward,
           {"shape", "q", "k", "q_norm", "k_norm", "eps", "cos", "sin", "grad_out_q", "grad_out_k", "grad_q", "grad_k",
            "grad_q_norm", "grad_k_norm", "threads"});
    define(m, "swiglu_forward", &Ops::swiglu_forward,
           {"rows", "width", "gate", "gate_row", "up", "up_row", "out", "threads"});
    define(m, "swiglu_backward", &Ops::swiglu_backward,
           {"rows", "width", "gate", "gate_row", "up", "up_row", "grad", "grad_row", "grad_gate", "grad_up",
            "grad_in_row", "threads"});
    define(m, "mlp_forward", &Ops::mlp_forward,
           {"shape", "x", "x_row", "gate", "up", "down", "out", "gates", "ups", "bf16", "threads"});
    define(m, "mlp_backward", &Ops::mlp_backward,
           {"shape", "x", "x_row", "gate", "up", "down", "gates", "ups", "grad", "grad_row", "grad_x", "grad_gate",
            "grad_up", "grad_down", "bf16", "threads"});
    define(m, "rms_norm_linear", &Ops::rms_norm_linear,
           {"tokens", "dim", "rows", "x", "x_row", "eps", "norm", "weight", "out", "out_row", "threads"});
    define(m, "fused_post_attention", &Ops::fused_post_attention,
           {"shape", "inner", "attn_out", "attn_out_row", "residual", "residual_row", "weight", "eps", "norm", "gate",
            "up", "down", "out", "threads"});
    define(m, "product", &Ops::product,
           {"tokens", "depth", "rows", "x", "x_row", "weight", "transposed", "out", "add", "bf16", "threads"});
    define(m, "product_over_tokens", &Ops::product_over_tokens,
           {"tokens", "rows", "columns", "a", "a_row", "b", "b_row", "out", "bf16", "threads"});
    m.attr("MLP_TOKENS") = ant5m::kMlpTokens;
    m.attr("SPACE") = ant5m::kSpace;
    m.attr("LEFT_OUT") = ant5m::kLeftOut;
    m.attr("ASK") = ant5m::kAsk;
    m.attr("LARGE") = ant5m::kLarge;
}

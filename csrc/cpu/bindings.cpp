// Python's view: pointers come in as integers (a tensor's data_ptr() or an array's ctypes.data), shapes as integers.
// The callers in ant5m/ check shapes, dtypes and contiguity; nothing here can.
#include <pybind11/pybind11.h>

#include "memory.h"
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

// The op of the instruction set in use, under the GIL's release.
template <typename... A>
void define(py::module_& m, const char* name, void (*ant5m::Ops::*op)(A...)) {
    m.def(name, [op](typename Argument<A>::Type... arguments) {
        py::gil_scoped_release release;
        (ant5m::ops().*op)(Argument<A>::from(arguments)...);
    });
}
}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU ops of ant5m; see csrc/cpu/ops.h";
    m.def("instruction_set", &ant5m::instruction_set, "The instruction set in use: avx512_bf16, avx512, avx2 or portable");
    m.def("use", &ant5m::use, py::arg("name"), "Switch the instruction set; False when this processor lacks it");
    m.def(
        "gather",
        [](uintptr_t windows, int64_t rows, int64_t length, uintptr_t inputs, uintptr_t targets) {
            py::gil_scoped_release release;
            ant5m::ops().gather(at<const uint16_t* const>(windows), rows, length, at<int64_t>(inputs),
                                at<int64_t>(targets));
        },
        py::arg("windows"), py::arg("rows"), py::arg("length"), py::arg("inputs"), py::arg("targets"),
        "See ops.h: uint16 windows to int64 inputs and targets");
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
    define(m, "attention_forward", &ant5m::Ops::attention_forward);
    define(m, "attention_backward", &ant5m::Ops::attention_backward);
    define(m, "linear_cross_entropy", &ant5m::Ops::linear_cross_entropy);
    define(m, "logit_summary", &ant5m::Ops::logit_summary);
    define(m, "rms_norm_forward", &ant5m::Ops::rms_norm_forward);
    define(m, "rms_norm_backward", &ant5m::Ops::rms_norm_backward);
    define(m, "rope", &ant5m::Ops::rope);
    define(m, "swiglu_forward", &ant5m::Ops::swiglu_forward);
    define(m, "swiglu_backward", &ant5m::Ops::swiglu_backward);
    define(m, "mlp_forward", &ant5m::Ops::mlp_forward);
    define(m, "mlp_backward", &ant5m::Ops::mlp_backward);
    define(m, "norm_product", &ant5m::Ops::norm_product);
    define(m, "finish_layer", &ant5m::Ops::finish_layer);
    define(m, "product", &ant5m::Ops::product);
    define(m, "product_over_tokens", &ant5m::Ops::product_over_tokens);
    m.attr("MLP_TOKENS") = ant5m::kMlpTokens;
    m.attr("LARGE") = ant5m::kLarge;
}

// Python's view: pointers come in as integers (a tensor's data_ptr() or an array's ctypes.data), shapes as integers.
// The callers in ant5m/ check shapes, dtypes and contiguity; nothing here can.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

namespace {
template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU ops of ant5m; see csrc/cpu/ops.h";
    m.def("instruction_set", &ant5m::instruction_set, "The instruction set in use: avx512, avx2 or portable");
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
}

// What every emulated module has: its settings.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "emulation.h"

namespace emulation {

inline void configure(const std::string& order, uint64_t seed, int fill, int compute_capability,
                      const std::string& left_out_file, int left_out_line) {
    Order parsed;
    if (order == "forward") {
        parsed = Order::kForward;
    } else if (order == "reversed") {
        parsed = Order::kReversed;
    } else if (order == "random") {
        parsed = Order::kRandom;
    } else {
        throw pybind11::value_error("configure: order must be forward, reversed or random, got " + order);
    }
    config = {parsed, seed, fill, compute_capability, left_out_file, left_out_line};
}

inline void define_configure(pybind11::module_& m) {
    namespace py = pybind11;
    m.def("configure", configure, py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0,
          py::arg("fill") = 0xCD, py::arg("compute_capability") = 90, py::arg("left_out_file") = "",
          py::arg("left_out_line") = 0);
    m.def("num_kernels", [] { return num_kernels; }, "Kernels launched so far.");
    m.def("num_memsets", [] { return num_memsets; });
    m.attr("fibers") = fibers_are_from;
}

}  // namespace emulation

// The module hvprune._C.
#include "bindings.h"

#include <string>
#include <vector>

namespace py = pybind11;

namespace hvprune {
namespace {

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (int isa = 0; isa < num_cpu_isas(); ++isa) names.emplace_back(cpu_isa_name(isa));
    return names;
}

// For tests: the kernels of a narrower instruction set.
void set_cpu_isa_by_name(const std::string& name) {
    for (int isa = 0; isa < num_cpu_isas(); ++isa) {
        if (name == cpu_isa_name(isa)) return set_cpu_isa(isa);
    }
    throw py::value_error("set_cpu_isa: name must be one of cpu_isas(), got " + name);
}

// Architectures that CUDA kernels were compiled for, by setup.py.
std::vector<int> cuda_archs() {
#ifdef HVP_CUDA_ARCHS
    return {HVP_CUDA_ARCHS};
#else
    return {};
#endif
}

}  // namespace
}  // namespace hvprune

PYBIND11_MODULE(_C, m) {
    using namespace hvprune;
    bindings::define_cpu(m.def_submodule("cpu"));
#ifdef HVP_CUDA_ARCHS
    bindings::define_cuda(m.def_submodule("cuda"));
#endif
    m.def("cpu_isas", &cpu_isas);
    m.def("cpu_isa", [] { return std::string(cpu_isa_name(cpu_isa())); });
    m.def("set_cpu_isa", &set_cpu_isa_by_name);
    m.attr("cuda_archs") = cuda_archs();
}

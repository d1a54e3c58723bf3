// The project's kernels under emulation, as a module with the functions that hvprune._C has for CUDA.
#include "bindings.h"
#include "configure.h"

PYBIND11_MODULE(hvp_emulation, m) {
    emulation::define_configure(m);
    hvprune::bindings::define_cuda(m);
}

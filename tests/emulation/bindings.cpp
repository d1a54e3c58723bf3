// Emulated launchers as a Python module. Pointers come as integers (Tensor.data_ptr() of CPU tensors); an
// op adds one m.def that fills its Args, as below.
#include "configure.h"
#include "selftest.h"

namespace {

namespace py = pybind11;
using namespace hvp::selftest;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(hvp_emulation, m) {
    emulation::define_configure(m);

    m.def("intrinsics", [](uintptr_t values, uintptr_t results, int num_threads) {
        intrinsics_cuda({pointer<const int>(values), pointer<int>(results), num_threads}, nullptr);
    });
    m.def("histogram", [](uintptr_t values, uintptr_t counts, uintptr_t sum, uintptr_t float_sum, uintptr_t largest,
                          uintptr_t votes, int64_t n) {
        histogram_cuda({pointer<const int>(values), pointer<int>(counts), pointer<unsigned long long>(sum),
                        pointer<float>(float_sum), pointer<int>(largest), pointer<int>(votes), n},
                       nullptr);
    });
    m.def("ticket_sum", [](uintptr_t values, uintptr_t partial, uintptr_t ticket, uintptr_t sum, int64_t n) {
        ticket_sum_cuda({pointer<const int>(values), pointer<int>(partial), pointer<int>(ticket), pointer<int>(sum), n},
                        nullptr);
    });
    m.def("remove_largest",
          [](uintptr_t scores, uintptr_t kept, uintptr_t num_kept, int n, int num_rounds, int per_round) {
              remove_largest_cuda(
                  {pointer<const float>(scores), pointer<int>(kept), pointer<int>(num_kept), n, num_rounds, per_round},
                  nullptr);
          });
    m.def("cluster_compact",
          [](uintptr_t values, uintptr_t indices, uintptr_t counts, int num_rows, int n, float threshold, int cluster) {
              cluster_compact_cuda({pointer<const float>(values), pointer<int>(indices), pointer<int>(counts), num_rows,
                                    n, threshold, cluster},
                                   nullptr);
          });
    m.def("cluster_topk", [](uintptr_t values, uintptr_t largest, int num_rows, int n, int k, int cluster) {
        cluster_topk_cuda({pointer<const int>(values), pointer<int>(largest), num_rows, n, k, cluster}, nullptr);
    });
    m.def("matmul", [](uintptr_t a, uintptr_t b, uintptr_t c, int m, int n, int k, int operand, bool b_is_kn) {
        matmul_cuda({pointer<const void>(a), pointer<const void>(b), pointer<float>(c), m, n, k,
                     static_cast<Operand>(operand), b_is_kn},
                    nullptr);
    });

    py::enum_<Bug>(m, "Bug", py::module_local())
        .value("none", Bug::kNone)
        .value("missing_syncthreads", Bug::kMissingSyncthreads)
        .value("missing_syncwarp", Bug::kMissingSyncwarp)
        .value("race_between_blocks", Bug::kRaceBetweenBlocks)
        .value("shared_out_of_bounds", Bug::kSharedOutOfBounds)
        .value("divergent_barrier", Bug::kDivergentBarrier)
        .value("lane_not_in_mask", Bug::kLaneNotInMask)
        .value("ended_lane_in_mask", Bug::kEndedLaneInMask)
        .value("mixed_functions", Bug::kMixedFunctions)
        .value("uninitialised_shared", Bug::kUninitialisedShared)
        .value("missing_copy_wait", Bug::kMissingCopyWait)
        .value("block_ends_early", Bug::kBlockEndsEarly)
        .value("missing_exchange_wait", Bug::kMissingExchangeWait)
        .value("unknown_rank", Bug::kUnknownRank)
        .value("missing_programmatic_wait", Bug::kMissingProgrammaticWait)
        .value("late_programmatic_wait", Bug::kLateProgrammaticWait)
        .value("too_many_threads", Bug::kTooManyThreads);
    m.def("bug", [](uintptr_t in, uintptr_t out, Bug bug) {
        bug_cuda({pointer<const int>(in), pointer<int>(out), bug}, nullptr);
    });
}

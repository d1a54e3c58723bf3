// The only file that knows Python. Addresses come as integers; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;

namespace hvprune {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

DType dtype(int code) { return static_cast<DType>(code); }

using Int = int64_t;
using Address = uintptr_t;

// (map, 3 strides)
using MapTuple = std::tuple<Address, Int, Int, Int>;
// (query, 3 strides, key, 3 strides, logsumexp or 0, 2 strides)
using LayerTuple = std::tuple<Address, Int, Int, Int, Address, Int, Int, Int, Address, Int, Int>;

void aggregate_attention(const std::vector<MapTuple>& maps, Address importance, int dtype_code, Int B, Int H, Int L,
                         Int P, bool cls_row, int num_threads) {
    std::vector<AttentionMap> layers;
    for (const auto& [map, batch, head, row] : maps) layers.push_back({at<void>(map), batch, head, row});
    aggregate_attention_cpu({layers.data(), static_cast<Int>(layers.size()), at<float>(importance), dtype(dtype_code),
                             B, H, L, P, cls_row, num_threads});
}

void attention_importance(const std::vector<LayerTuple>& tuples, Address importance, int dtype_code, Int B, Int H,
                          Int L, Int D, Int P, bool cls_row, float scale, int num_threads) {
    std::vector<AttentionLayer> layers;
    for (const auto& [query, qb, qh, qr, key, kb, kh, kr, logsumexp, lb, lh] : tuples) {
        layers.push_back({at<void>(query), qb, qh, qr, at<void>(key), kb, kh, kr, at<float>(logsumexp), lb, lh});
    }
    attention_importance_cpu({layers.data(), static_cast<Int>(layers.size()), at<float>(importance), dtype(dtype_code),
                              B, H, L, D, P, cls_row, scale, num_threads});
}

void hierarchical_select(Address scores, Int batch_stride, Address indices, Address counts, Address mask,
                         int dtype_code, Int B, Int gh, Int gw, Int region_rows, Int region_cols, Int window_height,
                         Int window_width, double keep_ratio, Int M, bool fixed, int num_threads) {
    hierarchical_select_cpu({at<void>(scores), batch_stride, at<Int>(indices), at<int32_t>(counts), at<bool>(mask),
                             dtype(dtype_code), B, gh, gw, region_rows, region_cols, window_height, window_width,
                             keep_ratio, M, fixed, num_threads});
}

void cosine_similarity(Address features, Int batch_stride, Int token_stride, Address similarity, int dtype_code, Int B,
                       Int N, Int C, int num_threads) {
    cosine_similarity_cpu({at<void>(features), batch_stride, token_stride, at<void>(similarity), dtype(dtype_code), B,
                           N, C, num_threads});
}

void diverse_select(Address similarity, Int similarity_batch_stride, Int similarity_row_stride, int similarity_dtype,
                    Address importance, Int importance_batch_stride, int importance_dtype, Address indices,
                    Address counts, Address mask, Address trace, Int trace_lists, Int B, Int N, Int K,
                    Int num_important, Int removals_per_round, int num_threads) {
    diverse_select_cpu({at<void>(similarity), similarity_batch_stride, similarity_row_stride, dtype(similarity_dtype),
                        at<void>(importance), importance_batch_stride, dtype(importance_dtype), at<Int>(indices),
                        at<int32_t>(counts), at<bool>(mask), at<Int>(trace), trace_lists, B, N, K, num_important,
                        removals_per_round, num_threads});
}

void gather_tokens(Address features, Int batch_stride, Int token_stride, Address indices, Int indices_batch_stride,
                   Address output, int dtype_code, Int B, Int N, Int C, Int M, float pad_value, int num_threads) {
    gather_tokens_cpu({at<void>(features), batch_stride, token_stride, at<Int>(indices), indices_batch_stride,
                       at<void>(output), dtype(dtype_code), B, N, C, M, pad_value, num_threads});
}

void vispruner_select(Address features, Int batch_stride, Int token_stride, int features_dtype, Address importance,
                      Int importance_batch_stride, int importance_dtype, Address indices, Address counts, Address mask,
                      Int B, Int N, Int C, Int K, Int num_important, Int removals_per_round, int num_threads) {
    vispruner_select_cpu({at<void>(features), batch_stride, token_stride, dtype(features_dtype), at<void>(importance),
                          importance_batch_stride, dtype(importance_dtype), at<Int>(indices), at<int32_t>(counts),
                          at<bool>(mask), B, N, C, K, num_important, removals_per_round, num_threads});
}

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
    const py::call_guard<py::gil_scoped_release> no_gil;
    m.def("aggregate_attention_cpu", &aggregate_attention, no_gil);
    m.def("attention_importance_cpu", &attention_importance, no_gil);
    m.def("cosine_similarity_cpu", &cosine_similarity, no_gil);
    m.def("diverse_select_cpu", &diverse_select, no_gil);
    m.def("gather_tokens_cpu", &gather_tokens, no_gil);
    m.def("hierarchical_select_cpu", &hierarchical_select, no_gil);
    m.def("vispruner_select_cpu", &vispruner_select, no_gil);
    m.def("cpu_isas", &cpu_isas);
    m.def("cpu_isa", [] { return std::string(cpu_isa_name(cpu_isa())); });
    m.def("set_cpu_isa", &set_cpu_isa_by_name);
    m.attr("cuda_archs") = cuda_archs();
}

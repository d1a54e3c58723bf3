// The ops as Python functions, for csrc/bindings.cpp and tests/emulation. Addresses come as integers; the GIL is
// released while a kernel runs or is launched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "ops.h"

namespace hvprune::bindings {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline DType dtype(int code) { return static_cast<DType>(code); }

using Int = int64_t;
using Address = uintptr_t;

// The last argument of every function: the number of threads of a CPU kernel, the stream of a CUDA one.
template <class Args>
void call(void (*run)(const Args&), std::common_type_t<Args> args, Address num_threads) {
    args.num_threads = static_cast<int>(num_threads);
    run(args);
}
template <class Args>
void call(void (*run)(const Args&, cudaStream_t), std::common_type_t<Args> args, Address stream) {
    run(args, at<CUstream_st>(stream));
}

// (map, 3 strides)
using MapTuple = std::tuple<Address, Int, Int, Int>;
// (query, 3 strides, key, 3 strides, logsumexp or 0, 2 strides)
using LayerTuple = std::tuple<Address, Int, Int, Int, Address, Int, Int, Int, Address, Int, Int>;

template <auto run>
void aggregate_attention(const std::vector<MapTuple>& maps, Address importance, int dtype_code, Int B, Int H, Int L,
                         Int P, bool cls_row, Address threads_or_stream) {
    std::vector<AttentionMap> layers;
    for (const auto& [map, batch, head, row] : maps) layers.push_back({at<void>(map), batch, head, row});
    call(run,
         {layers.data(), static_cast<Int>(layers.size()), at<float>(importance), dtype(dtype_code), B, H, L, P, cls_row,
          0},
         threads_or_stream);
}

template <auto run>
void attention_importance(const std::vector<LayerTuple>& tuples, Address importance, int dtype_code, Int B, Int H,
                          Int L, Int D, Int P, bool cls_row, float scale, Address scratch, Address threads_or_stream) {
    std::vector<AttentionLayer> layers;
    for (const auto& [query, qb, qh, qr, key, kb, kh, kr, logsumexp, lb, lh] : tuples) {
        layers.push_back({at<void>(query), qb, qh, qr, at<void>(key), kb, kh, kr, at<float>(logsumexp), lb, lh});
    }
    call(run,
         {layers.data(), static_cast<Int>(layers.size()), at<float>(importance), dtype(dtype_code), B, H, L, D, P,
          cls_row, scale, 0, at<void>(scratch)},
         threads_or_stream);
}

template <auto run>
void hierarchical_select(Address scores, Int batch_stride, Address indices, Address counts, Address mask,
                         int dtype_code, Int B, Int gh, Int gw, Int region_rows, Int region_cols, Int window_height,
                         Int window_width, double keep_ratio, Int M, bool fixed, bool after_scores,
                         Address threads_or_stream) {
    call(run,
         {at<void>(scores), batch_stride, at<Int>(indices), at<int32_t>(counts), at<bool>(mask), dtype(dtype_code), B,
          gh, gw, region_rows, region_cols, window_height, window_width, keep_ratio, M, fixed, 0, after_scores},
         threads_or_stream);
}

template <auto run>
void cosine_similarity(Address features, Int batch_stride, Int token_stride, Address similarity, int dtype_code, Int B,
                       Int N, Int C, Address threads_or_stream) {
    call(run, {at<void>(features), batch_stride, token_stride, at<void>(similarity), dtype(dtype_code), B, N, C, 0},
         threads_or_stream);
}

template <auto run>
void diverse_select(Address similarity, Int similarity_batch_stride, Int similarity_row_stride, int similarity_dtype,
                    Address importance, Int importance_batch_stride, int importance_dtype, Address indices,
                    Address counts, Address mask, Address trace, Int trace_lists, Int B, Int N, Int K,
                    Int num_important, Int removals_per_round, Address threads_or_stream) {
    call(run,
         {at<void>(similarity), similarity_batch_stride, similarity_row_stride, dtype(similarity_dtype),
          at<void>(importance), importance_batch_stride, dtype(importance_dtype), at<Int>(indices), at<int32_t>(counts),
          at<bool>(mask), at<Int>(trace), trace_lists, B, N, K, num_important, removals_per_round, 0},
         threads_or_stream);
}

template <auto run>
void gather_tokens(Address features, Int batch_stride, Int token_stride, Address indices, Int indices_batch_stride,
                   Address output, int dtype_code, Int B, Int N, Int C, Int M, float pad_value,
                   Address threads_or_stream) {
    call(run,
         {at<void>(features), batch_stride, token_stride, at<Int>(indices), indices_batch_stride, at<void>(output),
          dtype(dtype_code), B, N, C, M, pad_value, 0},
         threads_or_stream);
}

template <auto run>
void vispruner_select(Address features, Int batch_stride, Int token_stride, int features_dtype, Address importance,
                      Int importance_batch_stride, int importance_dtype, Address indices, Address counts, Address mask,
                      Int B, Int N, Int C, Int K, Int num_important, Int removals_per_round, Address similarity,
                      Address threads_or_stream) {
    call(run,
         {at<void>(features), batch_stride, token_stride, dtype(features_dtype), at<void>(importance),
          importance_batch_stride, dtype(importance_dtype), at<Int>(indices), at<int32_t>(counts), at<bool>(mask), B, N,
          C, K, num_important, removals_per_round, 0, at<void>(similarity)},
         threads_or_stream);
}

inline void define_cpu(pybind11::module_& m) {
    const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
    m.def("aggregate_attention_cpu", &aggregate_attention<aggregate_attention_cpu>, no_gil);
    m.def("attention_importance_cpu", &attention_importance<attention_importance_cpu>, no_gil);
    m.def("cosine_similarity_cpu", &cosine_similarity<cosine_similarity_cpu>, no_gil);
    m.def("diverse_select_cpu", &diverse_select<diverse_select_cpu>, no_gil);
    m.def("gather_tokens_cpu", &gather_tokens<gather_tokens_cpu>, no_gil);
    m.def("hierarchical_select_cpu", &hierarchical_select<hierarchical_select_cpu>, no_gil);
    m.def("vispruner_select_cpu", &vispruner_select<vispruner_select_cpu>, no_gil);
}

inline void define_cuda(pybind11::module_& m) {
    const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
    m.def("aggregate_attention_cuda", &aggregate_attention<aggregate_attention_cuda>, no_gil);
    m.def("attention_importance_cuda", &attention_importance<attention_importance_cuda>, no_gil);
    m.def("cosine_similarity_cuda", &cosine_similarity<cosine_similarity_cuda>, no_gil);
    m.def("diverse_select_cuda", &diverse_select<diverse_select_cuda>, no_gil);
    m.def("gather_tokens_cuda", &gather_tokens<gather_tokens_cuda>, no_gil);
    m.def("hierarchical_select_cuda", &hierarchical_select<hierarchical_select_cuda>, no_gil);
    m.def("vispruner_select_cuda", &vispruner_select<vispruner_select_cuda>, no_gil);
}

}  // namespace hvprune::bindings

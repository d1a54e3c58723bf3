// The ops as Python functions, for csrc/bindings.cpp and tests/emulation. The GIL is released while a kernel runs or is
// launched.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "ops.h"

namespace hvprune::bindings {

using Int = int64_t;

// Tensors are asked for address, strides, sizes and dtype as the Python objects they are, so that no header of torch is
// needed.

struct Input {  // last dimension contiguous: a tensor, or a copy of it that lives as long as the call
    pybind11::object tensor;
    const void* data = nullptr;
    Int stride[3] = {};  // of the dimensions before the last
};

struct Output {  // contiguous; None is a null pointer
    void* data = nullptr;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

struct Pair {  // (rows, columns) or (height, width)
    Int first = 0, second = 0;
};

using Layers = std::vector<Input>;

// A name that Python code uses too: looked up without hashing.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline pybind11::object owned(PyObject* result) {
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline Int to_int(PyObject* object) {
    const Int value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
}

inline void* address_of(pybind11::handle tensor) {
    static PyObject* const kDataPtr = interned("data_ptr");
    return reinterpret_cast<void*>(to_int(owned(PyObject_CallMethodNoArgs(tensor.ptr(), kDataPtr)).ptr()));
}

inline Input read_input(pybind11::object tensor) {
    static PyObject* const kStride = interned("stride");
    pybind11::object strides = owned(PyObject_CallMethodNoArgs(tensor.ptr(), kStride));
    const Py_ssize_t outer = PyTuple_Size(strides.ptr()) - 1;
    if (outer < 0 || outer > 3) throw pybind11::type_error("a kernel takes tensors of 1 to 4 dimensions");
    if (to_int(PyTuple_GetItem(strides.ptr(), outer)) != 1 && tensor.attr("size")(-1).cast<Int>() > 1) {
        tensor = tensor.attr("contiguous")();
        strides = owned(PyObject_CallMethodNoArgs(tensor.ptr(), kStride));
    }
    Input input;
    for (Py_ssize_t i = 0; i < outer; ++i) input.stride[i] = to_int(PyTuple_GetItem(strides.ptr(), i));
    input.data = address_of(tensor);
    input.tensor = std::move(tensor);
    return input;
}

template <size_t ndim>
std::array<Int, ndim> sizes(const Input& input) {
    static PyObject* const kShape = interned("shape");
    const pybind11::object shape = owned(PyObject_GetAttr(input.tensor.ptr(), kShape));
    std::array<Int, ndim> result;
    for (size_t i = 0; i < ndim; ++i) result[i] = to_int(PyTuple_GetItem(shape.ptr(), i));
    return result;
}

inline DType dtype(const Input& input) {
    using TorchDTypes = std::array<PyObject*, 3>;  // in the order of DType; torch keeps them for ever
    static pybind11::gil_safe_call_once_and_store<TorchDTypes> torch_dtypes;
    torch_dtypes.call_once_and_store_result([] {
        const pybind11::module_ torch = pybind11::module_::import("torch");
        return TorchDTypes{torch.attr("float32").ptr(), torch.attr("float16").ptr(), torch.attr("bfloat16").ptr()};
    });
    static PyObject* const kDType = interned("dtype");
    const pybind11::object found = owned(PyObject_GetAttr(input.tensor.ptr(), kDType));
    for (int i = 0; i < 3; ++i) {
        if (found.ptr() == torch_dtypes.get_stored()[i]) return static_cast<DType>(i);
    }
    throw pybind11::type_error("a kernel takes float32, float16 or bfloat16");
}

}  // namespace hvprune::bindings

namespace pybind11::detail {

template <>
struct type_caster<hvprune::bindings::Input> {
    PYBIND11_TYPE_CASTER(hvprune::bindings::Input, const_name("torch.Tensor"));
    bool load(handle source, bool) {
        value = hvprune::bindings::read_input(reinterpret_borrow<object>(source));
        return true;
    }
};

template <>
struct type_caster<hvprune::bindings::Output> {
    PYBIND11_TYPE_CASTER(hvprune::bindings::Output, const_name("torch.Tensor | None"));
    bool load(handle source, bool) {
        value.data = source.is_none() ? nullptr : hvprune::bindings::address_of(source);
        return true;
    }
};

template <>
struct type_caster<hvprune::bindings::Pair> {
    PYBIND11_TYPE_CASTER(hvprune::bindings::Pair, const_name("Sequence[int]"));
    bool load(handle source, bool) {
        if ((!PyTuple_Check(source.ptr()) && !PyList_Check(source.ptr())) || PySequence_Size(source.ptr()) != 2) {
            return false;
        }
        PyObject** const items = PySequence_Fast_ITEMS(source.ptr());
        value = {hvprune::bindings::to_int(items[0]), hvprune::bindings::to_int(items[1])};
        return true;
    }
};

}  // namespace pybind11::detail

namespace hvprune::bindings {

// The last argument of every function: the number of threads of a CPU kernel, the stream of a CUDA one.
template <class Args>
void call(void (*run)(const Args&), std::common_type_t<Args> args, uintptr_t num_threads) {
    args.num_threads = static_cast<int>(num_threads);
    const pybind11::gil_scoped_release no_gil;
    run(args);
}
template <class Args>
void call(void (*run)(const Args&, cudaStream_t), std::common_type_t<Args> args, uintptr_t stream) {
    const pybind11::gil_scoped_release no_gil;
    run(args, reinterpret_cast<cudaStream_t>(stream));
}

template <auto run>
void aggregate_attention(Output importance, const Layers& attentions, Int P, bool cls_row,
                         uintptr_t threads_or_stream) {
    const auto [B, H, L, _] = sizes<4>(attentions[0]);
    std::vector<AttentionMap> maps;
    for (const Input& map : attentions) maps.push_back({map.data, map.stride[0], map.stride[1], map.stride[2]});
    call(run,
         {maps.data(), static_cast<Int>(maps.size()), importance.as<float>(), dtype(attentions[0]), B, H, L, P, cls_row,
          0},
         threads_or_stream);
}

// `logsumexp` may be empty.
inline std::vector<AttentionLayer> attention_layers(const Layers& queries, const Layers& keys,
                                                    const Layers& logsumexp) {
    const Input none;
    std::vector<AttentionLayer> layers;
    layers.reserve(queries.size());
    for (size_t i = 0; i < queries.size(); ++i) {
        const Input &q = queries[i], &k = keys[i], &lse = logsumexp.empty() ? none : logsumexp[i];
        layers.push_back({q.data, q.stride[0], q.stride[1], q.stride[2], k.data, k.stride[0], k.stride[1], k.stride[2],
                          static_cast<const float*>(lse.data), lse.stride[0], lse.stride[1]});
    }
    return layers;
}

template <auto run>
void attention_importance(Output importance, const Layers& queries, const Layers& keys, const Layers& logsumexp, Int P,
                          bool cls_row, float scale, Output scratch, uintptr_t threads_or_stream) {
    const auto [B, H, L, D] = sizes<4>(queries[0]);
    const std::vector<AttentionLayer> layers = attention_layers(queries, keys, logsumexp);
    call(run,
         {layers.data(), static_cast<Int>(layers.size()), importance.as<float>(), dtype(queries[0]), B, H, L, D, P,
          cls_row, scale, 0, scratch.data},
         threads_or_stream);
}

template <auto run>
void hierarchical_select(Output indices, Output counts, Output mask, const Input& scores, Pair grid, Pair regions,
                         Pair window, double keep_ratio, Int M, bool fixed, uintptr_t threads_or_stream) {
    const auto [B, N] = sizes<2>(scores);
    call(run,
         {scores.data, scores.stride[0], indices.as<Int>(), counts.as<int32_t>(), mask.as<bool>(), dtype(scores), B,
          grid.first, grid.second, regions.first, regions.second, window.first, window.second, keep_ratio, M, fixed, 0},
         threads_or_stream);
}

template <auto run>
void cosine_similarity(Output similarity, const Input& features, uintptr_t threads_or_stream) {
    const auto [B, N, C] = sizes<3>(features);
    call(run, {features.data, features.stride[0], features.stride[1], similarity.data, dtype(features), B, N, C, 0},
         threads_or_stream);
}

template <auto run>
void diverse_select(Output indices, Output counts, Output mask, Output trace, Int trace_lists, const Input& similarity,
                    const Input& importance, Int K, Int num_important, Int removals_per_round,
                    uintptr_t threads_or_stream) {
    const auto [B, N] = sizes<2>(importance);
    call(run,
         {similarity.data, similarity.stride[0], similarity.stride[1], dtype(similarity), importance.data,
          importance.stride[0], dtype(importance), indices.as<Int>(), counts.as<int32_t>(), mask.as<bool>(),
          trace.as<Int>(), trace_lists, B, N, K, num_important, removals_per_round, 0},
         threads_or_stream);
}

template <auto run>
void gather_tokens(Output output, const Input& features, const Input& indices, float pad_value,
                   uintptr_t threads_or_stream) {
    const auto [B, N, C] = sizes<3>(features);
    const auto [_, M] = sizes<2>(indices);
    call(run,
         {features.data, features.stride[0], features.stride[1], static_cast<const Int*>(indices.data),
          indices.stride[0], output.data, dtype(features), B, N, C, M, pad_value, 0},
         threads_or_stream);
}

template <auto run>
void hivtp_select(Output indices, Output counts, Output mask, const Layers& queries, const Layers& keys, Int P,
                  float scale, Pair grid, Pair regions, Pair window, double keep_ratio, Int M, bool fixed,
                  Output scratch, uintptr_t threads_or_stream) {
    const auto [B, H, L, D] = sizes<4>(queries[0]);
    const std::vector<AttentionLayer> layers = attention_layers(queries, keys, {});
    HivtpSelectArgs args = {};
    args.attention = {
        layers.data(), static_cast<Int>(layers.size()), nullptr, dtype(queries[0]), B, H, L, D, P, false, scale, 0};
    args.selection = {nullptr,
                      0,
                      indices.as<Int>(),
                      counts.as<int32_t>(),
                      mask.as<bool>(),
                      DType::kFloat32,
                      B,
                      grid.first,
                      grid.second,
                      regions.first,
                      regions.second,
                      window.first,
                      window.second,
                      keep_ratio,
                      M,
                      fixed,
                      0};
    args.scratch = scratch.data;
    call(run, args, threads_or_stream);
}

template <auto run>
void vispruner_select(Output indices, Output counts, Output mask, const Input& features, const Input& importance, Int K,
                      Int num_important, Int removals_per_round, Output similarity, uintptr_t threads_or_stream) {
    const auto [B, N, C] = sizes<3>(features);
    call(run,
         {features.data, features.stride[0], features.stride[1], dtype(features), importance.data, importance.stride[0],
          dtype(importance), indices.as<Int>(), counts.as<int32_t>(), mask.as<bool>(), B, N, C, K, num_important,
          removals_per_round, 0, similarity.data},
         threads_or_stream);
}

inline void define_cpu(pybind11::module_ m) {
    m.def("aggregate_attention", &aggregate_attention<aggregate_attention_cpu>);
    m.def("attention_importance", &attention_importance<attention_importance_cpu>);
    m.def("cosine_similarity", &cosine_similarity<cosine_similarity_cpu>);
    m.def("diverse_select", &diverse_select<diverse_select_cpu>);
    m.def("gather_tokens", &gather_tokens<gather_tokens_cpu>);
    m.def("hierarchical_select", &hierarchical_select<hierarchical_select_cpu>);
    m.def("hivtp_select", &hivtp_select<hivtp_select_cpu>);
    m.def("vispruner_select", &vispruner_select<vispruner_select_cpu>);
}

inline void define_cuda(pybind11::module_ m) {
    m.def("aggregate_attention", &aggregate_attention<aggregate_attention_cuda>);
    m.def("attention_importance", &attention_importance<attention_importance_cuda>);
    m.def("cosine_similarity", &cosine_similarity<cosine_similarity_cuda>);
    m.def("diverse_select", &diverse_select<diverse_select_cuda>);
    m.def("gather_tokens", &gather_tokens<gather_tokens_cuda>);
    m.def("hierarchical_select", &hierarchical_select<hierarchical_select_cuda>);
    m.def("hivtp_select", &hivtp_select<hivtp_select_cuda>);
    m.def("vispruner_select", &vispruner_select<vispruner_select_cuda>);
}

}  // namespace hvprune::bindings

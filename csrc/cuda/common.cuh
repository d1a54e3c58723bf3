// What every kernel file needs: element types and grid sizes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../common.h"
#include "device.cuh"

namespace hvprune {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = ~0u;

// A one-dimensional grid; throws std::invalid_argument if there cannot be one.
inline dim3 grid_of(const char* op, int64_t blocks) {
    if (blocks > INT32_MAX) {
        throw std::invalid_argument(std::string(op) + ": the batch must need at most 2147483647 blocks, got " +
                                    std::to_string(blocks));
    }
    return dim3(static_cast<unsigned>(blocks));
}

// Calls f(T{}) with the element type of a dtype.
template <class F>
void dispatch(DType dtype, F f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kFloat16:
            return f(__half{});
        case DType::kBFloat16:
            return f(__nv_bfloat16{});
    }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Element i of an array of that dtype.
__device__ inline float load_float(const void* values, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(values)[i];
    if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(values)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(values)[i]);
}

}  // namespace hvprune

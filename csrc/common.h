// Shared by every translation unit, host and device.
#pragma once

#include <cstdint>

// Internal linkage on the host: the CPU kernels are compiled once per instruction set, and a shared inline
// function would let the linker keep the copy with the widest instructions for all of them.
#ifdef __CUDACC__
#define HVP_FUNC __host__ __device__ __forceinline__
#else
#define HVP_FUNC static inline __attribute__((always_inline))
#endif

namespace hvprune {

// The codes that hvprune/_native.py passes.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

HVP_FUNC constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HVP_FUNC constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace hvprune

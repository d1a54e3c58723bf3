// What a kernel needs beyond the CUDA language, in one place: shared memory, launches, errors, thread
// block clusters. nvcc compiles it for the device; with HVP_EMULATE, g++ compiles it for tests/emulation.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef HVP_EMULATE
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

// HVP_SHARED(T, name, count): a static array in shared memory.
// HVP_DYNAMIC_SHARED(T, name): T* to the launch's dynamic shared memory, aligned to 128 bytes.
#ifdef HVP_EMULATE
#define HVP_SHARED(T, name, count) \
    static char name##_tag;        \
    T(&name)                       \
    [count] = *static_cast<T(*)[count]>(::emulation::shared_memory(&name##_tag, sizeof(T) * (count)))
#define HVP_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emulation::dynamic_shared_memory())
#else
#define HVP_SHARED(T, name, count) __shared__ T name[count]
#define HVP_DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(128) unsigned char hvp_dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(hvp_dynamic_shared)
#endif

// Throws std::runtime_error "<op>: <cudaErrorName>: <text> (<file>:<line>)" unless call returns success.
#define HVP_CUDA_CHECK(op, call) ::hvp::check_cuda((call), (op), __FILE__, __LINE__)

// HVP_LAUNCH(op, config, kernel, args...)
#define HVP_LAUNCH(op, config, ...) HVP_CUDA_CHECK(op, ::hvp::launch((config), __VA_ARGS__))

namespace hvp {

inline void check_cuda(cudaError_t error, const char* op, const char* file, int line) {
    if (error == cudaSuccess) return;
#ifndef HVP_EMULATE
    cudaGetLastError();  // a launch error that is not sticky must not surface in the next call
#endif
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                             " (" + file + ":" + std::to_string(line) + ")");
}

// Whether dependent launches may overlap the one before, where the device can: false to measure without.
constexpr bool kOverlapLaunches = true;

struct LaunchConfig {
    dim3 grid;
    dim3 block;
    size_t dynamic_shared_bytes = 0;
    cudaStream_t stream = nullptr;
    unsigned cluster = 1;    // blocks per cluster, along x; above 1 needs compute capability 9.0
    bool dependent = false;  // may start before the previous kernel of the stream has ended: every thread calls
                             // programmatic_wait() before it reads what that one writes, or writes anything at all
};

// Compute capability of the current device as major * 10 + minor, at most that which the kernels were compiled for.
inline cudaError_t compute_capability(int* result) {
#ifdef HVP_EMULATE
    *result = ::emulation::config.compute_capability;
    return cudaSuccess;
#else
    int device, major, minor;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    *result = std::min(10 * major + minor, std::max({__CUDA_ARCH_LIST__}) / 10);
    return error;
#endif
}

// Dynamic shared memory that a block of op can have on the current device, beside its static shared memory.
inline int64_t max_shared_bytes(const char* op, int64_t static_bytes = 128) {
#ifdef HVP_EMULATE
    static_cast<void>(op);
    return static_cast<int64_t>(::emulation::max_shared_bytes()) - static_bytes;
#else
    int device, bytes;
    HVP_CUDA_CHECK(op, cudaGetDevice(&device));
    HVP_CUDA_CHECK(op, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes - static_bytes;
#endif
}

template <class... Params, class... Args>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Params...), Args... args) {
    static_assert(sizeof...(Params) == sizeof...(Args), "one argument per kernel parameter");
#ifdef HVP_EMULATE
    const bool dependent = config.dependent && kOverlapLaunches && ::emulation::config.compute_capability >= 90;
    return ::emulation::launch(
        {config.grid, config.block, dim3(config.cluster), config.dynamic_shared_bytes, dependent}, [&] {
            const auto run = kernel;
            const std::tuple<Params...> params(static_cast<Params>(args)...);
            ::emulation::arguments_are_read();
            std::apply(run, params);
        });
#else
    constexpr size_t kDefaultDynamicShared = 48 * 1024;  // bytes available without asking
    constexpr unsigned kPortableCluster = 8;
    cudaLaunchConfig_t runtime = {};
    runtime.gridDim = config.grid;
    runtime.blockDim = config.block;
    runtime.dynamicSmemBytes = config.dynamic_shared_bytes;
    runtime.stream = config.stream;
    cudaLaunchAttribute attributes[2];
    runtime.attrs = attributes;
    cudaError_t error = cudaSuccess;
    if (config.dynamic_shared_bytes > kDefaultDynamicShared) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(config.dynamic_shared_bytes));
        if (error != cudaSuccess) return error;
    }
    if (config.cluster > kPortableCluster) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return error;
    }
    if (config.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[runtime.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = config.cluster;
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
    }
    if (config.dependent && kOverlapLaunches) {
        int capability;
        error = compute_capability(&capability);
        if (error != cudaSuccess) return error;
        if (capability >= 90) {
            cudaLaunchAttribute& attribute = attributes[runtime.numAttrs++];
            attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
        }
    }
    return cudaLaunchKernelEx(&runtime, kernel, static_cast<Params>(args)...);
#endif
}

// Waits until the previous kernel of the stream has ended and its writes are visible, those before it included.
#ifdef HVP_EMULATE
inline void programmatic_wait(HVP_PLACE) { ::emulation::programmatic_wait(file, line); }
#else
__device__ inline void programmatic_wait() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}
#endif

// Lets a dependent launch start once every block has called this or ended; it then takes the room that is left.
__device__ inline void programmatic_trigger() {
#if !defined(HVP_EMULATE) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Clusters. Before sm_90 a cluster is one block, and the exchange below is not available.

__device__ inline unsigned cluster_rank() {
#ifdef HVP_EMULATE
    return ::emulation::cluster_rank();
#elif __CUDA_ARCH__ >= 900
    return __clusterRelativeBlockRank();
#else
    return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#ifdef HVP_EMULATE
    return ::emulation::cluster_size();
#elif __CUDA_ARCH__ >= 900
    return __clusterSizeInBlocks();
#else
    return 1;
#endif
}

#ifdef HVP_EMULATE
inline void cluster_sync(HVP_PLACE) { ::emulation::cluster_barrier(file, line); }
#else
// Barrier of all threads of the cluster; orders their memory accesses, distributed shared ones too.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();  // .release
    __cluster_barrier_wait();    // .acquire
#else
    __syncthreads();
#endif
}
#endif

// The address of the same shared object in block `rank` of the cluster. That block must not end before
// the last access: end with cluster_sync().
template <class T>
__device__ T* cluster_map(T* shared, unsigned rank) {
#ifdef HVP_EMULATE
    return static_cast<T*>(::emulation::map_shared(shared, rank));
#elif __CUDA_ARCH__ >= 900
    return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
#else
    return shared;
#endif
}

// Exchange of small values between the blocks of a cluster, without a cluster barrier per round. Each
// block owns barriers in shared memory; one round ("phase") of a barrier is
//     exchange_expect(&barrier, bytes)            one thread of the block: what this round will bring
//     exchange_send(slot, value, &barrier, rank)  any thread, own rank included: 4 or 8 bytes
//     exchange_wait(&barrier, parity)             every thread that reads slots; parity = round & 1
// The wait orders the slots only, no other memory. A slot is free again when every thread has read it and
// the sender knows: with two barriers and two sets of slots in turn, that is one round later.
using ExchangeBarrier = unsigned long long;

#ifndef HVP_EMULATE
__device__ inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// By one thread; cluster_sync() must follow before the first use.
__device__ inline void exchange_init(ExchangeBarrier* barrier) {
#ifdef HVP_EMULATE
    *barrier = 0;
    ::emulation::mbarrier_init(barrier);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void exchange_expect(ExchangeBarrier* barrier, unsigned bytes) {
#ifdef HVP_EMULATE
    ::emulation::mbarrier_expect(::emulation::observed(barrier), bytes);
#elif __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// slot and barrier are this block's addresses; the value lands at theirs in block `rank`.
template <class T>
__device__ void exchange_send(T* slot, T value, ExchangeBarrier* barrier, unsigned rank) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "st.async stores 4 or 8 bytes");
#ifdef HVP_EMULATE
    *cluster_map(slot, rank) = value;
    ::emulation::mbarrier_complete(::emulation::observed(cluster_map(barrier, rank)), sizeof(T));
#elif __CUDA_ARCH__ >= 900
    uint32_t remote_slot, remote_barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_slot) : "r"(shared_address(slot)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
    if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_slot),
                     "r"(bits), "r"(remote_barrier)
                     : "memory");
    } else {
        uint64_t bits;
        memcpy(&bits, &value, sizeof bits);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(remote_slot),
                     "l"(bits), "r"(remote_barrier)
                     : "memory");
    }
#else
    __trap();
#endif
}

#ifdef HVP_EMULATE
inline void exchange_wait(ExchangeBarrier* barrier, unsigned parity, HVP_PLACE) {
    ::emulation::mbarrier_wait(::emulation::observed(barrier), parity, file, line);
}
#else
__device__ inline void exchange_wait(ExchangeBarrier* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#else
    __trap();
#endif
}
#endif

}  // namespace hvp

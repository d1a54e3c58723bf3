// CUDA's device language for g++: what csrc/cuda/*.cu may use, run by emulation.cpp with one fiber per
// CUDA thread. README.md says what is modelled and what is not.
#pragma once

// The standard headers come first: the toolkit's define __noinline__, which libstdc++ uses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
// A plain __shared__ would become one object per thread: make it an error.
#define __shared__ shared_memory_must_be_declared_with_HVP_SHARED

// Globals of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

enum class Order { kForward, kReversed, kRandom };

struct Config {
    Order order = Order::kForward;  // of threads and of blocks
    uint64_t seed = 0;              // of kRandom
    int fill = 0xCD;                // byte that uninitialised shared memory holds
    int compute_capability = 90;
    std::string left_out_file;  // the barrier on that line of that file does nothing: mutate.py
    int left_out_line = 0;
};
extern Config config;
extern uint64_t num_kernels, num_memsets;  // launched so far
extern const char* const fibers_are_from;  // "boost" or "ucontext"

struct Launch {
    dim3 grid, block, cluster;
    size_t dynamic_shared_bytes;
    bool dependent;
};

// Runs body once per thread. Errors of configuration are returned, errors of the kernel are thrown.
cudaError_t launch(const Launch& launch, const std::function<void()>& body);

// Ends the launch that runs now with a std::runtime_error.
[[noreturn]] void fail(const std::string& message);

struct Votes {
    int in_favour, total;
};
Votes block_barrier(const char* op, bool vote, const char* file, int line);
void cluster_barrier(const char* file, int line);
void fence(const char* file, int line);
void atomic_access(const void* address);
void programmatic_wait(const char* file, int line);
bool left_out(const char* file, int line);

// What dynamic and static shared memory of a block can be together.
size_t max_shared_bytes();

// A thread reads the launch's arguments before this; the sanitizers are to see what comes after.
void arguments_are_read();

// What a lane gives to the others of its warp: 8 bytes for a shuffle, a whole fragment for an mma.
struct Lane {
    alignas(8) unsigned char bytes[32];
};
unsigned lane();
struct Exchanged {
    const Lane* lanes;  // [32], valid until this thread waits again
    unsigned mask;      // without the lanes that a last, partial warp lacks
};
// Waits until all lanes of mask have given their value.
Exchanged exchange(unsigned mask, const Lane& value, const char* op, int line, bool orders_memory = false);

// This block's object of that tag: a heap cell of its own, which ASan guards, filled with config.fill.
void* shared_memory(const void* tag, size_t bytes);
void* dynamic_shared_memory();
unsigned cluster_rank();
unsigned cluster_size();
void* map_shared(const void* shared, unsigned rank);

// An access that the sanitizers see, to what only the runtime reads.
template <class T>
const T* observed(const T* object) {
    static_cast<void>(*const_cast<const volatile T*>(object));
    return object;
}

void mbarrier_init(const void* barrier);
void mbarrier_expect(const void* barrier, unsigned bytes);
void mbarrier_complete(const void* remote_barrier, unsigned bytes);
void mbarrier_wait(const void* barrier, unsigned parity, const char* file, int line);

struct AsyncCopy {
    void* target;
    const void* source;
    unsigned bytes;
};
void async_copy(const AsyncCopy& copy);
void async_commit();
// Takes the oldest copy that has to land for at most `pending` groups to stay in flight.
bool async_land(int pending, AsyncCopy* copy);

template <class T>
Lane pack(const T& value) {
    static_assert(sizeof(T) <= sizeof(Lane) && std::is_trivially_copyable_v<T>);
    Lane lane{};
    std::memcpy(lane.bytes, &value, sizeof value);
    return lane;
}

template <class T>
T unpack(const Lane& lane) {
    T value;
    std::memcpy(&value, lane.bytes, sizeof value);
    return value;
}

template <class T, class From>
T bit_cast(From value) {
    static_assert(sizeof(T) == sizeof(From));
    return unpack<T>(pack(value));
}

// Own value if the source lane lies outside the segment of `width` lanes, as the hardware does.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside, const char* op, int line) {
    static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
    const Exchanged all = exchange(mask, pack(value), op, line);
    if (!inside) return value;
    if (!(all.mask >> source & 1)) fail(std::string(op) + ": the source lane is not in the mask");
    return unpack<T>(all.lanes[source]);
}

template <class T>
unsigned lanes_equal(unsigned mask, T value, T wanted, const char* op, int line) {
    const Exchanged all = exchange(mask, pack(value), op, line);
    unsigned equal = 0;
    for (int i = 0; i < warpSize; ++i) {
        if (all.mask >> i & 1) equal |= unsigned(unpack<T>(all.lanes[i]) == wanted) << i;
    }
    return equal;
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, const char* op, int line) {
    const Exchanged all = exchange(mask, pack(value), op, line);
    const int first = __builtin_ctz(all.mask);
    T result = unpack<T>(all.lanes[first]);
    for (int i = first + 1; i < warpSize; ++i) {
        if (all.mask >> i & 1) result = combine(result, unpack<T>(all.lanes[i]));
    }
    return result;
}

// Read, modify, write in one step; works for integers and floats alike.
template <class T, class Modify>
T atomic(T* address, Modify modify) {
    atomic_access(address);
    T old, desired;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        desired = modify(old);
    } while (!__atomic_compare_exchange(address, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// Keeps the second argument of atomicAdd(unsigned long long*, int) from taking part in deduction.
template <class T>
using Same = std::common_type_t<T>;

}  // namespace emulation

// Where a function is called.
#define HVP_LINE int line = __builtin_LINE()
#define HVP_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HVP_PLACE) { emulation::block_barrier("__syncthreads", false, file, line); }
inline int __syncthreads_count(int predicate, HVP_PLACE) {
    return emulation::block_barrier("__syncthreads_count", predicate, file, line).in_favour;
}
inline int __syncthreads_or(int predicate, HVP_PLACE) {
    return emulation::block_barrier("__syncthreads_or", predicate, file, line).in_favour > 0;
}
inline int __syncthreads_and(int predicate, HVP_PLACE) {
    const auto votes = emulation::block_barrier("__syncthreads_and", predicate, file, line);
    return votes.in_favour == votes.total;
}

// The only warp function that orders memory; shuffles, votes and reductions do not.
inline void __syncwarp(unsigned mask = ~0u, HVP_PLACE) {
    if (!emulation::left_out(file, line)) emulation::exchange(mask, {}, "__syncwarp", line, true);
}
inline unsigned __activemask() {
    emulation::fail("__activemask depends on the scheduling of the warp: pass the mask along");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, HVP_LINE) {
    const int base = emulation::lane() & -width;
    return emulation::shuffle(mask, value, base | (source & (width - 1)), true, "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, HVP_LINE) {
    const int lane = emulation::lane(), source = lane ^ lane_mask;
    const bool inside = source < (lane & -width) + width;
    return emulation::shuffle(mask, value, source, inside, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HVP_LINE) {
    const int lane = emulation::lane(), source = lane - int(delta);
    const bool inside = source >= (lane & -width);
    return emulation::shuffle(mask, value, source, inside, "__shfl_up_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HVP_LINE) {
    const int lane = emulation::lane(), source = lane + int(delta);
    const bool inside = source < (lane & -width) + width;
    return emulation::shuffle(mask, value, source, inside, "__shfl_down_sync", line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HVP_LINE) {
    return emulation::lanes_equal(mask, predicate != 0, true, "__ballot_sync", line);
}
inline int __any_sync(unsigned mask, int predicate, HVP_LINE) {
    return emulation::lanes_equal(mask, predicate != 0, true, "__any_sync", line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HVP_LINE) {
    return emulation::lanes_equal(mask, predicate == 0, true, "__all_sync", line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, HVP_LINE) {
    return emulation::lanes_equal(mask, value, value, "__match_any_sync", line);
}

#define HVP_REDUCE(name, T, expression)                                \
    inline T name(unsigned mask, T value, HVP_LINE) {                  \
        const auto combine = [](T a, T b) -> T { return expression; }; \
        return emulation::reduce(mask, value, combine, #name, line);   \
    }
HVP_REDUCE(__reduce_add_sync, unsigned, a + b)
HVP_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
HVP_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
HVP_REDUCE(__reduce_min_sync, int, std::min(a, b))
HVP_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
HVP_REDUCE(__reduce_max_sync, int, std::max(a, b))
HVP_REDUCE(__reduce_and_sync, unsigned, a& b)
HVP_REDUCE(__reduce_or_sync, unsigned, a | b)
HVP_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef HVP_REDUCE
#undef HVP_LINE

#define HVP_ATOMIC(name, expression)                                               \
    template <class T>                                                             \
    T name(T* address, emulation::Same<T> value) {                                 \
        return emulation::atomic(address, [&](T old) -> T { return expression; }); \
    }
HVP_ATOMIC(atomicAdd, old + value)
HVP_ATOMIC(atomicSub, old - value)
HVP_ATOMIC(atomicMin, std::min(old, value))
HVP_ATOMIC(atomicMax, std::max(old, value))
HVP_ATOMIC(atomicAnd, old& value)
HVP_ATOMIC(atomicOr, old | value)
HVP_ATOMIC(atomicXor, old ^ value)
HVP_ATOMIC(atomicExch, (static_cast<void>(old), value))
HVP_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef HVP_ATOMIC
template <class T>
T atomicCAS(T* address, emulation::Same<T> expected, emulation::Same<T> value) {
    return emulation::atomic(address, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence(HVP_PLACE) { emulation::fence(file, line); }
inline void __threadfence_block(HVP_PLACE) { emulation::fence(file, line); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __float_as_uint(float x) { return emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emulation::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float a) { return a > 0.f ? std::min(a, 1.f) : 0.f; }
inline float rsqrtf(float a) { return 1.f / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline long long __double2ll_rn(double a) { return std::llrint(a); }
inline long long __float2ll_rn(float a) { return std::llrint(a); }
inline int __float2int_rn(float a) { return int(std::lrint(a)); }
template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
using std::max;
using std::min;

// The runtime calls that launchers make. A stream is an ordinary argument: work runs at the launch.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

// Correct kernels that use every part of the emulation but the tensor cores.
#include "selftest.h"

namespace hvp::selftest {
namespace {

constexpr unsigned kFull = ~0u;
constexpr int kWarp = 32;

__device__ inline unsigned long long warp_max(unsigned long long value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(kFull, value, offset));
    }
    return value;
}

// s_partial [32]; every thread receives the maximum.
__device__ unsigned long long block_max(unsigned long long value, unsigned long long* s_partial) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int num_warps = (blockDim.x + kWarp - 1) / kWarp;
    value = warp_max(value);
    if (lane == 0) s_partial[warp] = value;
    __syncthreads();
    if (warp == 0) {
        value = warp_max(lane < num_warps ? s_partial[lane] : 0ull);
        if (lane == 0) s_partial[0] = value;
    }
    __syncthreads();
    value = s_partial[0];
    __syncthreads();
    return value;
}

__device__ inline int warp_inclusive_scan(int value) {
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int below = __shfl_up_sync(kFull, value, offset);
        if (static_cast<int>(threadIdx.x % kWarp) >= offset) value += below;
    }
    return value;
}

// s_partial [33]; returns the sum over the lower threads, s_partial[32] holds the total.
__device__ int block_exclusive_scan(int value, int* s_partial) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int num_warps = (blockDim.x + kWarp - 1) / kWarp;
    const int inclusive = warp_inclusive_scan(value);
    if (lane == kWarp - 1) s_partial[warp] = inclusive;
    __syncthreads();
    if (warp == 0) {
        const int own = lane < num_warps ? s_partial[lane] : 0;
        const int up_to = warp_inclusive_scan(own);
        if (lane < num_warps) s_partial[lane] = up_to - own;
        if (lane == num_warps - 1) s_partial[kWarp] = up_to;
    }
    __syncthreads();
    const int result = inclusive - value + s_partial[warp];
    __syncthreads();  // s_partial may be used again
    return result;
}

__global__ void intrinsics_kernel(IntrinsicsArgs args) {
    const int thread = threadIdx.x, lane = thread % kWarp, value = args.values[thread];
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    int row = 0;
    const auto store = [&](int result) { args.results[row++ * args.num_threads + thread] = result; };
    store(__shfl_sync(kFull, value, 3));
    store(__shfl_sync(kFull, value, lane + 1, 8));
    store(__shfl_xor_sync(kFull, value, 5));
    store(__shfl_up_sync(kFull, value, 3));
    store(__shfl_down_sync(kFull, value, 2, 16));
    store(static_cast<int>(__ballot_sync(kFull, value & 1)));
    store(__any_sync(half, value == 7));
    store(__all_sync(half, value < 7));
    store(static_cast<int>(__match_any_sync(kFull, value)));
    store(__reduce_add_sync(half, value));
    store(__reduce_max_sync(kFull, value));
    store(static_cast<int>(__reduce_min_sync(kFull, static_cast<unsigned>(value))));
    store(static_cast<int>(__reduce_or_sync(kFull, 1u << value)));
    // Lanes of equal value meet under masks of their own.
    store(__reduce_add_sync(__match_any_sync(kFull, value), lane));
    store(__popc(value) + __clz(value) + __ffs(value));
    store(static_cast<int>(__shfl_sync(kFull, static_cast<double>(value) / 2, 1) * 2));
}

__global__ void histogram_kernel(HistogramArgs args) {
    HVP_SHARED(int, s_counts, 8);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool valid = i < args.n;
    const int value = valid ? args.values[i] : 0;
    if (threadIdx.x < 8) s_counts[threadIdx.x] = 0;
    __syncthreads();
    if (valid) {
        atomicAdd(&s_counts[value], 1);
        atomicAdd(args.sum, static_cast<unsigned long long>(value) << 32);
        atomicAdd(args.float_sum, 0.5f * value);
        atomicMax(args.largest, value);
    }
    const int count = __syncthreads_count(value > 3);
    const int any = __syncthreads_or(value > 3);
    const int all = __syncthreads_and(value > 3);
    if (threadIdx.x < 8) atomicAdd(&args.counts[threadIdx.x], s_counts[threadIdx.x]);
    if (i == 0) {
        args.votes[0] = count;
        args.votes[1] = any;
        args.votes[2] = all;
    }
}

__global__ void ticket_sum_kernel(TicketSumArgs args) {
    HVP_SHARED(bool, s_is_last, 1);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int sum = __reduce_add_sync(kFull, i < args.n ? args.values[i] : 0);
    if (threadIdx.x == 0) {
        args.partial[blockIdx.x] = sum;
        __threadfence();
        s_is_last[0] = atomicAdd(args.ticket, 1) == static_cast<int>(gridDim.x) - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s_is_last[0] || threadIdx.x > 0) return;
    int total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += args.partial[block];
    args.sum[0] = total;
}

__global__ void double_kernel(int* sum) {
    programmatic_wait();
    sum[0] *= 2;
}

// Larger scores and then lower indices give larger keys; scores are not negative.
__device__ inline unsigned long long order_key(float score, unsigned index) {
    return static_cast<unsigned long long>(__float_as_uint(score)) << 32 | (0xffffffffu - index);
}

__global__ void remove_largest_kernel(RemoveLargestArgs args) {
    HVP_DYNAMIC_SHARED(int, s_kept);  // [n]
    HVP_SHARED(unsigned long long, s_max, kWarp);
    HVP_SHARED(int, s_scan, kWarp + 1);
    const int thread = threadIdx.x;
    int num_kept = args.n;
    if (thread < args.n) s_kept[thread] = thread;  // read by the same thread first
    for (int round = 0; round < args.num_rounds; ++round) {
        const int index = thread < num_kept ? s_kept[thread] : -1;
        const float score = index >= 0 ? args.scores[static_cast<int64_t>(round) * args.n + index] : 0.f;
        bool keep = index >= 0;
        for (int i = 0; i < args.per_round; ++i) {
            const unsigned long long key = keep ? order_key(score, thread) : 0;
            if (key == block_max(key, s_max)) keep = false;
        }
        const int position = block_exclusive_scan(keep, s_scan);
        if (keep) s_kept[position] = index;
        num_kept = s_scan[kWarp];
        __syncthreads();
    }
    if (thread < num_kept) args.kept[thread] = s_kept[thread];
    if (thread == 0) *args.num_kept = num_kept;
}

__global__ void cluster_compact_kernel(ClusterCompactArgs args) {
    HVP_DYNAMIC_SHARED(int, s_indices);  // [blockDim.x]
    HVP_SHARED(int, s_scan, kWarp + 1);
    const int row = blockIdx.x / cluster_size(), rank = cluster_rank();
    const int column = rank * blockDim.x + threadIdx.x, thread = threadIdx.x;
    const float* values = args.values + static_cast<int64_t>(row) * args.n;
    const bool keep = column < args.n && values[column] > args.threshold;
    const int position = block_exclusive_scan(keep, s_scan);
    if (keep) s_indices[position] = column;
    cluster_sync();  // every block's total and s_indices are written
    int before = 0, total = 0;
    for (int r = 0; r < static_cast<int>(cluster_size()); ++r) {
        const int count = *cluster_map(&s_scan[kWarp], r);
        if (r < rank) before += count;
        total += count;
    }
    int* indices = args.indices + static_cast<int64_t>(row) * args.n;
    if (thread < s_scan[kWarp]) indices[before + thread] = s_indices[thread];
    if (rank == 0 && thread == 0) args.counts[row] = total;
    cluster_sync();  // nobody ends while its total is read
}

__global__ void cluster_topk_kernel(ClusterTopkArgs args) {
    constexpr int kMaxCluster = 16;
    HVP_SHARED(ExchangeBarrier, s_barriers, 2);
    HVP_SHARED(unsigned long long, s_slots, 2 * kMaxCluster);
    HVP_SHARED(unsigned long long, s_max, kWarp);
    const int size = cluster_size(), row = blockIdx.x / size, rank = cluster_rank();
    const int thread = threadIdx.x, column = rank * blockDim.x + thread;
    unsigned long long key = column < args.n ? args.values[static_cast<int64_t>(row) * args.n + column] + 1 : 0;
    if (thread < 2) exchange_init(&s_barriers[thread]);
    cluster_sync();  // all barriers are initialised
    for (int round = 0; round < args.k; ++round) {
        const int buffer = round & 1;
        const unsigned long long own = block_max(key, s_max);
        unsigned long long* slots = s_slots + buffer * kMaxCluster;
        if (thread == 0) exchange_expect(&s_barriers[buffer], size * sizeof(own));
        if (thread < size) exchange_send(&slots[rank], own, &s_barriers[buffer], thread);
        exchange_wait(&s_barriers[buffer], round >> 1 & 1);
        unsigned long long best = 0;
        for (int r = 0; r < size; ++r) best = max(best, slots[r]);
        if (key == best) {
            args.largest[static_cast<int64_t>(row) * args.k + round] = static_cast<int>(key) - 1;
            key = 0;
        }
    }
}

}  // namespace

void intrinsics_cuda(const IntrinsicsArgs& args, cudaStream_t stream) {
    const LaunchConfig config{dim3(1), dim3(args.num_threads), 0, stream};
    HVP_LAUNCH("intrinsics", config, intrinsics_kernel, args);
}

void histogram_cuda(const HistogramArgs& args, cudaStream_t stream) {
    constexpr int kThreads = 96;
    const LaunchConfig config{dim3((args.n + kThreads - 1) / kThreads), dim3(kThreads), 0, stream};
    HVP_LAUNCH("histogram", config, histogram_kernel, args);
}

void ticket_sum_cuda(const TicketSumArgs& args, cudaStream_t stream) {
    LaunchConfig config{dim3((args.n + kWarp - 1) / kWarp), dim3(kWarp), 0, stream};
    HVP_LAUNCH("ticket_sum", config, ticket_sum_kernel, args);
    config.grid = config.block = dim3(1);
    config.dependent = true;
    HVP_LAUNCH("ticket_sum", config, double_kernel, args.sum);
}

void remove_largest_cuda(const RemoveLargestArgs& args, cudaStream_t stream) {
    const LaunchConfig config{dim3(1), dim3((args.n + kWarp - 1) / kWarp * kWarp), args.n * sizeof(int), stream};
    HVP_LAUNCH("remove_largest", config, remove_largest_kernel, args);
}

void cluster_compact_cuda(const ClusterCompactArgs& args, cudaStream_t stream) {
    constexpr int kThreads = 64;
    LaunchConfig config{dim3(args.num_rows * args.cluster), dim3(kThreads), kThreads * sizeof(int), stream};
    config.cluster = args.cluster;
    HVP_LAUNCH("cluster_compact", config, cluster_compact_kernel, args);
}

void cluster_topk_cuda(const ClusterTopkArgs& args, cudaStream_t stream) {
    constexpr int kThreads = 64;
    LaunchConfig config{dim3(args.num_rows * args.cluster), dim3(kThreads), 0, stream};
    config.cluster = args.cluster;
    HVP_LAUNCH("cluster_topk", config, cluster_topk_kernel, args);
}

}  // namespace hvp::selftest

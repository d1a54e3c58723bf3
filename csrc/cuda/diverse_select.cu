// Computes  the num_important best tokens, and of the others what is left after rounds of removing duplicates
// Work      a cluster of blocks per image (one block before compute capability 9.0), all rounds in one launch. Every
//           block holds the whole list and N / blocks rows of the similarity matrix, in shared memory where they fit,
//           else read from L2. A round: a warp scores a row at a time, the blocks exchange the scores' keys, and each
//           ranks them all and rewrites its list. Orders by counting: no sort, no cluster barrier within the rounds.
// Traffic   the similarity matrix once (per round the rows of the even positions, if it does not fit).
// Numerics  order keys of importance and scores: ties by lower index or earlier position; NaN similarity counts as
//           -inf. The number of blocks does not change a bit. Bitwise equal to the reference.
// Source    VisPruner, arXiv 2412.01818
#include "../ops.h"
#include "../order.h"
#include "mma.cuh"
#include "selection.cuh"

namespace hvprune {
namespace {

constexpr int kMaxCluster = 8;         // blocks; larger clusters are not portable
constexpr int64_t kWideClusters = 15;  // of 8 blocks with an SM each, what an H100 or H200 runs at once

// What every block knows of an image, in shared memory. What comes in pairs alternates by round.
class State {
 public:
    uint8_t* kept;  // [N]
    BitSet set;     // of N

    static __host__ __device__ int64_t bytes(int64_t N) {
        return round_up(2 * 4 * (round_up(N, 4) + num_keys(N)) + BitSet::bytes(N) + 3 * N, 128);
    }
    __device__ State(int32_t* memory, int N) : lists_(memory), N_(N), stride_(static_cast<int>(round_up(N, 4))) {
        int32_t* words = memory + 2 * (stride_ + num_keys(N));
        set = {reinterpret_cast<uint32_t*>(words), words + ceil_div(N, kWarpSize)};
        kept = reinterpret_cast<uint8_t*>(words) + BitSet::bytes(N);
    }
    // [N] residual tokens in order, aligned to 16 bytes
    __device__ int32_t* list(int parity) const { return lists_ + parity * stride_; }
    // [N / 2 + 1 + kMaxCluster] order keys of the scores by position / 2, then one of each block; aligned to 16 bytes
    __device__ int32_t* keys(int parity) const { return lists_ + 2 * stride_ + parity * num_keys(N_); }
    // [N] per token: residual, at an odd position
    __device__ uint8_t* is_odd(int parity) const { return kept + (1 + parity) * N_; }

 private:
    static __host__ __device__ int num_keys(int N) { return static_cast<int>(round_up(N / 2 + 1 + kMaxCluster, 4)); }

    int32_t* lists_;
    int N_, stride_;
};

// Position of item i among n keys in descending order, ties by lower index. Keys are aligned to 16 bytes; the items of
// a warp follow each other from a multiple of 32 on.
__device__ int rank_of(int i, const int32_t* keys, int n) {
    const int32_t key = keys[i];
    const int first = i / kWarpSize * kWarpSize, after = first + kWarpSize;
    int counts[4] = {};  // four of them, because each waits for its predecessor
    const auto count_above = [&](int begin, int end, int32_t bound) {  // of multiples of 4
        for (int j = begin; j < end; j += 4) {
            const int4 four = *reinterpret_cast<const int4*>(keys + j);
            counts[0] += four.x > bound;
            counts[1] += four.y > bound;
            counts[2] += four.z > bound;
            counts[3] += four.w > bound;
        }
    };
    count_above(0, first, key - 1);  // no key is the lowest integer
    for (int j = first; j < min(after, n); ++j) counts[0] += keys[j] > key - (j < i);
    count_above(after, n / 4 * 4, key);
    for (int j = max(after, n / 4 * 4); j < n; ++j) counts[0] += keys[j] > key;
    return counts[0] + counts[1] + (counts[2] + counts[3]);
}

// Order key of max over the columns whose byte is set of row[column], -inf if there is none or it is NaN. By one warp.
// In fours: N is a multiple of 4, and row and is_set are aligned to 4 elements.
template <class T>
__device__ int32_t score_key(const T* row, const uint8_t* is_set, int N, bool in_fours) {
    struct alignas(4 * sizeof(T)) Four {
        T values[4];
    };
    const int lane = threadIdx.x % kWarpSize;
    float most = -INFINITY;
    if (in_fours) {
        for (int column = lane * 4; column < N; column += kWarpSize * 4) {
            const Four four = *reinterpret_cast<const Four*>(row + column);
            const uint32_t set = *reinterpret_cast<const uint32_t*>(is_set + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (set >> 8 * i & 1) most = fmaxf(most, to_float(four.values[i]));
            }
        }
    } else {
        for (int column = lane; column < N; column += kWarpSize) {
            if (is_set[column]) most = fmaxf(most, to_float(row[column]));
        }
    }
    return __reduce_max_sync(kAllLanes, order_key(most));
}

__device__ void write_trace(const int32_t* list, int length, int columns, int64_t* row) {
    for (int i = threadIdx.x; i < columns; i += blockDim.x) row[i] = i < length ? list[i] : -1;
}

// kOnChip: the rows of a block are copied to its shared memory first.
template <class T, bool kOnChip>
__global__ void __launch_bounds__(kMaxThreads, 1)
    diverse_select_kernel(const T* similarity,  // [B, N, N]
                          int64_t batch_stride, int64_t row_stride,
                          const void* importance,  // [B, N]
                          int64_t importance_batch_stride, DType importance_dtype,
                          int64_t* indices,  // [B, K]
                          int32_t* counts,   // [B]
                          bool* mask,        // [B, N]
                          int64_t* trace,    // [B, trace_lists, N - num_important]; nullptr: not wanted
                          int64_t trace_lists, int N, int K, int num_important, int64_t removals_per_round) {
    const int rank = hvp::cluster_rank(), blocks = hvp::cluster_size();
    const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
    const int64_t b = blockIdx.x / blocks;
    const int rows_per_block = ceil_div(N, blocks), first_row = rank * rows_per_block;
    HVP_SHARED(hvp::ExchangeBarrier, s_barriers, 2);
    HVP_DYNAMIC_SHARED(int32_t, s_memory);  // a State, then the rows
    const State state(s_memory, N);
    T* s_rows = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(s_memory) + State::bytes(N));
    const T* own = similarity + b * batch_stride;

    // Order by importance: the best are kept, the others are the list.
    // NOTE: before the wait only the importance is read and nothing is written to global memory.
    int32_t* const s_importance = state.list(1);  // [N] order keys, until the first round writes that list
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        s_importance[token] = order_key(load_float(importance, importance_dtype, b * importance_batch_stride + token));
        state.kept[token] = true;
    }
    if (blocks > 1 && threadIdx.x < 2) hvp::exchange_init(&s_barriers[threadIdx.x]);
    __syncthreads();  // importance is written
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        const int position = rank_of(token, s_importance, N) - num_important;
        if (position >= 0) state.list(0)[position] = token;
        for (int parity = 0; parity < 2; ++parity) {
            state.is_odd(parity)[token] = position >= 0 && position % 2;  // the best stay out of both for good
        }
    }

    // Load the block's rows.
    hvp::programmatic_wait();
    if (kOnChip) {
        constexpr int kPiece = 16 / sizeof(T);
        const bool aligned =
            (reinterpret_cast<uintptr_t>(own) | (row_stride | N) * static_cast<int64_t>(sizeof(T))) % 16 == 0;
        const int last_row = min(first_row + rows_per_block, N), lane = threadIdx.x % kWarpSize;
        for (int row = first_row + warp; row < last_row; row += num_warps) {
            const T* from = own + row * row_stride;
            T* to = s_rows + (row - first_row) * N;
            if (aligned) {
                for (int i = lane * kPiece; i < N; i += kWarpSize * kPiece) hvp::cp_async16(to + i, from + i);
            } else {
                for (int i = lane; i < N; i += kWarpSize) to[i] = from[i];
            }
        }
        hvp::cp_async_commit();
        hvp::cp_async_wait<0>();
    }
    hvp::cluster_sync();  // rows and list are written, barriers are ready, importance is no longer read

    const auto address = kOnChip ? 0 : reinterpret_cast<uintptr_t>(own) | row_stride * static_cast<int64_t>(sizeof(T));
    const bool in_fours = N % 4 == 0 && address % (4 * sizeof(T)) == 0;
    const int columns = N - num_important, num_diverse = K - num_important;
    int64_t* trace_row = trace == nullptr ? nullptr : trace + b * trace_lists * columns;
    if (trace != nullptr && rank == 0) write_trace(state.list(0), columns, columns, trace_row);

    int residual = columns;
    for (int round = 0; residual > num_diverse; ++round) {
        const int now = round % 2, next = 1 - now;
        const int num_even = (residual + 1) / 2;
        const int removals = static_cast<int>(min(removals_per_round, int64_t{min(residual - num_diverse, num_even)}));
        const int32_t* list = state.list(now);
        int32_t* keys = state.keys(now);
        hvp::ExchangeBarrier* barrier = &s_barriers[now];

        // Score the even positions.
        // NOTE: a block may have none of their rows; it sends a key all the same, so that no other can be a second
        // round ahead of it and overwrite keys that it still reads.
        const auto publish = [&](int slot, int32_t key) {
            const int lane = threadIdx.x % kWarpSize;
            if (blocks == 1) {
                if (lane == 0) keys[slot] = key;
            } else if (lane < blocks) {
                hvp::exchange_send(&keys[slot], key, barrier, lane);
            }
        };
        if (blocks > 1 && threadIdx.x == 0) hvp::exchange_expect(barrier, (num_even + blocks) * sizeof(int32_t));
        for (int i = warp; i < num_even; i += num_warps) {
            const int token = list[2 * i], row = token - first_row;
            if (row < 0 || row >= rows_per_block) continue;
            const T* scored = kOnChip ? s_rows + row * N : own + token * row_stride;
            publish(i, score_key(scored, state.is_odd(now), N, in_fours));
        }
        if (blocks > 1 && warp == 0) publish(num_even + rank, 0);
        if (blocks > 1) {
            hvp::exchange_wait(barrier, round / 2 % 2);
        } else {
            __syncthreads();  // keys are written
        }

        // Rewrite the list: what is left of the even positions by score, then the odd ones.
        for (int i = threadIdx.x; i < residual; i += blockDim.x) {
            // The even positions go to the first threads: their loops over the keys are long.
            const int odd = i - num_even, token = list[odd < 0 ? 2 * i : 2 * odd + 1];
            const int position = (odd < 0 ? rank_of(i, keys, num_even) : num_even + odd) - removals;
            if (position >= 0) state.list(next)[position] = token;
            state.is_odd(next)[token] = position >= 0 && position % 2;
            if (position < 0) state.kept[token] = false;
        }
        residual -= removals;
        __syncthreads();  // the list is written, its predecessor and the keys are no longer read
        if (trace != nullptr && rank == 0) {
            trace_row += columns;
            write_trace(state.list(next), residual, columns, trace_row);
        }
    }

    if (rank == 0) {
        const int count = state.set.fill(N, [&](int token) { return state.kept[token] != 0; });
        write_selection(state.set, count, N, K, {indices + b * K, counts + b, mask + b * N});
    }
    // NOTE: no barrier at the end: a block has waited for all that the others send it.
}

// Blocks per image, and whether their rows fit in shared memory.
struct Plan {
    int blocks;
    bool on_chip;
    size_t shared_bytes;
};

Plan make_plan(int64_t B, int64_t N, int64_t element_size, int capability, int64_t most) {
    const auto bytes = [&](int blocks) { return State::bytes(N) + ceil_div(N, blocks) * N * element_size; };
    const int widest = capability >= 90 ? kMaxCluster : 1;
    int blocks = widest;
    if (blocks > 1 && B > kWideClusters && bytes(blocks / 2) <= most) blocks /= 2;
    const bool on_chip = bytes(blocks) <= most;
    return {blocks, on_chip, static_cast<size_t>(on_chip ? bytes(blocks) : State::bytes(N))};
}

}  // namespace

void diverse_select_cuda(const DiverseSelectArgs& args, cudaStream_t stream) {
    constexpr const char* kOp = "diverse_select";
    if (args.B == 0) return;
    int capability;
    HVP_CUDA_CHECK(kOp, hvp::compute_capability(&capability));
    const Plan plan = make_plan(args.B, args.N, args.similarity_dtype == DType::kFloat32 ? 4 : 2, capability,
                                hvp::max_shared_bytes(kOp));
    check_shared_bytes(kOp, "similarity", args.N, plan.shared_bytes);
    hvp::LaunchConfig config;
    config.cluster = plan.blocks;
    config.grid = grid_of(kOp, args.B * plan.blocks);
    config.block = dim3(threads_for(args.N));
    config.dynamic_shared_bytes = plan.shared_bytes;
    config.stream = stream;
    config.dependent = args.after_similarity;
    dispatch(args.similarity_dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto kernel = plan.on_chip ? diverse_select_kernel<T, true> : diverse_select_kernel<T, false>;
        HVP_LAUNCH(kOp, config, kernel, static_cast<const T*>(args.similarity), args.similarity_batch_stride,
                   args.similarity_row_stride, args.importance, args.importance_batch_stride, args.importance_dtype,
                   args.indices, args.counts, args.mask, args.trace, args.trace_lists, args.N, args.K,
                   args.num_important, args.removals_per_round);
    });
}

}  // namespace hvprune

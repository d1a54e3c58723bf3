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
        return round_up(2 * 4 * (N + num_keys(N)) + BitSet::bytes(N) + 3 * N, 128);
    }
    __device__ State(int32_t* memory, int N) : lists_(memory), N_(N) {
        int32_t* words = memory + 2 * (N + num_keys(N));
        set = {reinterpret_cast<uint32_t*>(words), words + ceil_div(N, kWarpSize)};
        kept = reinterpret_cast<uint8_t*>(words) + BitSet::bytes(N);
    }
    // [N] residual tokens in order
    __device__ int32_t* list(int parity) const { return lists_ + parity * N_; }
    // [N / 2 + 1 + kMaxCluster] order keys of the scores by position / 2, then one of each block
    __device__ int32_t* keys(int parity) const { return lists_ + 2 * N_ + parity * num_keys(N_); }
    // [N] per token: residual, at an odd position
    __device__ uint8_t* is_odd(int parity) const { return kept + (1 + parity) * N_; }

 private:
    static __host__ __device__ int num_keys(int N) { return N / 2 + 1 + kMaxCluster; }

    int32_t* lists_;
    int N_;
};

// Position of item i among n keys in descending order, ties by lower index.
__device__ int rank_of(int i, const int32_t* keys, int n) {
    const int32_t key = keys[i];
    int rank = 0;
    for (int j = 0; j < i; ++j) rank += keys[j] >= key;
    for (int j = i + 1; j < n; ++j) rank += keys[j] > key;
    return rank;
}

// Order key of max over the columns whose byte is set of row[column], -inf if there is none. By one warp.
template <class T>
__device__ int32_t score_key(const T* row, const uint8_t* is_set, int N) {
    float most = -INFINITY;
    for (int column = threadIdx.x % kWarpSize; column < N; column += kWarpSize) {
        const float value = to_float(row[column]);
        if (is_set[column] && value > most) most = value;
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

    // Load the block's rows and the importance.
    if (kOnChip) {
        const int last_row = min(first_row + rows_per_block, N);
        for (int row = first_row + warp; row < last_row; row += num_warps) {
            for (int column = threadIdx.x % kWarpSize; column < N; column += kWarpSize) {
                s_rows[(row - first_row) * N + column] = own[row * row_stride + column];
            }
        }
    }
    int32_t* const s_importance = state.list(1);  // [N] order keys, until the first round writes that list
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        s_importance[token] = order_key(load_float(importance, importance_dtype, b * importance_batch_stride + token));
        state.kept[token] = true;
    }
    if (blocks > 1 && threadIdx.x < 2) hvp::exchange_init(&s_barriers[threadIdx.x]);
    hvp::cluster_sync();  // rows and importance are written, barriers are ready

    // Order by importance: the best are kept, the others are the list.
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        const int position = rank_of(token, s_importance, N) - num_important;
        if (position >= 0) state.list(0)[position] = token;
        for (int parity = 0; parity < 2; ++parity) {
            state.is_odd(parity)[token] = position >= 0 && position % 2;  // the best stay out of both for good
        }
    }
    __syncthreads();  // the list is written, importance is no longer read

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
            publish(i, score_key(kOnChip ? s_rows + row * N : own + token * row_stride, state.is_odd(now), N));
        }
        if (blocks > 1 && warp == 0) publish(num_even + rank, 0);
        if (blocks > 1) {
            hvp::exchange_wait(barrier, round / 2 % 2);
        } else {
            __syncthreads();  // keys are written
        }

        // Rewrite the list: what is left of the even positions by score, then the odd ones.
        for (int i = threadIdx.x; i < residual; i += blockDim.x) {
            const int token = list[i];
            const int position = i % 2 ? num_even - removals + i / 2 : rank_of(i / 2, keys, num_even) - removals;
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

Plan make_plan(int64_t B, int64_t N, int64_t element_size, int capability) {
    const int64_t kilobyte = 1024;  // what a block can have, by compute capability
    const int64_t most = (capability == 80 || capability == 87   ? 163
                          : capability < 90 || capability >= 120 ? 99
                                                                 : 227) *
                             kilobyte -
                         1 * kilobyte;  // s_barriers apart
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
    const Plan plan = make_plan(args.B, args.N, args.similarity_dtype == DType::kFloat32 ? 4 : 2, capability);
    hvp::LaunchConfig config;
    config.cluster = plan.blocks;
    config.grid = grid_of(kOp, args.B * plan.blocks);
    config.block = dim3(threads_for(args.N));
    config.dynamic_shared_bytes = plan.shared_bytes;
    config.stream = stream;
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

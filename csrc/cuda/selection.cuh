// What hierarchical_select and diverse_select share: results in raster order, by bitmask and prefix sums.
#pragma once

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace hvprune {

constexpr int kMaxThreads = 1024;  // of a block

// Threads of a block that works on N items: one each, in whole warps.
inline unsigned threads_for(int64_t N) {
    return static_cast<unsigned>(N < kMaxThreads ? round_up(N > 0 ? N : 1, kWarpSize) : kMaxThreads);
}

// Throws std::invalid_argument if N tokens need more shared memory than a block can have.
inline void check_shared_bytes(const char* op, const char* argument, int64_t N, int64_t bytes) {
    const int64_t most = hvp::max_shared_bytes(op);
    if (bytes > most) {
        throw std::invalid_argument(std::string(op) + ": " + argument + " must be of few enough tokens for the " +
                                    std::to_string(most) + " bytes of shared memory of a block, got " +
                                    std::to_string(N) + " tokens, which need " + std::to_string(bytes));
    }
}

// What a selection op returns for one image.
struct SelectionRow {
    int64_t* indices;  // [M]
    int32_t* count;
    bool* mask;  // [N]
};

// One bit per item, in shared memory: words [ceil(N / 32)], and the set bits before each word [ceil(N / 32) + 1].
struct BitSet {
    uint32_t* words;
    int32_t* before;

    static __host__ __device__ int64_t bytes(int64_t N) { return (2 * ceil_div(N, kWarpSize) + 1) * 4; }

    __device__ bool has(int item) const { return words[item / kWarpSize] >> item % kWarpSize & 1; }

    // Set bits below `item`.
    __device__ int rank(int item) const {
        const uint32_t below = (1u << item % kWarpSize) - 1;
        return before[item / kWarpSize] + __popc(words[item / kWarpSize] & below);
    }

    // Fills the set: item is in it if contains(item). By all threads of a one-dimensional block, a whole number of
    // warps; ends with a barrier. Returns the number of items.
    template <class Contains>
    __device__ int fill(int N, Contains contains) const {
        for (int base = 0; base < N; base += blockDim.x) {
            const int item = base + threadIdx.x;
            const unsigned word = __ballot_sync(kAllLanes, item < N && contains(item));
            if (item < N && item % kWarpSize == 0) words[item / kWarpSize] = word;
        }
        __syncthreads();  // words are written
        const int num_words = ceil_div(N, kWarpSize);
        if (threadIdx.x < kWarpSize) {
            const int lane = threadIdx.x;
            int total = 0;
            for (int base = 0; base < num_words; base += kWarpSize) {
                const int w = base + lane, size = w < num_words ? __popc(words[w]) : 0;
                int sum = size;
                for (int delta = 1; delta < kWarpSize; delta *= 2) {
                    const int left = __shfl_up_sync(kAllLanes, sum, delta);
                    if (lane >= delta) sum += left;
                }
                if (w < num_words) before[w] = total + sum - size;
                total += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
            }
            if (lane == 0) before[num_words] = total;
        }
        __syncthreads();  // before is written
        return before[num_words];
    }
};

// Writes the items of a filled set, of which there are `count`, as the result of an image. By all threads of a block.
__device__ inline void write_selection(const BitSet& kept, int count, int N, int64_t M, const SelectionRow& row) {
    for (int item = threadIdx.x; item < N; item += blockDim.x) {
        const bool has = kept.has(item);
        row.mask[item] = has;
        if (has) row.indices[kept.rank(item)] = item;
    }
    for (int64_t m = count + threadIdx.x; m < M; m += blockDim.x) row.indices[m] = -1;
    if (threadIdx.x == 0) *row.count = count;
}

}  // namespace hvprune

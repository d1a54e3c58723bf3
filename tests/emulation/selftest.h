// Launchers of the emulation's own test kernels, in the form of csrc/ops.h.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace hvp::selftest {

struct IntrinsicsArgs {
    const int* values;  // [num_threads]
    int* results;       // [16, num_threads]
    int num_threads;    // at most 1024
};
void intrinsics_cuda(const IntrinsicsArgs& args, cudaStream_t stream);

struct HistogramArgs {
    const int* values;        // [n], in [0, 8)
    int* counts;              // [8], zero at entry
    unsigned long long* sum;  // [1], zero at entry
    float* float_sum;         // [1], zero at entry
    int* largest;             // [1], zero at entry
    int* votes;               // [3]: the first block's __syncthreads_count, _or, _and of values > 3
    int64_t n;
};
void histogram_cuda(const HistogramArgs& args, cudaStream_t stream);

// Twice the sum, by the last block to arrive and a dependent launch.
struct TicketSumArgs {
    const int* values;  // [n]
    int* partial;       // [ceil(n / 64)]
    int* ticket;        // [1], zero at entry
    int* sum;           // [1]
    int64_t n;
};
void ticket_sum_cuda(const TicketSumArgs& args, cudaStream_t stream);

// Rounds of: remove the per_round largest of what is left (ties: the lower index), keep the order.
struct RemoveLargestArgs {
    const float* scores;  // [num_rounds, n]
    int* kept;            // [n]
    int* num_kept;        // [1]
    int n, num_rounds, per_round;
};
void remove_largest_cuda(const RemoveLargestArgs& args, cudaStream_t stream);

// Indices of the values above threshold, ascending; one cluster per row.
struct ClusterCompactArgs {
    const float* values;  // [num_rows, n]
    int* indices;         // [num_rows, n]
    int* counts;          // [num_rows]
    int num_rows, n;
    float threshold;
    int cluster;
};
void cluster_compact_cuda(const ClusterCompactArgs& args, cudaStream_t stream);

// The k largest values of each row, in order; blocks of a cluster exchange their candidates.
struct ClusterTopkArgs {
    const int* values;  // [num_rows, n], all different within a row, not negative
    int* largest;       // [num_rows, k]
    int num_rows, n, k;
    int cluster;
};
void cluster_topk_cuda(const ClusterTopkArgs& args, cudaStream_t stream);

enum class Operand { kHalf, kBfloat16, kTf32 };

// c = a b^T in tiles of 16 x 8, or c = a b for b [k, n] if b_is_kn (not for tf32).
struct MatmulArgs {
    const void* a;  // [m, k]
    const void* b;  // [n, k], or [k, n]
    float* c;       // [m, n]
    int m, n, k;    // multiples of 8; k of 8 / sizeof(element) * 4
    Operand operand;
    bool b_is_kn;
};
void matmul_cuda(const MatmulArgs& args, cudaStream_t stream);

enum class Bug {
    kNone,
    kMissingSyncthreads,
    kMissingSyncwarp,
    kRaceBetweenBlocks,
    kSharedOutOfBounds,
    kDivergentBarrier,
    kLaneNotInMask,
    kEndedLaneInMask,
    kMixedFunctions,
    kUninitialisedShared,
    kMissingCopyWait,
    kBlockEndsEarly,
    kMissingExchangeWait,
    kUnknownRank,
    kMissingProgrammaticWait,
    kLateProgrammaticWait,
    kTooManyThreads,
};

struct BugArgs {
    const int* in;  // [256]
    int* out;       // [256]
    Bug bug;
};
void bug_cuda(const BugArgs& args, cudaStream_t stream);

}  // namespace hvp::selftest

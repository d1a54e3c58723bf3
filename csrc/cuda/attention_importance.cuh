// What the kernels of attention_importance share: parameters, and sums over blocks in fixed point.
#pragma once

#include <cmath>
#include <string>

#include "../ops.h"
#include "common.cuh"
#include "mma.cuh"

namespace hvprune::attention {

constexpr const char* kOp = "attention_importance";
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnitRows = 128;           // query rows summed in float32
constexpr int kMaxLayers = 32;           // of one launch: the kernel's parameters fit in 4 KB
constexpr float kLargestMean = 1024.0f;  // above it the fixed point would overflow
constexpr float kLog2e = 1.44269504f;
constexpr unsigned kIsNan = 1, kIsInfinite = 2;

// Shared memory of the kernel for all rows: offsets in bytes.
struct Layout {
    int num_steps, key, stats, totals, bytes;
};

struct Params {
    AttentionLayer layers[kMaxLayers];
    unsigned long long* sums;  // [B, N] fixed point
    unsigned* flags;           // [B, N] kIsNan, kIsInfinite
    unsigned* tickets;         // [B] blocks that have ended
    float* importance;         // [B, N]
    int num_layers, H, L, D, P;
    int heads_per_image;  // of all launches
    int num_units, units_per_block, blocks_per_head;
    Layout layout;
    int panel;             // keys in shared memory at a time, a multiple of kPairKeys
    float scale;           // its absolute value, never zero, so that -inf stays -inf
    float log2_scale;      // the same for powers of 2
    bool negate;           // the scale is negative
    bool aligned;          // rows are aligned to 16 bytes
    float steps;           // fixed-point steps of 1.0, a power of two
    double mean_of_steps;  // 1 / (steps * number of rows)
};
static_assert(sizeof(Params) <= 4096, "what every architecture takes as kernel parameters");

// The image, layer and head of a block, and its first unit.
struct Head {
    int64_t b;
    int l, h, first_unit;

    static __device__ Head of(const Params& params, int head, int first_unit) {
        return {head / params.H / params.num_layers, head / params.H % params.num_layers, head % params.H, first_unit};
    }
    template <class T>
    __device__ const T* query(const Params& params) const {
        const AttentionLayer& layer = params.layers[l];
        return static_cast<const T*>(layer.query) + b * layer.query_batch_stride + h * layer.query_head_stride;
    }
    template <class T>
    __device__ const T* key(const Params& params) const {
        const AttentionLayer& layer = params.layers[l];
        return static_cast<const T*>(layer.key) + b * layer.key_batch_stride + h * layer.key_head_stride;
    }
    __device__ const float* logsumexp(const Params& params) const {
        const AttentionLayer& layer = params.layers[l];
        return layer.logsumexp + b * layer.logsumexp_batch_stride + h * layer.logsumexp_head_stride;
    }
};

// The fixed-point form of a sum over at most `rows` rows; 0 and a flag for what has none.
__device__ inline unsigned long long to_fixed(const Params& params, int64_t index, float sum, int rows) {
    if (sum <= kLargestMean * rows) return static_cast<unsigned long long>(__float2ll_rn(sum * params.steps));
    atomicOr(&params.flags[index], sum != sum ? kIsNan : kIsInfinite);
    return 0;
}

// By all threads of every block, after its last atomics: the last block of an image takes the mean.
__device__ inline void finish_image(const Params& params, int64_t b, int blocks_per_head) {
    HVP_SHARED(bool, s_is_last, 1);
    __syncthreads();  // the block's sums come before the fence
    if (threadIdx.x == 0) {
        const unsigned blocks = static_cast<unsigned>(params.heads_per_image) * blocks_per_head;
        __threadfence();  // and that before the ticket
        s_is_last[0] = atomicAdd(&params.tickets[b], 1u) + 1 == blocks;
        __threadfence();  // the other blocks' sums are there
    }
    __syncthreads();  // s_is_last is written
    if (!s_is_last[0]) return;
    const int N = params.L - params.P;
    for (int j = threadIdx.x; j < N; j += blockDim.x) {
        const unsigned long long steps = __ldcg(&params.sums[b * N + j]);  // from L2, where atomics write
        const unsigned flags = __ldcg(&params.flags[b * N + j]);
        float mean = static_cast<float>(static_cast<double>(steps) * params.mean_of_steps);
        if (flags & kIsInfinite) mean = INFINITY;
        if (flags & kIsNan) mean = NAN;
        params.importance[b * N + j] = mean;
    }
}

// The two launches: by element type, of params.num_layers layers and B images.
void launch_all_rows(const Params& params, DType dtype, int64_t B, const hvp::LaunchConfig& config);
void launch_cls_row(const Params& params, DType dtype, int64_t B, const hvp::LaunchConfig& config);

}  // namespace hvprune::attention

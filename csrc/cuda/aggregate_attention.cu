// Computes  importance[b, j] = mean over layers, heads and rows i of map[b, h, i, P + j]
// Work      a cluster of blocks per image and 32 columns, a lane per column. All rows of all maps are dealt out to the
//           warps of the cluster in equal runs; their sums meet in shared memory, those of the blocks in block 0.
// Traffic   every map once (row 0 alone for cls_row), no scratch memory.
// Numerics  sixteen rows at a time in float32, their sums in double, in an order that depends on the architecture and
//           the shape of an image alone: deterministic and batch-invariant. NaN and inf end in their column.
// Source    HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention)
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../ops.h"
#include "common.cuh"

namespace hvprune {
namespace {

constexpr int kColumns = 32;    // of a cluster, one per lane
constexpr int kWarps = 16;      // of a block
constexpr int kCluster = 8;     // blocks, where there are clusters; it does not depend on B, for the order of sums
constexpr int kGroup = 16;      // rows summed in float32 before they go to double, and loads in flight per thread
constexpr int kMaxLayers = 96;  // what fits in the 4 KB of kernel parameters that every architecture takes

struct Layers {
    AttentionMap layers[kMaxLayers];
};
static_assert(sizeof(Layers) <= 4000, "4 KB of kernel parameters, the other ones included");

// Sum over `count` rows, at most kGroup, of the column that `first` points to. No branch between the loads, which are
// all in flight together: past the end they repeat the last row.
template <bool kFull, class T>
__device__ double sum_group(const T* first, int64_t row_stride, int count) {
    T values[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) values[k] = first[(kFull ? k : min(k, count - 1)) * row_stride];
    float sum = to_float(values[0]);
#pragma unroll
    for (int k = 1; k < kGroup; ++k) sum += kFull || k < count ? to_float(values[k]) : 0.0f;
    return static_cast<double>(sum);
}

template <class T>
__global__ void __launch_bounds__(kWarps* kColumns)
    aggregate_attention_kernel(const __grid_constant__ Layers layers, int64_t num_layers,
                               float* importance,  // [B, N]
                               int64_t H, int64_t L, int64_t P, int64_t rows) {
    const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
    const int rank = hvp::cluster_rank(), blocks = hvp::cluster_size();
    const int64_t chunks = ceil_div(L - P, kColumns), chunk = blockIdx.x / blocks;
    const int64_t b = chunk / chunks, column = P + chunk % chunks * kColumns + lane;
    const bool inside = column < L;
    HVP_SHARED(double, s_warp_sums, kWarps* kColumns);
    HVP_SHARED(double, s_sums, kColumns);

    // Sum the warp's rows, those of one map at a time.
    const int64_t total = num_layers * H * rows, part = rank * kWarps + warp, parts = blocks * kWarps;
    const int64_t end = (part + 1) * total / parts;
    double sum = 0.0;
    for (int64_t i = part * total / parts; i < end;) {
        const AttentionMap& layer = layers.layers[i / rows / H];
        const int64_t row = i % rows, count = min(rows - row, end - i);
        const int64_t offset = b * layer.batch_stride + i / rows % H * layer.head_stride + row * layer.row_stride;
        const T* from = static_cast<const T*>(layer.map) + offset + min(column, L - 1);
        int left = static_cast<int>(count);
        for (; left >= kGroup; left -= kGroup, from += kGroup * layer.row_stride) {
            sum += sum_group<true>(from, layer.row_stride, kGroup);
        }
        if (left > 0) sum += sum_group<false>(from, layer.row_stride, left);
        i += count;
    }

    // Sum the block's warps.
    s_warp_sums[threadIdx.x] = sum;
    __syncthreads();  // s_warp_sums is written
    if (warp == 0) {
        double block_sum = 0.0;
        for (int w = 0; w < kWarps; ++w) block_sum += s_warp_sums[w * kColumns + lane];
        s_sums[lane] = block_sum;
    }

    // Sum the cluster's blocks.
    hvp::cluster_sync();  // every block's s_sums is written
    if (rank == 0 && warp == 0 && inside) {
        double cluster_sum = 0.0;
        for (int block = 0; block < blocks; ++block) cluster_sum += hvp::cluster_map(s_sums, block)[lane];
        importance[b * (L - P) + column - P] = static_cast<float>(cluster_sum / static_cast<double>(total));
    }
    hvp::cluster_sync();  // no block ends before its sums are read
}

}  // namespace

void aggregate_attention_cuda(const AggregateAttentionArgs& args, cudaStream_t stream) {
    constexpr const char* kOp = "aggregate_attention";
    if (args.num_layers > kMaxLayers) {
        throw std::invalid_argument(std::string(kOp) + ": attentions must be at most " + std::to_string(kMaxLayers) +
                                    " layers on a GPU, got " + std::to_string(args.num_layers));
    }
    if (args.B == 0) return;
    int capability;
    HVP_CUDA_CHECK(kOp, hvp::compute_capability(&capability));
    Layers layers = {};
    std::copy_n(args.layers, args.num_layers, layers.layers);
    hvp::LaunchConfig config;
    config.cluster = capability >= 90 ? kCluster : 1;
    config.grid = grid_of(kOp, args.B * ceil_div(args.L - args.P, kColumns) * config.cluster);
    config.block = dim3(kWarps * kColumns);
    config.stream = stream;
    dispatch(args.dtype, [&](auto tag) {
        HVP_LAUNCH(kOp, config, aggregate_attention_kernel<decltype(tag)>, layers, args.num_layers, args.importance,
                   args.H, args.L, args.P, args.cls_row ? 1 : args.L);
    });
}

}  // namespace hvprune

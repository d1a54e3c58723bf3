// Computes  importance[b, j] = mean over layers, heads and query rows i of softmax(scale * Q K^T)[i, P + j]
// Work      all rows: a block takes units of 128 query rows of one (image, layer, head). Keys stay in shared memory, 32
//           rows are scored at a time, each warp against its share of the keys, and the scores of a row never leave
//           the registers: one pass, one exponential per score. Where the keys exceed shared memory or registers they
//           come in panels, twice (once with logsumexp). cls_row: a block per (image, layer, head), eight lanes per
//           key. The last block of an image divides.
// Traffic   Q and K once from memory (K up to ceil(L / 128) times from L2); 12 bytes of scratch per (image, patch).
// Numerics  products and softmax in float32 (float32 inputs by FMA). Sums over the rows of a unit in float32, over
//           units in fixed point by integer atomics with steps of 2^-52 of the mean: every unit rounds by at most
//           2^-53, in all below 1e-13, and no order, batch or split changes a bit. A NaN or an infinity is flagged and
//           comes out as a softmax has it; so does, as infinity, a mean above 2^10 (a logsumexp that is not of these
//           scores).
// Source    HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention)
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention_importance.cuh"

namespace hvprune {

void attention_importance_cuda(const AttentionImportanceArgs& args, cudaStream_t stream) {
    using namespace attention;
    constexpr int64_t kMaxDim = 256;
    const int64_t N = args.L - args.P;
    if (args.D > kMaxDim) {
        throw std::invalid_argument(std::string(kOp) + ": queries must be at most " + std::to_string(kMaxDim) +
                                    " wide on a GPU, got " + std::to_string(args.D));
    }
    if (args.B * N == 0) return;
    Params params = {};
    params.sums = static_cast<unsigned long long*>(args.scratch);
    params.flags = reinterpret_cast<unsigned*>(params.sums + args.B * N);
    params.tickets = params.flags + args.B * N;
    params.importance = args.importance;
    params.H = static_cast<int>(args.H);
    params.L = static_cast<int>(args.L);
    params.D = static_cast<int>(args.D);
    params.P = static_cast<int>(args.P);
    params.num_units = static_cast<int>(ceil_div(args.L, kUnitRows));
    params.scale = std::max(std::fabs(args.scale), FLT_MIN);
    params.log2_scale = params.scale * kLog2e;
    params.negate = args.scale < 0.0f;
    params.heads_per_image = static_cast<int>(args.num_layers * args.H);
    const double heads = params.heads_per_image;
    const double rows = heads * (args.cls_row ? 1 : params.num_units * kUnitRows);
    // kLargestMean * rows * steps <= 2^62
    const int log2_steps = 52 - static_cast<int>(std::ceil(std::log2(rows)));
    params.steps = std::ldexp(1.0f, log2_steps);
    params.mean_of_steps = std::ldexp(1.0, -log2_steps) / (heads * (args.cls_row ? 1 : args.L));

    hvp::LaunchConfig config;
    config.block = dim3(kThreads);
    config.stream = stream;
    HVP_CUDA_CHECK(kOp, cudaMemsetAsync(args.scratch, 0, args.B * (12 * N + 4), stream));
    const int64_t size = args.dtype == DType::kFloat32 ? 4 : 2;
    const auto piece_aligned = [&](const void* p, int64_t a, int64_t b, int64_t c) {
        return (reinterpret_cast<uintptr_t>(p) | (a | b | c) * size) % 16 == 0;
    };
    for (int64_t begin = 0; begin < args.num_layers; begin += kMaxLayers) {
        params.num_layers = static_cast<int>(std::min<int64_t>(args.num_layers - begin, kMaxLayers));
        std::copy_n(args.layers + begin, params.num_layers, params.layers);
        params.aligned = true;
        for (int l = 0; l < params.num_layers; ++l) {
            const AttentionLayer& x = params.layers[l];
            params.aligned &= piece_aligned(x.query, x.query_batch_stride, x.query_head_stride, x.query_row_stride) &&
                              piece_aligned(x.key, x.key_batch_stride, x.key_head_stride, x.key_row_stride);
        }
        if (args.cls_row) {
            launch_cls_row(params, args.dtype, args.B, config);
        } else {
            launch_all_rows(params, args.dtype, args.B, config);
        }
    }
}

}  // namespace hvprune

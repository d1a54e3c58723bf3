// Computes  per region the floor(keep_ratio * size) best tokens, then per window the best token not yet kept
// Work      one block per image, a thread per token; regions and their windows by one warp each: the k-th best key by
//           bisection over its bits, ties and results by bitmask and prefix sums. No sort, no scratch memory.
// Traffic   scores once, indices and mask once. Keys stay in shared memory (5.3 bytes per token), which bounds N.
// Numerics  order keys of the scores: ties by lower index, NaN below -inf. Bitwise equal to the reference.
// Source    HIVTP, arXiv 2509.23663
#include "../ops.h"
#include "../order.h"
#include "selection.cuh"

namespace hvprune {
namespace {

enum Stage : uint8_t { kDropped, kWinner, kKept };

struct Region {
    int top, left, height, width;
};

// One image in shared memory.
struct Image {
    int32_t* keys;   // [N]
    uint8_t* stage;  // [N], of enum Stage
    int gh, gw;
};

// Every 32nd token of a region in raster order, from the lane's own on; no division per step.
class RegionWalk {
 public:
    __device__ RegionWalk(const Region& region, int gw, int lane) : x_(lane % region.width), width_(region.width) {
        token_ = (region.top + lane / width_) * gw + region.left + x_;
        step_x_ = kWarpSize % width_;
        step_ = kWarpSize / width_ * gw + step_x_;
        wrap_ = gw - width_;
    }
    __device__ int token() const { return token_; }
    __device__ void next() {
        x_ += step_x_;
        token_ += step_;
        if (x_ >= width_) {
            x_ -= width_;
            token_ += wrap_;
        }
    }

 private:
    int token_, x_, width_, step_x_, step_, wrap_;
};

// Global stage, by one warp: marks the `quota` best tokens of a region.
__device__ void keep_best_of_region(const Image& image, const Region& region, int quota) {
    const int size = region.height * region.width, lane = threadIdx.x % kWarpSize;
    if (quota <= 0) return;
    const auto count_from = [&](int32_t key) {
        int count = 0;
        RegionWalk walk(region, image.gw, lane);
        for (int i = lane; i < size; i += kWarpSize, walk.next()) count += image.keys[walk.token()] >= key;
        return __reduce_add_sync(kAllLanes, count);
    };
    const int32_t threshold = kth_best_key(size, quota, count_from);
    int ties = quota - count_from(threshold + 1);  // places left for keys equal to the threshold
    RegionWalk walk(region, image.gw, lane);
    for (int base = 0; base < size; base += kWarpSize, walk.next()) {
        const bool inside = base + lane < size;
        const int32_t key = inside ? image.keys[walk.token()] : kNotACandidate;
        const unsigned equal = __ballot_sync(kAllLanes, key == threshold);
        const int earlier = __popc(equal & ((1u << lane) - 1));
        if (key > threshold || (key == threshold && earlier < ties)) image.stage[walk.token()] = kKept;
        ties -= __popc(equal);
    }
}

// Local stage, by one warp: marks the best token of each window of a region among those not kept, if there is one.
__device__ void keep_winners(const Image& image, const Region& region, int window_height, int window_width) {
    const int per_row = ceil_div(region.width, window_width), lane = threadIdx.x % kWarpSize;
    const int windows = per_row * static_cast<int>(ceil_div(region.height, window_height));
    for (int w = lane; w < windows; w += kWarpSize) {
        const int y = w / per_row * window_height, x = w % per_row * window_width;
        const int rows = min(window_height, region.height - y), columns = min(window_width, region.width - x);
        const int first = (region.top + y) * image.gw + region.left + x;
        int winner = -1;
        int32_t most = kNotACandidate;
        for (int i = 0; i < rows; ++i) {
            for (int token = first + i * image.gw; token < first + i * image.gw + columns; ++token) {
                if (image.stage[token] != kKept && image.keys[token] > most) {
                    most = image.keys[token];
                    winner = token;
                }
            }
        }
        if (winner >= 0) image.stage[winner] = kWinner;
    }
}

__device__ void select_regions(const Image& image, int64_t region_rows, int64_t region_cols, int window_height,
                               int window_width, double keep_ratio) {
    const int num_warps = blockDim.x / kWarpSize;
    for (int64_t r = threadIdx.x / kWarpSize; r < region_rows * region_cols; r += num_warps) {
        const int64_t i = r / region_cols, j = r % region_cols;
        const int top = region_begin(i, image.gh, region_rows), left = region_begin(j, image.gw, region_cols);
        const Region region = {top, left, static_cast<int>(region_begin(i + 1, image.gh, region_rows)) - top,
                               static_cast<int>(region_begin(j + 1, image.gw, region_cols)) - left};
        if (region.height == 0 || region.width == 0) continue;
        keep_best_of_region(image, region, region_quota(keep_ratio, region.height * region.width));
        __syncwarp();  // kept tokens are marked
        keep_winners(image, region, window_height, window_width);
    }
}

// Tokens by stage, and in the stage that the budget cuts through, by key.
struct Budget {
    int stage;          // all tokens of higher stages are in
    int32_t threshold;  // of this one, those above it,
    int ties;           // and so many of those equal to it
};

// By all threads of the block.
__device__ Budget divide_budget(const Image& image, int N, int M) {
    const auto count_if = [&](auto predicate) {
        int count = 0;
        for (int base = 0; base < N; base += blockDim.x) {
            const int token = base + threadIdx.x;
            count += __syncthreads_count(token < N && predicate(token));
        }
        return count;
    };
    int left = M, stage = kKept, candidates = 0;
    for (; stage >= kDropped; --stage) {
        candidates = count_if([&](int token) { return image.stage[token] == stage; });
        if (candidates > left) break;
        left -= candidates;
    }
    if (stage < kDropped || left == 0) return {stage, INT32_MAX, 0};
    const auto count_from = [&](int32_t key) {
        return count_if([&](int token) { return image.stage[token] == stage && image.keys[token] >= key; });
    };
    const int32_t threshold = kth_best_key(candidates, left, count_from);
    return {stage, threshold, left - count_from(threshold + 1)};
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    hierarchical_select_kernel(const T* scores,  // [B, N]
                               int64_t batch_stride,
                               int64_t* indices,  // [B, M]
                               int32_t* counts,   // [B]
                               bool* mask,        // [B, N]
                               int gh, int gw, int64_t region_rows, int64_t region_cols, int window_height,
                               int window_width, double keep_ratio, int M, bool fixed) {
    const int N = gh * gw;
    const int64_t b = blockIdx.x;
    HVP_DYNAMIC_SHARED(int32_t, s_keys);  // [N], then a BitSet of N, then the stages of N
    const BitSet s_set = {reinterpret_cast<uint32_t*>(s_keys + N), s_keys + N + ceil_div(N, kWarpSize)};
    const Image image = {s_keys, reinterpret_cast<uint8_t*>(s_keys + N) + BitSet::bytes(N), gh, gw};
    const SelectionRow row = {indices + b * M, counts + b, mask + b * N};

    hvp::programmatic_wait();  // NOTE: global memory is neither read nor written before
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        image.keys[token] = order_key(to_float(scores[b * batch_stride + token]));
        image.stage[token] = kDropped;
    }
    __syncthreads();  // keys and stages are written
    select_regions(image, region_rows, region_cols, window_height, window_width, keep_ratio);
    __syncthreads();  // stages are final
    if (!fixed) {
        const int count = s_set.fill(N, [&](int token) { return image.stage[token] != kDropped; });
        write_selection(s_set, count, N, M, row);
        return;
    }
    const Budget budget = divide_budget(image, N, M);
    s_set.fill(N,
               [&](int token) { return image.stage[token] == budget.stage && image.keys[token] == budget.threshold; });
    const auto within_budget = [&](int token) {
        const int stage = image.stage[token];
        const int32_t key = image.keys[token];
        if (stage != budget.stage) return stage > budget.stage;
        return key > budget.threshold || (key == budget.threshold && s_set.rank(token) < budget.ties);
    };
    for (int token = threadIdx.x; token < N; token += blockDim.x) {
        // NOTE: written over the stage, because the set of ties is needed until the last token is decided.
        image.stage[token] = within_budget(token);
    }
    __syncthreads();  // decisions are written, ties are no longer read
    const int count = s_set.fill(N, [&](int token) { return image.stage[token] != 0; });
    write_selection(s_set, count, N, M, row);
}

}  // namespace

void hierarchical_select_cuda(const HierarchicalSelectArgs& args, cudaStream_t stream) {
    constexpr const char* kOp = "hierarchical_select";
    const int64_t N = args.gh * args.gw;
    if (args.B == 0) return;
    hvp::LaunchConfig config;
    config.grid = grid_of(kOp, args.B);
    config.block = dim3(threads_for(N));
    config.dynamic_shared_bytes = 5 * N + BitSet::bytes(N);
    config.stream = stream;
    config.dependent = args.after_scores;
    check_shared_bytes(kOp, "scores", N, config.dynamic_shared_bytes);
    // A window larger than the grid is as good as one of its size.
    const auto clamp = [](int64_t size, int64_t most) { return static_cast<int>(size < most ? size : most); };
    dispatch(args.dtype, [&](auto tag) {
        using T = decltype(tag);
        HVP_LAUNCH(kOp, config, hierarchical_select_kernel<T>, static_cast<const T*>(args.scores), args.batch_stride,
                   args.indices, args.counts, args.mask, static_cast<int>(args.gh), static_cast<int>(args.gw),
                   args.region_rows, args.region_cols, clamp(args.window_height, args.gh),
                   clamp(args.window_width, args.gw), args.keep_ratio, static_cast<int>(args.M), args.fixed);
    });
}

}  // namespace hvprune

// The kernel of attention_importance for rows="cls"; attention_importance.cu says how it works.
#include <algorithm>
#include <cfloat>

#include "attention_importance.cuh"

namespace hvprune::attention {
namespace {

constexpr int kMaxCachedScores = 8192;  // in shared memory
constexpr int kKeyLanes = 8;            // lanes that share a key of the cls row
constexpr int kKeysAtOnce = 4;          // keys of a lane group in flight
constexpr int kClsKeys = kThreads / kKeyLanes * kKeysAtOnce;

// 16 bytes of a row from element `column` on, as float32; zero past `D` elements.
template <class T>
__device__ void load_piece(const T* row, int column, const Params& params, float (&values)[16 / sizeof(T)]) {
    constexpr int kPiece = 16 / sizeof(T);
    if (params.aligned && column + kPiece <= params.D) {
        struct alignas(16) Piece {
            T values[kPiece];
        } piece = *reinterpret_cast<const Piece*>(row + column);
        for (int i = 0; i < kPiece; ++i) values[i] = to_float(piece.values[i]);
    } else {
        for (int i = 0; i < kPiece; ++i) values[i] = column + i < params.D ? to_float(row[column + i]) : 0.0f;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) attention_importance_cls_kernel(const __grid_constant__ Params params) {
    constexpr int kPiece = 16 / sizeof(T);
    HVP_DYNAMIC_SHARED(float, s_query);  // [depth], then [min(L, kMaxCachedScores)] scores
    HVP_SHARED(float2, s_stats, kWarps);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece = lane % kKeyLanes;
    const int L = params.L, N = L - params.P, depth = static_cast<int>(round_up(params.D, kKeyLanes * kPiece));
    float* s_scores = s_query + depth;

    const Head head = Head::of(params, blockIdx.x, 0);
    const AttentionLayer& layer = params.layers[head.l];
    const T* query = head.query<T>(params);
    const T* key = head.key<T>(params);
    const float sign = params.negate ? -1.0f : 1.0f;
    for (int i = threadIdx.x; i < depth; i += kThreads) s_query[i] = i < params.D ? sign * to_float(query[i]) : 0.0f;
    __syncthreads();  // s_query is written

    // Scores of the keys first + kThreads / kKeyLanes * i + group, in all lanes of the group.
    const int group = threadIdx.x / kKeyLanes;
    const auto score = [&](int first, float (&scores)[kKeysAtOnce]) {
        for (float& x : scores) x = 0.0f;
        for (int k = piece * kPiece; k < depth; k += kKeyLanes * kPiece) {
            float x[kKeysAtOnce][kPiece];
#pragma unroll
            for (int i = 0; i < kKeysAtOnce; ++i) {
                const int j = min(first + kThreads / kKeyLanes * i + group, L - 1);
                load_piece(key + j * layer.key_row_stride, k, params, x[i]);
            }
#pragma unroll
            for (int i = 0; i < kKeysAtOnce; ++i) {
                for (int c = 0; c < kPiece; ++c) scores[i] = __fmaf_rn(s_query[k + c], x[i][c], scores[i]);
            }
        }
        for (float& x : scores) {
            for (int i = 1; i < kKeyLanes; i *= 2) x += __shfl_xor_sync(kAllLanes, x, i);
        }
    };

    // Score every key; online softmax per group.
    float most = -FLT_MAX, total = 0.0f;  // not -inf: then -inf - most is no NaN
    for (int first = 0; first < L; first += kClsKeys) {
        float scores[kKeysAtOnce];
        score(first, scores);
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; ++i) {
            const int j = first + kThreads / kKeyLanes * i + group;
            if (j >= L) continue;
            if (piece == 0 && j < kMaxCachedScores) s_scores[j] = scores[i];
            const float larger = fmaxf(most, scores[i]);
            total = total * hvp::exp2_approx((most - larger) * params.log2_scale) +
                    hvp::exp2_approx((scores[i] - larger) * params.log2_scale);
            most = larger;
        }
    }

    // Merge the groups, then the warps.
    const auto merge = [&](float other_most, float other_total) {
        const float larger = fmaxf(most, other_most);
        total = total * hvp::exp2_approx((most - larger) * params.log2_scale) +
                other_total * hvp::exp2_approx((other_most - larger) * params.log2_scale);
        most = larger;
    };
    for (int i = kKeyLanes; i < 32; i *= 2) {
        const float other_most = __shfl_xor_sync(kAllLanes, most, i),
                    other_total = __shfl_xor_sync(kAllLanes, total, i);
        merge(other_most, other_total);
    }
    if (lane == 0) s_stats[warp] = {most, total};
    __syncthreads();  // s_stats and s_scores are written
    most = s_stats[0].x;
    total = s_stats[0].y;
    for (int w = 1; w < kWarps; ++w) merge(s_stats[w].x, s_stats[w].y);

    // Normalise and add to the image's sums.
    float factor = 1.0f, log2_factor = params.log2_scale, weight = 1.0f / total;
    if (layer.logsumexp != nullptr) {
        most = head.logsumexp(params)[0];
        factor = params.scale;
        log2_factor = kLog2e;
        weight = 1.0f;
    }
    const auto add = [&](int j, float x) {
        const float p = hvp::exp2_approx(__fmaf_rn(x, factor, -most) * log2_factor) * weight;
        const int64_t index = head.b * N + j - params.P;
        atomicAdd(&params.sums[index], to_fixed(params, index, p, 1));
    };
    for (int j = params.P + threadIdx.x; j < min(L, kMaxCachedScores); j += kThreads) add(j, s_scores[j]);
    for (int first = kMaxCachedScores; first < L; first += kClsKeys) {  // too long to be kept
        float scores[kKeysAtOnce];
        score(first, scores);
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; ++i) {
            const int j = first + kThreads / kKeyLanes * i + group;
            if (piece == 0 && j >= params.P && j < L) add(j, scores[i]);
        }
    }
    finish_image(params, head.b, 1);
}

template <class T>
void launch_cls_row(const Params& params, int64_t B, hvp::LaunchConfig config) {
    const int64_t depth = round_up(params.D, kKeyLanes * 16 / static_cast<int64_t>(sizeof(T)));
    config.grid = grid_of(kOp, B * params.num_layers * params.H);
    config.dynamic_shared_bytes = (depth + std::min(params.L, kMaxCachedScores)) * sizeof(float);
    HVP_LAUNCH(kOp, config, attention_importance_cls_kernel<T>, params);
}

}  // namespace

void launch_cls_row(const Params& params, DType dtype, int64_t B, const hvp::LaunchConfig& config) {
    dispatch(dtype, [&](auto tag) { launch_cls_row<decltype(tag)>(params, B, config); });
}

}  // namespace hvprune::attention

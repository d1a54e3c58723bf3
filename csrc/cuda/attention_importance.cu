// Computes  importance[b, j] = mean over layers, heads and query rows i of softmax(scale * Q K^T)[i, P + j]
// Work      all rows: a block takes units of 128 query rows of one (image, layer, head). Keys stay in shared memory, 32
//           rows are scored at a time, each warp against its share of the keys, and the scores of a row never leave
//           the registers: one pass, one exponential per score. Where the keys exceed shared memory or registers they
//           come in panels, twice (once with logsumexp). cls_row: a block per (image, layer, head), eight lanes per
//           key. The last block of an image divides.
// Traffic   Q and K once from memory (K up to ceil(L / 128) times from L2); 12 bytes of scratch per (image, patch).
// Numerics  products and softmax in float32 (float32 inputs by FMA). Sums over the rows of a unit in float32, over
// units
//           in fixed point by integer atomics with steps of 2^-52 of the mean: every unit rounds by at most 2^-53, in
//           all below 1e-13, and no order, batch or split changes a bit. A NaN or an infinity is flagged and comes out
//           as a softmax has it; so does, as infinity, a mean above 2^10 (a logsumexp that is not of these scores).
// Source    HIVTP, arXiv 2509.23663 (mid-layer attention); VisPruner, arXiv 2412.01818 (CLS attention)
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common.cuh"
#include "mma.cuh"
#include "ops.h"

namespace hvprune {
namespace {

constexpr const char* kOp = "attention_importance";
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 32;                          // query rows scored at a time
constexpr int kUnitRows = 128;                         // query rows summed in float32
constexpr int kPairKeys = 16;                          // keys of two mma tiles
constexpr int kTwoBlockPairs = 5, kOneBlockPairs = 8;  // per warp, for two or one blocks on an SM
constexpr int kMaxLayers = 32;                         // of one launch: the kernel's parameters fit in 4 KB
constexpr int kMaxCachedScores = 8192;                 // of the cls row, in shared memory
constexpr float kLargestMean = 1024.0f;                // above it the fixed point would overflow
constexpr float kLog2e = 1.44269504f;
constexpr unsigned kIsNan = 1, kIsInfinite = 2;

// How a row of scores becomes weights: by its own maximum and sum, all keys on chip; the same, keys in panels; by the
// given logsumexp.
enum class Mode { kOnePass, kTwoPasses, kLogsumexp };

// NOTE: two tiles suffice for one pass; that leaves room for a second block on the SM.
HVP_FUNC constexpr int stats_rows(Mode mode) { return mode == Mode::kTwoPasses ? kUnitRows : 2 * kTileRows; }

// Shared memory of attention_importance_kernel: offsets in bytes. Rows are cut in steps of two 16-byte pieces, and a
// step of all rows lies together: offsets between rows are constants, and eight rows cover all banks (see piece_at).
struct Layout {
    int num_steps, key, stats, totals, bytes;
};

// Elements from a step to the next; one row more than there are, for the banks when a row is written.
template <class T>
HVP_FUNC constexpr int step_stride(int rows) {
    return (rows + 1) * 2 * (16 / static_cast<int>(sizeof(T)));
}

// Where piece 0 or 1 of a row begins in its step.
template <class T>
HVP_FUNC constexpr int piece_at(int row, int piece) {
    return (row * 2 + (piece ^ (row >> 2 & 1))) * (16 / static_cast<int>(sizeof(T)));
}

template <class T>
Layout layout_of(Mode mode, int D, int panel) {
    constexpr int kSize = sizeof(T);
    Layout layout;
    layout.num_steps = static_cast<int>(ceil_div(D * kSize, 32));
    layout.key = layout.num_steps * step_stride<T>(kUnitRows) * kSize;
    layout.stats = layout.key + layout.num_steps * step_stride<T>(panel) * kSize;
    layout.totals = layout.stats + kWarps * stats_rows(mode) * static_cast<int>(sizeof(float2));
    layout.bytes = layout.totals + panel * static_cast<int>(sizeof(unsigned long long));
    return layout;
}

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
    __threadfence();  // this thread's sums come before the ticket
    __syncthreads();  // and so do the block's
    if (threadIdx.x == 0) {
        const unsigned blocks = static_cast<unsigned>(params.heads_per_image) * blocks_per_head;
        s_is_last[0] = atomicAdd(&params.tickets[b], 1u) + 1 == blocks;
        __threadfence();  // the other blocks' sums are there
    }
    __syncthreads();  // s_is_last is written
    if (!s_is_last[0]) return;
    const int N = params.L - params.P;
    for (int j = threadIdx.x; j < N; j += blockDim.x) {
        // NOTE: atomics read where the other blocks' atomics wrote, in L2.
        const unsigned long long steps = atomicAdd(&params.sums[b * N + j], 0ull);
        const unsigned flags = atomicOr(&params.flags[b * N + j], 0u);
        float mean = static_cast<float>(static_cast<double>(steps) * params.mean_of_steps);
        if (flags & kIsInfinite) mean = INFINITY;
        if (flags & kIsNan) mean = NAN;
        params.importance[b * N + j] = mean;
    }
}

// x, opaque to the compiler: what depends on it is computed anew in every turn of a loop and takes no register between.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Starts the copy of rows [begin, begin + count) of source [L, D] to s_rows; what lies outside becomes zero.
template <class T>
__device__ void load_rows(T* s_rows, const T* source, int64_t row_stride, int begin, int count, const Params& params) {
    constexpr int kPiece = 16 / sizeof(T);
    const int pieces = params.layout.num_steps * 2, rows_at_once = kThreads / pieces;
    const int thread = opaque(threadIdx.x), first = thread / pieces, piece = thread % pieces;
    if (first >= rows_at_once) return;
    const int in_row = max(0, min(kPiece, params.D - piece * kPiece));
    T* s_step = s_rows + piece / 2 * step_stride<T>(count);
    for (int row = first; row < count; row += rows_at_once) {
        const int valid = begin + row < params.L ? in_row : 0;
        const T* from = valid > 0 ? source + (begin + row) * row_stride + piece * kPiece : source;
        T* to = s_step + piece_at<T>(row, piece % 2);
        if (params.aligned) {
            hvp::cp_async16(to, from, valid * sizeof(T));
        } else {
            for (int i = 0; i < kPiece; ++i) to[i] = i < valid ? from[i] : T(0.0f);
        }
    }
}

// A warp's scores of a tile in the registers of mma.m16n8k16: with g = lane / 4 and t = lane % 4, s[r][c] is that of
// row 8r + g and key 8(c / 2) + 2t + c % 2. Keys from 16 * num_pairs on stay 0.
template <class T, int kPairs>
__device__ void score_tile(const T* s_query, const T* s_key, int key_step, int num_steps, int num_pairs,
                           float (&s)[4][4 * kPairs]) {
    constexpr int kQueryStep = step_stride<T>(kUnitRows);
    const int lane = opaque(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 16 * kPairs; ++i) s[i % 4][i / 4] = 0.0f;
    if constexpr (sizeof(T) == 2) {
        const T* a_row = s_query + piece_at<T>(lane % 16, lane / 16);
        const T* b_row = s_key + piece_at<T>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            uint32_t a[2][4], b[4];
            hvp::ldmatrix_x4(a[0], a_row);
            hvp::ldmatrix_x4(a[1], a_row + piece_at<T>(16, 0));
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                if (pair >= num_pairs) break;
                hvp::ldmatrix_x4(b, b_row + piece_at<T>(kPairKeys * pair, 0));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = i / 2 * 2, c = 4 * pair + i % 2 * 2;
                    float acc[4] = {s[r][c], s[r][c + 1], s[r + 1][c], s[r + 1][c + 1]};
                    hvp::mma_m16n8k16<T>(acc, a[i / 2], {b[i % 2 * 2], b[i % 2 * 2 + 1]});
                    s[r][c] = acc[0], s[r][c + 1] = acc[1], s[r + 1][c] = acc[2], s[r + 1][c + 1] = acc[3];
                }
            }
            a_row += kQueryStep;
            b_row += key_step;
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 2 * num_steps; ++i) {
            const float* rows = s_query + i / 2 * kQueryStep + piece_at<T>(lane / 4, i % 2);
            const float* keys = s_key + i / 2 * key_step + piece_at<T>(lane % 4 * 2, i % 2);
            float4 q[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) q[r] = *reinterpret_cast<const float4*>(rows + piece_at<T>(8 * r, 0));
#pragma unroll
            for (int c = 0; c < 4 * kPairs; ++c) {
                if (c / 4 >= num_pairs) break;
                const float4 x = *reinterpret_cast<const float4*>(keys + piece_at<T>(c / 2 * 8 + c % 2, 0));
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const float low = __fmaf_rn(q[r].y, x.y, __fmaf_rn(q[r].x, x.x, s[r][c]));
                    s[r][c] = __fmaf_rn(q[r].w, x.w, __fmaf_rn(q[r].z, x.z, low));
                }
            }
        }
    }
}

// A row's maximum over the warp's keys, at least -FLT_MAX: then -inf minus it is no NaN.
template <int kColumns>
__device__ float row_max(const float (&s)[kColumns], int num_pairs) {
    float most = -FLT_MAX;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (c / 4 >= num_pairs) break;
        most = fmaxf(most, s[c]);
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    return fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
}

// Replaces the scores of a row by 2^((score * factor - shift) * log2_factor); returns their sum over the thread's keys.
template <int kColumns>
__device__ float exponentiate(float (&s)[kColumns], int num_pairs, float factor, float shift, float log2_factor) {
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (c / 4 >= num_pairs) break;
        s[c] = hvp::exp2_approx(__fmaf_rn(s[c], factor, -shift) * log2_factor);
        total += s[c];
    }
    return total;
}

__device__ inline float sum_of_quad(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Turns every warp's (shift, total) of `rows` rows into (shift, weight): the softmax of a row is weight *
// 2^((score - shift) * log2_scale). Eight lanes per row, one per warp; rows in whole tiles.
template <int kStatsRows>
__device__ void combine_stats(float2* s_stats, int rows, float log2_scale) {
    static_assert(kWarps == 8, "eight lanes hold the statistics of a row");
    const int thread = opaque(threadIdx.x);
    for (int row = thread / kWarps; row < rows; row += kThreads / kWarps) {
        float2& stats = s_stats[thread % kWarps * kStatsRows + row];
        float most = stats.x, total = stats.y;
        for (int i = 1; i < kWarps; i *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, i));
        const float factor = hvp::exp2_approx((stats.x - most) * log2_scale);
        total *= factor;
        for (int i = 1; i < kWarps; i *= 2) total += __shfl_xor_sync(kAllLanes, total, i);
        stats.y = factor / total;
    }
}

template <class T, int kPairs, Mode kMode>
__global__ void __launch_bounds__(kThreads,
                                  sizeof(T) == 2 && kPairs <= kTwoBlockPairs && kMode != Mode::kTwoPasses ? 2 : 1)
    attention_importance_kernel(const __grid_constant__ Params params) {
    constexpr int kStatsRows = stats_rows(kMode);
    HVP_DYNAMIC_SHARED(char, s_bytes);
    const Layout& layout = params.layout;
    T* s_query = reinterpret_cast<T*>(s_bytes);                           // kUnitRows rows
    T* s_key = reinterpret_cast<T*>(s_bytes + layout.key);                // params.panel rows
    float2* s_stats = reinterpret_cast<float2*>(s_bytes + layout.stats);  // [kWarps, kStatsRows] shift, total or weight
    auto* s_totals = reinterpret_cast<unsigned long long*>(s_bytes + layout.totals);  // [panel]

    // Find the block's head and units, and the warp's keys in every panel.
    HVP_SHARED(Head, s_head, 1);
    if (threadIdx.x == 0) {
        const int part = blockIdx.x % params.blocks_per_head;
        s_head[0] = Head::of(params, blockIdx.x / params.blocks_per_head, part * params.units_per_block);
    }
    __syncthreads();               // s_head is written
    const Head& head = s_head[0];  // NOTE: not in registers, which are short
    const int warp = threadIdx.x / 32;
    const int panel_pairs = params.panel / kPairKeys, first_pair = panel_pairs * warp / kWarps;
    const int num_pairs = panel_pairs * (warp + 1) / kWarps - first_pair, warp_key = first_pair * kPairKeys;

    const auto load_panel = [&](int begin) {
        load_rows(s_key, head.key<T>(params), params.layers[head.l].key_row_stride, begin, params.panel, params);
        hvp::cp_async_commit();
    };
    const auto load_unit = [&](int unit) {
        load_rows(s_query, head.query<T>(params), params.layers[head.l].query_row_stride, unit * kUnitRows, kUnitRows,
                  params);
        hvp::cp_async_commit();
    };
    const auto rows_of = [&](int unit) { return min(params.L - unit * kUnitRows, kUnitRows); };

    // Scores of 32 rows from `tile` on in the unit: -inf past L, their negative for a negative scale.
    float s[4][4 * kPairs];
    const auto score = [&](int unit, int tile, int panel_begin) {
        score_tile<T, kPairs>(s_query + piece_at<T>(tile, 0), s_key + piece_at<T>(warp_key, 0),
                              step_stride<T>(params.panel), layout.num_steps, num_pairs, s);
        const int rows = rows_of(unit) - tile, keys = params.L - panel_begin - warp_key;
        const int g = opaque(threadIdx.x) / 4 % 8, t = opaque(threadIdx.x) % 4;
        if (rows >= kTileRows && keys >= num_pairs * kPairKeys && !params.negate) return;
#pragma unroll
        for (int i = 0; i < 16 * kPairs; ++i) {
            const int r = i % 4, c = i / 4;
            const bool inside = 8 * r + g < rows && c / 2 * 8 + t * 2 + c % 2 < keys;
            s[r][c] = !inside ? -INFINITY : params.negate ? -s[r][c] : s[r][c];
        }
    };

    load_unit(head.first_unit);
    for (int i = threadIdx.x; i < params.panel; i += kThreads) s_totals[i] = 0;

    // Take the maxima and sums of rows that do not fit.
    if constexpr (kMode == Mode::kTwoPasses) {
        for (int begin = 0; begin < params.L; begin += params.panel) {
            __syncthreads();  // the previous panel is read
            load_panel(begin);
            hvp::cp_async_wait<0>();
            __syncthreads();  // the panel and the unit are there
            for (int tile = 0; tile < rows_of(head.first_unit); tile += kTileRows) {
                score(head.first_unit, tile, begin);
                const int g = opaque(threadIdx.x) / 4 % 8, t = opaque(threadIdx.x) % 4;
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    float2& stats = s_stats[warp * kStatsRows + tile + 8 * r + g];
                    const float2 before = begin > 0 ? stats : make_float2(-FLT_MAX, 0.0f);
                    const float most = fmaxf(before.x, row_max(s[r], num_pairs));
                    const float total = sum_of_quad(exponentiate(s[r], num_pairs, 1.0f, most, params.log2_scale));
                    const float kept = before.y * hvp::exp2_approx((before.x - most) * params.log2_scale);
                    __syncwarp();  // the statistics are read
                    if (t == 0) stats = make_float2(most, total + kept);
                }
                __syncwarp();  // and written
            }
        }
        __syncthreads();  // every warp's statistics are written
        combine_stats<kStatsRows>(s_stats, (rows_of(head.first_unit) + kTileRows - 1) & -kTileRows, params.log2_scale);
    }

    const int end = kMode == Mode::kOnePass ? 1 : params.L;
    for (int begin = 0; begin < end; begin += params.panel) {
        __syncthreads();  // the previous panel and s_totals are read
        load_panel(begin);
        int unit = head.first_unit;
        for (bool is_last = false; !is_last; ++unit) {
            hvp::cp_async_wait<0>();
            __syncthreads();              // the panel, the unit and the statistics are there
            float sums[4 * kPairs] = {};  // over the rows 8r + g
            for (int tile = 0; tile < rows_of(unit); tile += kTileRows) {
                score(unit, tile, begin);
                const int g = opaque(threadIdx.x) / 4 % 8, t = opaque(threadIdx.x) % 4;
                float2* stats = s_stats + warp * kStatsRows + tile % kStatsRows + g;
                float weight[4];
                // Exponentiate and normalise.
                if constexpr (kMode == Mode::kOnePass) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const float most = row_max(s[r], num_pairs);
                        const float total = sum_of_quad(exponentiate(s[r], num_pairs, 1.0f, most, params.log2_scale));
                        if (t == 0) stats[8 * r] = make_float2(most, total);
                    }
                    __syncthreads();  // every warp's statistics are written
                    combine_stats<kStatsRows>(s_stats + tile % kStatsRows, kTileRows, params.log2_scale);
                    __syncthreads();  // the weights are written
#pragma unroll
                    for (int r = 0; r < 4; ++r) weight[r] = stats[8 * r].y;
                } else if constexpr (kMode == Mode::kTwoPasses) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        exponentiate(s[r], num_pairs, 1.0f, stats[8 * r].x, params.log2_scale);
                        weight[r] = stats[8 * r].y;
                    }
                } else {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int row = min(unit * kUnitRows + tile + 8 * r + g, params.L - 1);
                        exponentiate(s[r], num_pairs, params.scale, head.logsumexp(params)[row], kLog2e);
                        weight[r] = 1.0f;
                    }
                }
                // Add up the columns.
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (tile + 8 * r + g >= rows_of(unit)) continue;
#pragma unroll
                    for (int c = 0; c < 4 * kPairs; ++c) {
                        if (c / 4 >= num_pairs) break;
                        sums[c] = __fmaf_rn(s[r][c], weight[r], sums[c]);
                    }
                }
            }
            is_last = unit + 1 == params.num_units || (unit + 1) % params.units_per_block == 0;
            if (!is_last) {
                __syncthreads();  // the unit is read
                load_unit(unit + 1);
            }
            // Round the unit's sums to fixed point: lane g takes columns of the mma tiles g and g + 8.
            constexpr int kMine = (2 * kPairs + 7) / 8;
            const int g = opaque(threadIdx.x) / 4 % 8, t = opaque(threadIdx.x) % 4;
            float mine[2 * kMine] = {};
#pragma unroll
            for (int c = 0; c < 4 * kPairs; ++c) {
                float sum = sums[c];
                for (int i = 4; i < 32; i *= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
                if (g == c / 2 % 8) mine[c / 16 * 2 + c % 2] = sum;
            }
#pragma unroll
            for (int i = 0; i < 2 * kMine; ++i) {
                const int key = (i / 2 * 8 + g) * 8 + t * 2 + i % 2, column = begin + warp_key + key - params.P;
                if (key < num_pairs * kPairKeys && column >= 0 && column < params.L - params.P) {
                    const int64_t index = head.b * (params.L - params.P) + column;
                    s_totals[warp_key + key] += to_fixed(params, index, mine[i], kUnitRows);
                }
            }
        }
        __syncthreads();  // s_totals is complete
        for (int i = threadIdx.x; i < params.panel; i += kThreads) {
            const int column = begin + i - params.P;
            if (column >= 0 && column < params.L - params.P) {
                atomicAdd(&params.sums[head.b * (params.L - params.P) + column], s_totals[i]);
            }
            s_totals[i] = 0;
        }
    }
    finish_image(params, head.b, params.blocks_per_head);
}

constexpr int kKeyLanes = 8;    // lanes that share a key of the cls row
constexpr int kKeysAtOnce = 4;  // keys of a lane group in flight
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

// Dynamic shared memory that a block can have.
int64_t max_shared_bytes() {
    int capability;
    HVP_CUDA_CHECK(kOp, hvp::compute_capability(&capability));
    const bool small = capability == 86 || capability == 89 || capability >= 120;
    return (small ? 99 : capability < 90 ? 163 : 227) * 1024;
}

template <class T, int kPairs, Mode kMode>
void launch_all_rows(Params params, int64_t B, hvp::LaunchConfig config) {
    const int64_t limit = max_shared_bytes();
    while (layout_of<T>(kMode, params.D, params.panel).bytes > limit && params.panel > kPairKeys)
        params.panel -= kPairKeys;
    params.layout = layout_of<T>(kMode, params.D, params.panel);
    if (params.layout.bytes > limit) {
        throw std::invalid_argument(std::string(kOp) +
                                    ": queries must be narrower for the shared memory of this GPU, got " +
                                    std::to_string(params.D));
    }
    // Whole heads per block where they fill a GPU: K is read once. The sums are the same bits.
    constexpr int64_t kManyHeads = 512;
    const bool whole = params.panel >= params.L && B * params.heads_per_image >= kManyHeads;
    params.units_per_block = whole ? params.num_units : 1;
    params.blocks_per_head = whole ? 1 : params.num_units;
    config.grid = grid_of(kOp, B * params.num_layers * params.H * params.blocks_per_head);
    config.dynamic_shared_bytes = params.layout.bytes;
    HVP_LAUNCH(kOp, config, attention_importance_kernel<T, kPairs, kMode>, params);
}

// The mode and the panel: whole rows where they fit.
template <class T>
void launch_all_rows(Params params, int64_t B, const hvp::LaunchConfig& config) {
    constexpr int kTwoBlockKeys = kTwoBlockPairs * kWarps * kPairKeys,
                  kOneBlockKeys = kOneBlockPairs * kWarps * kPairKeys;
    const int keys = static_cast<int>(round_up(params.L, kPairKeys));
    const bool fits = keys <= kOneBlockKeys && layout_of<T>(Mode::kOnePass, params.D, keys).bytes <= max_shared_bytes();
    params.panel = fits && params.layers[0].logsumexp == nullptr ? keys : std::min(keys, kTwoBlockKeys);
    if (params.layers[0].logsumexp != nullptr) {
        launch_all_rows<T, kTwoBlockPairs, Mode::kLogsumexp>(params, B, config);
    } else if (!fits) {
        launch_all_rows<T, kTwoBlockPairs, Mode::kTwoPasses>(params, B, config);
    } else if (keys <= kTwoBlockKeys) {
        launch_all_rows<T, kTwoBlockPairs, Mode::kOnePass>(params, B, config);
    } else {
        launch_all_rows<T, kOneBlockPairs, Mode::kOnePass>(params, B, config);
    }
}

template <class T>
void launch_cls_row(const Params& params, int64_t B, hvp::LaunchConfig config) {
    const int64_t depth = round_up(params.D, kKeyLanes * 16 / static_cast<int64_t>(sizeof(T)));
    config.grid = grid_of(kOp, B * params.num_layers * params.H);
    config.dynamic_shared_bytes = (depth + std::min(params.L, kMaxCachedScores)) * sizeof(float);
    HVP_LAUNCH(kOp, config, attention_importance_cls_kernel<T>, params);
}

}  // namespace

void attention_importance_cuda(const AttentionImportanceArgs& args, cudaStream_t stream) {
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
    dispatch(args.dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto piece_aligned = [](const void* p, int64_t a, int64_t b, int64_t c) {
            return (reinterpret_cast<uintptr_t>(p) | (a | b | c) * static_cast<int64_t>(sizeof(T))) % 16 == 0;
        };
        for (int64_t begin = 0; begin < args.num_layers; begin += kMaxLayers) {
            params.num_layers = static_cast<int>(std::min<int64_t>(args.num_layers - begin, kMaxLayers));
            std::copy_n(args.layers + begin, params.num_layers, params.layers);
            params.aligned = true;
            for (int l = 0; l < params.num_layers; ++l) {
                const AttentionLayer& x = params.layers[l];
                params.aligned &=
                    piece_aligned(x.query, x.query_batch_stride, x.query_head_stride, x.query_row_stride) &&
                    piece_aligned(x.key, x.key_batch_stride, x.key_head_stride, x.key_row_stride);
            }
            if (args.cls_row) {
                launch_cls_row<T>(params, args.B, config);
            } else {
                launch_all_rows<T>(params, args.B, config);
            }
        }
    });
}

}  // namespace hvprune

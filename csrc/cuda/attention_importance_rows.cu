// The kernel of attention_importance for rows="all"; attention_importance.cu says how it works.
#include <algorithm>
#include <cfloat>
#include <stdexcept>

#include "attention_importance_tiles.cuh"

namespace hvprune::attention {
namespace {

constexpr int kTwoBlockPairs = 5, kOneBlockPairs = 8;  // per warp, for two or one blocks on an SM

// How a row of scores becomes weights: by its own maximum and sum, all keys on chip; the same, keys in panels; by the
// given logsumexp.
enum class Mode { kOnePass, kTwoPasses, kLogsumexp };

// NOTE: two tiles suffice for one pass; that leaves room for a second block on the SM.
HVP_FUNC constexpr int stats_rows(Mode mode) { return mode == Mode::kTwoPasses ? kUnitRows : 2 * kTileRows; }

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

// Calls f(r, c) for the thread's scores of the warp's keys, those of all rows close together: what f does for one row
// hides the latency of another.
template <int kColumns, class F>
__device__ void for_each_score(int num_pairs, F f) {
#pragma unroll
    for (int pair = 0; pair < kColumns / 4; ++pair) {
        if (pair >= num_pairs) break;
#pragma unroll
        for (int i = 0; i < 16; ++i) f(i % 4, 4 * pair + i / 4);
    }
}

// x[r] of the four lanes that share a row, by an operation on two.
template <class Combine>
__device__ void combine_quads(float (&x)[4], Combine combine) {
    for (int i = 1; i < 4; i *= 2) {
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = combine(x[r], __shfl_xor_sync(kAllLanes, x[r], i));
    }
}

// Of each row the maximum over the warp's keys times log2_scale, at least -FLT_MAX: then -inf minus it is no NaN.
template <int kColumns>
__device__ void find_shifts(const float (&s)[4][kColumns], int num_pairs, float log2_scale, float (&shift)[4]) {
    for (float& x : shift) x = -FLT_MAX;
    for_each_score<kColumns>(num_pairs, [&](int r, int c) { shift[r] = fmaxf(shift[r], s[r][c]); });
    combine_quads(shift, [](float x, float y) { return fmaxf(x, y); });
    for (float& x : shift) x = fmaxf(x * log2_scale, -FLT_MAX);
}

// Replaces every score s by 2^exponent(r, s).
template <int kColumns, class Exponent>
__device__ void exponentiate(float (&s)[4][kColumns], int num_pairs, Exponent exponent) {
    for_each_score<kColumns>(num_pairs, [&](int r, int c) { s[r][c] = hvp::exp2_approx(exponent(r, s[r][c])); });
}

// Of each row the sum over the warp's keys.
template <int kColumns>
__device__ void sum_rows(const float (&s)[4][kColumns], int num_pairs, float (&total)[4]) {
    for (float& x : total) x = 0.0f;
    for_each_score<kColumns>(num_pairs, [&](int r, int c) { total[r] += s[r][c]; });
    combine_quads(total, [](float x, float y) { return x + y; });
}

// Turns every warp's (shift, total) of `rows` rows into (shift, weight): the softmax of a row is weight *
// 2^(score * log2_scale - shift). Eight lanes per row, one per warp; rows in whole tiles.
template <int kStatsRows>
__device__ void combine_stats(float2* s_stats, int rows) {
    static_assert(kWarps == 8, "eight lanes hold the statistics of a row");
    const int thread = opaque(threadIdx.x);
    for (int row = thread / kWarps; row < rows; row += kThreads / kWarps) {
        float2& stats = s_stats[thread % kWarps * kStatsRows + row];
        float most = stats.x, total = stats.y;
        for (int i = 1; i < kWarps; i *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, i));
        const float factor = hvp::exp2_approx(stats.x - most);
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
    hvp::programmatic_trigger();
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

    const auto softmax_exponent = [&](const float (&shift)[4]) {
        return [&](int r, float x) { return __fmaf_rn(x, params.log2_scale, -shift[r]); };
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
                float2* stats = s_stats + warp * kStatsRows + tile + g;
                float shift[4], total[4], before[4] = {};
                find_shifts(s, num_pairs, params.log2_scale, shift);
                if (begin > 0) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        shift[r] = fmaxf(shift[r], stats[8 * r].x);
                        before[r] = stats[8 * r].y * hvp::exp2_approx(stats[8 * r].x - shift[r]);
                    }
                }
                exponentiate(s, num_pairs, softmax_exponent(shift));
                sum_rows(s, num_pairs, total);
                __syncwarp();  // the statistics are read
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (t == 0) stats[8 * r] = make_float2(shift[r], total[r] + before[r]);
                }
            }
        }
        __syncthreads();  // every warp's statistics are written
        combine_stats<kStatsRows>(s_stats, (rows_of(head.first_unit) + kTileRows - 1) & -kTileRows);
    }

    const int end = kMode == Mode::kOnePass ? 1 : params.L;
    for (int begin = 0; begin < end; begin += params.panel) {
        load_panel(begin);  // over one that is read: a barrier came after
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
                    float shift[4], total[4];
                    find_shifts(s, num_pairs, params.log2_scale, shift);
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        if (t == 0) stats[8 * r].x = shift[r];
                    }
                    exponentiate(s, num_pairs, softmax_exponent(shift));
                    sum_rows(s, num_pairs, total);
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        if (t == 0) stats[8 * r].y = total[r];
                    }
                    __syncthreads();  // every warp's statistics are written
                    combine_stats<kStatsRows>(s_stats + tile % kStatsRows, kTileRows);
                    __syncthreads();  // the weights are written
#pragma unroll
                    for (int r = 0; r < 4; ++r) weight[r] = stats[8 * r].y;
                } else if constexpr (kMode == Mode::kTwoPasses) {
                    float shift[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        shift[r] = stats[8 * r].x;
                        weight[r] = stats[8 * r].y;
                    }
                    exponentiate(s, num_pairs, softmax_exponent(shift));
                } else {
                    // NOTE: not one fused step with log2_scale: its error would grow with the score. Two rows at a
                    // time, because registers are short.
#pragma unroll
                    for (int first = 0; first < 4; first += 2) {
                        float logsumexp[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int row = min(unit * kUnitRows + tile + 8 * (first + i) + g, params.L - 1);
                            logsumexp[i] = head.logsumexp(params)[row];
                            weight[first + i] = 1.0f;
                        }
                        for_each_score<4 * kPairs>(num_pairs, [&](int r, int c) {
                            if (r / 2 * 2 != first) return;
                            const float exponent = __fmaf_rn(s[r][c], params.scale, -logsumexp[r % 2]);
                            s[r][c] = hvp::exp2_approx(exponent * kLog2e);
                        });
                    }
                }
                // Add up the columns.
                const int rows = rows_of(unit) - tile - g;
                for_each_score<4 * kPairs>(num_pairs, [&](int r, int c) {
                    if (8 * r < rows) sums[c] = __fmaf_rn(s[r][c], weight[r], sums[c]);
                });
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

template <class T, int kPairs, Mode kMode>
void launch_all_rows(Params params, int64_t B, hvp::LaunchConfig config) {
    const int64_t limit = hvp::max_shared_bytes(kOp);
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
    const bool fits =
        keys <= kOneBlockKeys && layout_of<T>(Mode::kOnePass, params.D, keys).bytes <= hvp::max_shared_bytes(kOp);
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

}  // namespace

void launch_all_rows(const Params& params, DType dtype, int64_t B, const hvp::LaunchConfig& config) {
    dispatch(dtype, [&](auto tag) { launch_all_rows<decltype(tag)>(params, B, config); });
}

}  // namespace hvprune::attention

// Computes  per region the floor(keep_ratio * size) best tokens, then per window the best token not yet kept
// Work      one image at a time per thread; the k-th best of a region by bisection over the bits of its key.
// Traffic   scores once, indices and mask once.
// Numerics  order keys of the scores: ties by lower index, NaN below -inf. Bitwise equal to the reference.
#include "select.h"
#include "threads.h"

namespace hvprune::HVP_ISA {
namespace {

struct Workspace {
    int32_t* keys;    // [N] order keys of the image
    int32_t* region;  // [N] keys of one region, or of the candidates of the fixed mode
    int32_t* tokens;  // [N] token of each of those candidates
    uint8_t* stage;   // [N] kDropped, kWinner or kKept

    Workspace(Carver& carver, int64_t N)
        : keys(carver.take<int32_t>(N)),
          region(carver.take<int32_t>(N)),
          tokens(carver.take<int32_t>(N)),
          stage(carver.take<uint8_t>(N)) {}
};

enum Stage : uint8_t { kDropped, kWinner, kKept };

// Global stage: marks the best tokens of one region.
void keep_best_of_region(const HierarchicalSelectArgs& args, int64_t top, int64_t bottom, int64_t left, int64_t right,
                         const Workspace& work) {
    const int64_t width = right - left, size = (bottom - top) * width;
    for (int64_t y = top; y < bottom; ++y) {
        std::memcpy(work.region + (y - top) * width, work.keys + y * args.gw + left, width * sizeof(int32_t));
    }
    Cut cut = cut_at(work.region, size, region_quota(args.keep_ratio, size));
    for (int64_t y = top; y < bottom; ++y) {
        uint8_t* stage = work.stage + y * args.gw + left;
        mark_kept(work.region + (y - top) * width, width, cut,
                  [&](int64_t x, bool kept) { stage[x] = kept ? kKept : kDropped; });
    }
}

// Local stage: marks the best token of one window among those not kept, if there is one.
HVP_FUNC void keep_winner(const HierarchicalSelectArgs& args, int64_t top, int64_t bottom, int64_t left, int64_t right,
                          const Workspace& work) {
    int64_t winner = -1;
    int32_t most = kNotACandidate;
    for (int64_t y = top; y < bottom; ++y) {
        for (int64_t token = y * args.gw + left; token < y * args.gw + right; ++token) {
            const int32_t key = work.stage[token] == kKept ? kNotACandidate : work.keys[token];
            winner = key > most ? token : winner;
            most = key > most ? key : most;
        }
    }
    if (winner >= 0) work.stage[winner] = kWinner;
}

void select_region(const HierarchicalSelectArgs& args, int64_t top, int64_t bottom, int64_t left, int64_t right,
                   const Workspace& work) {
    keep_best_of_region(args, top, bottom, left, right, work);
    const int64_t height = args.window_height, width = args.window_width;
    for (int64_t y = top; y < bottom; y += height) {
        const int64_t y_end = bottom - y < height ? bottom : y + height;
        int64_t x = left;
        if (height == 2 && width == 2 && y_end == y + 2) {  // the usual window, unrolled
            for (; x + 2 <= right; x += 2) keep_winner(args, y, y + 2, x, x + 2, work);
        }
        for (; x < right; x += width) keep_winner(args, y, y_end, x, right - x < width ? right : x + width, work);
    }
}

// Exactly M tokens: kept ones first, then winners, then the rest, each by score.
void fill_budget(const HierarchicalSelectArgs& args, const Workspace& work, bool* mask) {
    const int64_t N = args.gh * args.gw;
    constexpr Stage kStages[] = {kKept, kWinner, kDropped};
    int64_t left = args.M;
    std::memset(mask, 0, N);
    for (const Stage stage : kStages) {
        int64_t candidates = 0;
        for (int64_t j = 0; j < N; ++j) {
            if (work.stage[j] == stage) {
                work.tokens[candidates] = static_cast<int32_t>(j);
                work.region[candidates++] = work.keys[j];
            }
        }
        Cut cut = cut_at(work.region, candidates, left);
        mark_kept(work.region, candidates, cut, [&](int64_t i, bool kept) { mask[work.tokens[i]] = kept; });
        left -= left < candidates ? left : candidates;
    }
}

}  // namespace

void hierarchical_select(const HierarchicalSelectArgs& args) {
    const int64_t N = args.gh * args.gw;
    if (args.B == 0) return;
    constexpr int64_t kPassesOverScores = 32;
    const int threads = threads_for(args.B, kPassesOverScores * N, args.num_threads);
    Carver sizes(nullptr);
    Workspace{sizes, N};
    const Scratch scratch(threads * sizes.used());

    with_team(threads, [&] {
        Carver carver(scratch.data() + omp_get_thread_num() * sizes.used());
        const Workspace work(carver, N);
#pragma omp for
        for (int64_t b = 0; b < args.B; ++b) {
            dispatch(args.dtype, [&](auto tag) {
                using T = decltype(tag);
                load_keys(static_cast<const T*>(args.scores) + b * args.batch_stride, N, work.keys);
            });
            for (int64_t i = 0; i < args.region_rows; ++i) {
                for (int64_t j = 0; j < args.region_cols; ++j) {
                    select_region(args, region_begin(i, args.gh, args.region_rows),
                                  region_begin(i + 1, args.gh, args.region_rows),
                                  region_begin(j, args.gw, args.region_cols),
                                  region_begin(j + 1, args.gw, args.region_cols), work);
                }
            }
            const SelectionRow row{args.indices + b * args.M, args.counts + b, args.mask + b * N};
            if (args.fixed) {
                fill_budget(args, work, row.mask);
            } else {
                for (int64_t j = 0; j < N; ++j) row.mask[j] = work.stage[j] != kDropped;
            }
            write_indices(row, N, args.M);
        }
    });
}

}  // namespace hvprune::HVP_ISA

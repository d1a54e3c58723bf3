// Computes  diverse_select(cosine_similarity(features), importance), bit for bit
// Work      per image: order by importance, similarity of the residual tokens only, rounds on it.
// Traffic   residual features twice; their similarity stays in cache.
// Numerics  as in the two ops: float16 similarity for half features is rounded here too.
// Source    VisPruner, arXiv 2412.01818
#include "dedup.h"
#include "gram.h"
#include "threads.h"

namespace hvprune::HVP_ISA {
namespace {

struct Workspace {
    DedupWorkspace dedup;
    Keyed* order;       // [N] tokens by importance
    int32_t* tokens;    // [residual] residual tokens, ascending: the columns of the matrix
    int32_t* columns;   // [N] column of a residual token
    float* similarity;  // [residual, padded residual]
    GramWorkspace gram;

    Workspace(Carver& carver, int64_t N, int64_t C, int64_t residual)
        : dedup(carver, N),
          order(carver.take<Keyed>(N)),
          tokens(carver.take<int32_t>(residual)),
          columns(carver.take<int32_t>(N)),
          similarity(carver.take<float>(residual * round_up(residual, kWidth))),
          gram(carver, residual, C) {}
};

}  // namespace

void vispruner_select(const VisprunerSelectArgs& args) {
    const int64_t N = args.N, residual = N - args.num_important, num_diverse = args.K - args.num_important;
    Carver sizes(nullptr);
    Workspace{sizes, N, args.C, residual};
    for_each_image(
        args.B, residual * residual * args.C / 2, args.num_threads, sizes.used(),
        [&](int64_t b, char* scratch, int threads) {
            Carver carver(scratch);
            const Workspace work(carver, N, args.C, residual);
            dispatch(args.importance_dtype, [&](auto tag) {
                using T = decltype(tag);
                const T* importance = static_cast<const T*>(args.importance) + b * args.importance_batch_stride;
                order_by_importance(importance, N, work.order, work.dedup.other);
            });
            const SelectionRow row{args.indices + b * args.K, args.counts + b, args.mask + b * N};
            std::memset(row.mask, 0, N);
            for (int64_t i = 0; i < args.num_important; ++i) row.mask[work.order[i].token] = true;

            if (num_diverse > 0 && residual > num_diverse) {
                int32_t column = 0;
                for (int64_t token = 0; token < N; ++token) {
                    work.columns[token] = column;
                    if (!row.mask[token]) work.tokens[column++] = static_cast<int32_t>(token);
                }
                const int64_t ld = round_up(residual, kWidth);
                dispatch(args.features_dtype, [&](auto tag) {
                    using T = decltype(tag);
                    const T* features = static_cast<const T*>(args.features) + b * args.batch_stride;
                    const FeatureRows rows{features,    args.token_stride, args.features_dtype,
                                           work.tokens, residual,          args.C};
                    if (args.features_dtype == DType::kFloat32) {
                        gram(rows, work.gram, work.similarity, ld, threads, [](float cosine) { return cosine; });
                    } else {
                        gram(rows, work.gram, work.similarity, ld, threads,
                             [](float cosine) { return to_float(to_half(cosine)); });
                    }
                });
                int32_t* list = work.dedup.list;
                for (int64_t i = 0; i < residual; ++i) list[i] = work.columns[work.order[args.num_important + i].token];
                remove_duplicates(work.similarity, ld, residual, num_diverse, args.removals_per_round, work.dedup,
                                  [](const int32_t*, int64_t) {});
                for (int64_t i = 0; i < num_diverse; ++i) row.mask[work.tokens[list[i]]] = true;
            } else if (num_diverse > 0) {  // nothing to remove
                std::memset(row.mask, 1, N);
            }
            write_indices(row, N, args.K);
        });
}

}  // namespace hvprune::HVP_ISA

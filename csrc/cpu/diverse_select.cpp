// Computes  the num_important best tokens, and of the others what is left after rounds of removing duplicates
// Work      one image at a time per thread. A round is a masked row maximum over the similarity matrix for every token
// at
//           an even position, and a stable sort of those; no matrix product.
// Traffic   per round, the rows of the similarity matrix of the even positions.
// Numerics  order keys of importance and scores: ties by lower index or earlier position. Bitwise equal to the
// reference. Source    VisPruner, arXiv 2412.01818
#include "dedup.h"
#include "threads.h"

namespace hvprune::HVP_ISA {
namespace {

struct Workspace {
    DedupWorkspace dedup;
    Keyed* order;       // [N] tokens by importance
    float* similarity;  // [N, padded N]

    Workspace(Carver& carver, int64_t N)
        : dedup(carver, N), order(carver.take<Keyed>(N)), similarity(carver.take<float>(N * round_up(N, kWidth))) {}
};

// The similarity of one image as floats with rows of a whole number of vectors: itself, or a copy.
template <class T>
const float* padded_rows(const T* similarity, int64_t row_stride, int64_t N, float* copy) {
    const int64_t padded = round_up(N, kWidth);
    for (int64_t i = 0; i < N; ++i) load_row(similarity + i * row_stride, N, padded, 1.0f, copy + i * padded);
    return copy;
}
const float* padded_rows(const float* similarity, int64_t row_stride, int64_t N, float* copy) {
    if (row_stride == N && N % kWidth == 0) return similarity;
    return padded_rows<float>(similarity, row_stride, N, copy);
}

void write_trace(const int32_t* list, int64_t length, int64_t columns, int64_t* row) {
    for (int64_t i = 0; i < columns; ++i) row[i] = i < length ? list[i] : -1;
}

}  // namespace

void diverse_select(const DiverseSelectArgs& args) {
    const int64_t N = args.N, residual = N - args.num_important;
    Carver sizes(nullptr);
    Workspace{sizes, N};
    for_each_image(args.B, N * N, args.num_threads, sizes.used(), [&](int64_t b, char* scratch, int) {
        Carver carver(scratch);
        const Workspace work(carver, N);
        dispatch(args.importance_dtype, [&](auto tag) {
            using T = decltype(tag);
            const T* importance = static_cast<const T*>(args.importance) + b * args.importance_batch_stride;
            order_by_importance(importance, N, work.order, work.dedup.other);
        });
        const float* similarity = nullptr;
        dispatch(args.similarity_dtype, [&](auto tag) {
            using T = decltype(tag);
            const T* own = static_cast<const T*>(args.similarity) + b * args.similarity_batch_stride;
            similarity = padded_rows(own, args.similarity_row_stride, N, work.similarity);
        });
        const SelectionRow row{args.indices + b * args.K, args.counts + b, args.mask + b * N};
        std::memset(row.mask, 0, N);
        for (int64_t i = 0; i < args.num_important; ++i) row.mask[work.order[i].token] = true;
        int32_t* list = work.dedup.list;
        for (int64_t i = 0; i < residual; ++i) list[i] = work.order[args.num_important + i].token;

        int64_t* trace = args.trace == nullptr ? nullptr : args.trace + b * args.trace_lists * residual;
        const auto record = [&](const int32_t* tokens, int64_t length) {
            if (trace == nullptr) return;
            write_trace(tokens, length, residual, trace);
            trace += residual;
        };
        record(list, residual);
        const int64_t num_diverse = args.K - args.num_important;
        remove_duplicates(similarity, round_up(N, kWidth), residual, num_diverse, args.removals_per_round, work.dedup,
                          record);
        for (int64_t i = 0; i < num_diverse; ++i) row.mask[list[i]] = true;
        write_indices(row, N, args.K);
    });
}

}  // namespace hvprune::HVP_ISA
